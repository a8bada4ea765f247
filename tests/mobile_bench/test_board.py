"""A board by SSH: an ARM64 Debian under qemu-user, with an sshd of its own. Its answers count, its times mean nothing.

make_arm64_board.sh makes it. It runs in a mount namespace of its own, so nothing of it outlives the test.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from mobile_bench.compare import compare
from mobile_bench.evaluate import evaluate_apart
from mobile_bench.inputs import InputSpec
from mobile_bench.measure import measure
from mobile_bench.records import Connection, Target

BOARD = Path(os.environ.get("TFOPT_ARM64", Path.home() / ".cache/tfopt-dev/arm64"))
SPEC, TARGET = InputSpec(12, 12, 3), Target("ssh", address="board")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    if not (BOARD / "usr/sbin/sshd").is_file():
        pytest.skip(f"there is no ARM64 board in {BOARD}: make it with tests/mobile_bench/make_arm64_board.sh")
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "chroot", "ssh-keygen"))):
        pytest.skip("the ARM64 board needs root, unshare, chroot and ssh-keygen")
    if subprocess.run(["chroot", str(BOARD), "/bin/true"], capture_output=True).returncode:
        pytest.skip("this system does not run ARM64 programs: qemu-user-static with binfmt is missing")
    folder = tmp_path_factory.mktemp("board")
    for name in ("key", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    there = Path(tempfile.mkdtemp(prefix="board-", dir=BOARD / "root"))
    shutil.copy(folder / "host", there / "host")
    shutil.copy(folder / "key.pub", there / "authorized")
    inside = f"/root/{there.name}"
    (there / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {inside}/host\nAuthorizedKeysFile {inside}/authorized\nPidFile none\n"
        "StrictModes no\nPasswordAuthentication no\nSubsystem sftp /usr/lib/openssh/sftp-server\n"
        # A Raspberry Pi 4's. qemu 7.2's own 'max' computes int8 convolutions wrongly in its newer instructions.
        "SetEnv QEMU_CPU=cortex-a72\n"
    )
    kind, key = (folder / "host.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    start = f'mount -t proc proc "$0/proc" && exec chroot "$0" /usr/sbin/sshd -D -e -f {inside}/config'
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            ["unshare", "-m", "-p", "--fork", "--kill-child", "sh", "-c", start, str(BOARD)], stderr=log
        )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        assert server.poll() is None, (folder / "log").read_text()
        yield Connection(
            "root@127.0.0.1", port, str(folder / "key"), str(folder / "known_hosts"), inside, "/usr/bin/python3"
        )
    finally:
        server.kill()  # and with it, by --kill-child, all that runs there
        server.wait()
        shutil.rmtree(there)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_file_is_measured_on_arm(board, tiny):
    found = measure(tiny.path("int8"), TARGET, connection=board, spec=SPEC, runs=6, max_runs=6, rounds=2, seconds=0)
    assert found.status == "ok", found.reason
    assert found.device["machine"] == "aarch64" and found.device["runtime"] == "ai-edge-litert"
    assert len(found.rounds) == 2 and found.input_shape == (1, 12, 12, 3)
    assert not [path for path in (BOARD / board.folder.lstrip("/")).glob("mobile-bench-*")]


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_arm_answers_as_this_machine_does(board, tiny, name):
    there = evaluate_apart(tiny.path(name), tiny.sample, SPEC, TARGET, connection=board, timeout_s=800)
    here = evaluate_apart(tiny.path(name), tiny.sample, SPEC)
    assert np.array_equal(there.predictions, here.predictions)
    assert there.correct == here.correct and there.runtime == here.runtime


def test_files_are_compared_on_arm(board, tiny):
    found = compare([tiny.path("float32")] * 2, TARGET, connection=board, seconds=1, rounds=6)
    assert found.rounds == 6 and found.device["machine"] == "aarch64"


def test_a_file_that_crashes_the_runtime_there_is_a_record(board, tiny):
    found = measure(tiny.path("self_calling"), TARGET, connection=board, rounds=1, seconds=0)
    assert found.status == "failed" and "SIG" in found.reason
