"""A real sshd on loopback, and what the tests of measuring by SSH need beside it."""

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mobile_bench.inputs import InputSpec
from mobile_bench.records import Target
from mobile_bench.transports import transport_for

SSHD = "/usr/sbin/sshd"
SPEC = InputSpec(12, 12, 3)
TARGET = Target("ssh", address="board")
JOB = {"threads": 1, "runtime": "auto", "batch": 1, "runs": 50, "max_runs": 60, "seed": 0, "spec": SPEC.to_dict()}
LONG = {**JOB, "runs": 100_000_000}

needs_sshd = pytest.mark.skipif(
    not (os.path.exists(SSHD) and shutil.which("ssh-keygen")), reason=f"needs OpenSSH's server, {SSHD}, and ssh-keygen"
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def new_key(path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_name(path.name + ".pub").read_text()


@contextlib.contextmanager
def serving(folder, sftp="internal-sftp"):
    """A server with keys of its own, for the user who runs the tests."""
    port, host_key = free_port(), new_key(folder / "host")
    (folder / "authorized").write_text(new_key(folder / "key"))
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    (folder / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        "PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin prohibit-password\nSubsystem sftp {sftp}\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "config")], stderr=log)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if server.poll() is not None or probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        assert server.poll() is None, (folder / "log").read_text()
        yield SimpleNamespace(folder=folder, port=port, pid=server.pid)
    finally:
        server.terminate()
        server.wait()


def over(connection):
    return transport_for(TARGET, connection)


def emptied(connection):
    return until(lambda: not os.listdir(connection.folder))


def until(holds):
    deadline = time.monotonic() + 30
    while not (answer := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer


def worker_in(connection, module=b"mobile_bench.worker"):
    """The process id of the measuring Python on the board."""

    def find():
        for file in Path(connection.folder).glob("*/job*.pid"):
            pid = file.read_text().strip()
            command = Path(f"/proc/{pid}/cmdline")
            if pid and command.exists() and module in command.read_bytes():
                return int(pid)

    return until(find)


def sessions_of(server):
    """The processes of sshd that serve a connection, and only those."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, after = stat.read_text().rsplit(")", 1)
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid, name = before.split(" (", 1)
        if name.startswith("sshd"):
            parents[int(pid)] = int(after.split()[1])
    found = [server]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def wrapper(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def without_runtime(folder):
    """A Python that has no runtime, and whose pip is played by links to what is installed here."""
    real, site = shlex.quote(sys.executable), shlex.quote(str(Path(np.__file__).parents[1]))
    pip = f'case "$*" in *"-m pip"*) mkdir runtime && ln -s {site}/* runtime/; exit;; esac'
    return wrapper(folder / "bare", f'{pip}\nexec {real} -S "$@"')
