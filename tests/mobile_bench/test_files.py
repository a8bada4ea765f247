"""Whole files or none."""

import errno
import hashlib
import json
import os
import stat

import numpy as np
import pytest

from mobile_bench.errors import InputError
from mobile_bench.files import atomic_path, check_writable, json_text, sha256_of, write_bytes, write_json


def test_a_file_appears_whole_with_the_users_own_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        write_bytes(tmp_path / "deep" / "er" / "x.bin", b"abc")
    finally:
        os.umask(old)
    path = tmp_path / "deep" / "er" / "x.bin"
    assert path.read_bytes() == b"abc" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n "a": 1\n}\n' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("100 requested and 0 written")]
)
def test_a_full_disk_is_named(tmp_path, error):
    with pytest.raises(InputError, match=r"cannot be written.*x\.bin"), atomic_path(tmp_path / "x.bin"):
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device(tmp_path):
    """What numpy raises there has no error number."""
    with (
        pytest.raises(InputError, match="cannot be written"),
        atomic_path(tmp_path / "x"),
        open("/dev/full", "wb") as full,
    ):
        np.save(full, np.zeros(10**6))


def test_other_errors_of_the_block_are_not_blamed_on_the_disk(tmp_path):
    with pytest.raises(ConnectionResetError), atomic_path(tmp_path / "x"):
        raise ConnectionResetError(errno.ECONNRESET, "the download broke off")


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(InputError, match="cannot be written"):
            write_bytes(path, b"")


def test_sha256(tmp_path):
    write_bytes(tmp_path / "x", b"abc")
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(InputError, match="cannot be read"):
        sha256_of(tmp_path / "none")


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "x.json", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be written"):
            check_writable(path)
    check_writable(tmp_path / "new" / "folder" / "x.json")
    check_writable(None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "the trial leaves nothing"


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    write_json(tmp_path / "a.json", {"name": "caf\udce9 \xfc"})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"name": "caf\ufffd \xfc"}
    assert json.loads(json_text({"name": "caf\udce9 \xfc"})) == {"name": "caf\ufffd \xfc"}
    assert json_text({"name": "\xfc"}).isascii()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_not_replaced_and_a_link_stays_one(tmp_path):
    pipe, real, link = (tmp_path / name for name in ("pipe", "real.json", "link.json"))
    os.mkfifo(pipe)
    for check in (lambda: write_bytes(pipe, b"x"), lambda: check_writable(pipe)):
        with pytest.raises(InputError, match="device, pipe or socket"):
            check()
    assert pipe.is_fifo()
    real.write_bytes(b"old")
    link.symlink_to(real)
    write_bytes(link, b"new")
    assert link.is_symlink() and real.read_bytes() == b"new"
