"""Work files are written beside their place and renamed: a reader never meets half a file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobile_bench.errors import InputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder; renamed to `path` if the block succeeds, removed if not."""
    path = Path(path)
    _refuse_special(path)
    if os.path.islink(path):  # what it points to is replaced, not the link
        path = path.resolve()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # the user's umask applies
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        try:
            yield temporary
        except OSError as error:
            if _is_about_writing(error):
                raise cannot_write(path, error) from error
            raise
        try:
            temporary.replace(path)
        except OSError as error:
            raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: object) -> None:
    """JSON with a line per field; refuses NaN and infinity, which are not JSON."""
    write_bytes(path, (json_text(value, ascii_only=False) + "\n").encode())


def json_text(value: object, *, ascii_only: bool = True) -> str:
    """Records as JSON that every reader takes: what is not text in a file's name (b'caf\\xe9') is U+FFFD."""
    text = _HALF.sub("\ufffd", json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False))
    return json.dumps(json.loads(text), indent=1) if ascii_only and not text.isascii() else text


def is_special(path: str | Path) -> bool:
    """Whether there is a device, a pipe or a socket: reading it may never end."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _refuse_special(path: Path) -> None:
    """Raise InputError for a device, a pipe or a socket: a rename would put a file in its place."""
    if is_special(path):
        raise InputError(
            "The output is not a file", received=f"{path}, a device, pipe or socket", allowed="a file's name",
            next_step="Name a file, or take --json for the standard output",
        )  # fmt: skip


def check_writable(path: str | Path | None, *inputs: str | Path | None) -> None:
    """Raise InputError now for a file that could not be written after minutes of measuring, or that is one of the
    inputs. None: nothing is asked."""
    if path is None:
        return
    path = Path(path)
    _refuse_special(path)
    for given in inputs:
        if given and os.path.exists(given) and os.path.exists(path) and os.path.samefile(path, given):
            raise InputError(
                "The output would overwrite what is read", received=path, next_step="Choose another name for it"
            )
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = next(folder for folder in path.parents if folder.exists())
        trial = folder / f".{path.name}.{secrets.token_hex(4)}"
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        trial.unlink()
    except OSError as error:
        raise cannot_write(path, error) from error


def check_is_file(path: str | Path) -> None:
    """Raise InputError for what cannot be read to its end."""
    if is_special(path):
        raise InputError(
            "The input is not a file", received=f"{path}, a device, pipe or socket", allowed="a file's name"
        )


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hex. Raises InputError where it cannot be read."""
    check_is_file(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError("A file cannot be read", received=f"{path} ({error.strerror or error})") from error


#: Half a surrogate pair: how Python keeps a byte of a name that is not UTF-8.
_HALF = re.compile("[\ud800-\udfff]")


def _is_about_writing(error: OSError) -> bool:
    """Whether the disk failed. Other errors of the block, such as a download's, are not about this file.

    numpy's failed writes are a bare OSError without a number.
    """
    return error.errno in _DISK_ERRORS or (type(error) is OSError and error.errno is None)


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(
        "A file cannot be written",
        received=f"{path} ({error.strerror or error})",
        next_step="Free some space or choose another folder",
    )
