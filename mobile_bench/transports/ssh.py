"""A board by SSH: everything goes into one folder there, which goes when we do.

A small shell process on the device makes that folder and removes it when its standard input closes: at the end
of the session, and just as well when this process is killed or the network fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import mobile_bench
from mobile_bench.errors import Interrupted, JobFailed, TransportError
from mobile_bench.files import sha256_of, write_bytes
from mobile_bench.jobs import FOLLOW_PARENT, OnProgress, follow, outcome
from mobile_bench.records import Connection
from mobile_bench.transports.ssh_install import Installer, flat
from mobile_bench.transports.ssh_login import ANSWER_S, CONNECT_S, Login, failures

if TYPE_CHECKING:
    import paramiko

#: What pyproject.toml asks for; -P and hashlib.file_digest are the features that the worker needs it for.
PYTHON = (3, 11)
#: The folder goes only after the worker, which may be busy writing as it ends.
_GUARD = """
trap '' HUP INT TERM PIPE
cd -- {folder} && work=$(umask 077; mktemp -d "$PWD/mobile-bench-XXXXXXXX") || exit 3
printf '<folder>%s</folder>\\n' "$work"
cat >/dev/null
cd /
for try in 1 2 3 4 5; do rm -rf -- "$work" && exit 0; sleep 1; done
exit 4
"""
_FULL_KIB = 16
_NO_SPACE = ("No space left", "Disk quota exceeded")


class Ssh:
    """A session with one device."""

    def __init__(self, connection: Connection):
        self._connection, self._login = connection, Login(connection)
        self.place, self._name = self._login.place, self._login.name
        self._client: paramiko.SSHClient | None = None
        self._guard: paramiko.Channel | None = None

    def __enter__(self) -> Ssh:
        self._jobs, self._uploaded = 0, {}
        self._python = _remote_path(self._connection.python)
        self._installer = Installer(self._shell, self._line, self._name, self._connection.python)
        try:
            self._client = self._login.connect()
            self._make_folder()
            self._check_python()
            self._open_sftp()
            self._push_package()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        guard, client, self._guard, self._client = self._guard, self._client, None, None
        try:
            if guard:
                with contextlib.suppress(*failures()):
                    guard.shutdown_write()
                    guard.status_event.wait(ANSWER_S)
        finally:
            if client:
                client.close()

    def run(
        self, module: str, job: dict, *, files: Mapping[str, Path], outputs: Mapping[str, Path] | None = None,
        on_progress: OnProgress | None = None, timeout_s: float | None = None, finish_s: float = 0.0,
    ) -> dict:  # fmt: skip
        self._installer.runtime(job.get("runtime", "auto"), on_progress)
        for module_there, requirement in job.get("requires", {}).items():
            self._installer.module(module_there, requirement, on_progress)
        here = {key: Path(path).resolve() for key, path in {**files, **(outputs or {})}.items()}
        self._jobs += 1
        name = f"job{self._jobs}"
        there = {key: self._upload(here[key]) for key in files}
        there |= {key: f"{self._folder}/{name}-{_plain(here[key].name)}" for key in outputs or {}}
        self._put(io.BytesIO(json.dumps({**job, **there}, allow_nan=False).encode()), f"{self._folder}/{name}.json")
        final, exit_code, verdict = self._execute(module, name, on_progress, timeout_s, finish_s)
        if final and final["kind"] == "error":
            # The person knows the file by the name that it has here.
            final |= {k: _translate(v, there, here) for k, v in final.items() if isinstance(v, str)}
        try:
            result = outcome(
                final, exit_code, process=f"The measuring process on {self._name}", verdict=verdict,
                log=lambda: self._read_log(name),
                next_step="If it crashed, the runtime cannot bear this file: convert it again or try another one",
            )  # fmt: skip
        except JobFailed as failure:
            # A full disk may have taken the log with it, so its free space is asked for too.
            free = self._free_kib()
            if any(words in str(failure) for words in _NO_SPACE) or (free is not None and free < _FULL_KIB):
                raise self._no_space(f"{failure.received or failure.what}; {free} KiB free") from failure
            raise
        for key in outputs or {}:
            self._download(there[key], here[key])
        return result

    def _make_folder(self) -> None:
        parent = self._connection.folder
        with self._answering():
            self._guard = guard = self._open(
                _GUARD.format(folder=_remote_path(parent) if parent else '"${TMPDIR:-/tmp}"')
            )
            said = b""
            while b"</folder>\n" not in said and (part := guard.recv(4096)):
                said += part
        text = said.decode(errors="surrogateescape")
        found = re.search(r"<folder>(/.*)</folder>\n", text, re.DOTALL)
        if not found:
            raise TransportError(
                f"No work folder can be made on {self._name}", received=f"{parent or 'the default'} ({flat(text)})",
                next_step="Name a folder there that can be written (folder)",
            )  # fmt: skip
        self._folder = found[1]

    def _check_python(self) -> None:
        code, said = self._shell(
            f"exec {self._python} -c " + shlex.quote("import sys; print('\\nPython %d.%d' % sys.version_info[:2])")
        )
        found = re.search(r"^Python (\d+)\.(\d+)$", said, re.MULTILINE)
        if code or not found:
            raise TransportError(
                f"Python cannot be started on {self._name}", received=f"{self._connection.python} ({flat(said)})",
                next_step="Install Python 3.11 or newer there, or name its path (python)",
            )  # fmt: skip
        if (int(found[1]), int(found[2])) < PYTHON:
            raise TransportError(
                f"The Python on {self._name} is too old", received=f"{self._connection.python} is {found[0]}",
                allowed=f"Python {PYTHON[0]}.{PYTHON[1]} or newer",
                next_step="Install a newer one there and name its path (python)",
            )  # fmt: skip

    def _open_sftp(self) -> None:
        try:
            self._sftp = self._client.open_sftp()
        except failures() as error:
            self._check_alive(error)
            raise TransportError(
                f"{self._name} does not offer SFTP", received=str(error) or type(error).__name__,
                next_step="Turn on the sftp subsystem of its SSH server, or install one that has it: openssh-server",
            ) from error  # fmt: skip
        self._sftp.get_channel().settimeout(ANSWER_S)

    def _push_package(self) -> None:
        self._put(io.BytesIO(_package()), f"{self._folder}/package.zip")
        self._module("zipfile", "-e", "package.zip", "package")

    def _upload(self, path: Path) -> str:
        """Put a file there, once a session."""
        digest = sha256_of(path)
        if digest not in self._uploaded:
            place = f"{self._folder}/{digest[:16]}-{_plain(path.name)}"
            with open(path, "rb") as content:
                self._put(content, place)
            self._uploaded[digest] = place
        return self._uploaded[digest]

    def _put(self, content: io.BufferedIOBase, place: str) -> None:
        try:
            self._sftp.putfo(content, place)
        except failures() as error:
            self._check_alive(error)
            raise self._no_space(f"{error}; {self._free_kib()} KiB free") from error

    def _download(self, place: str, path: Path) -> None:
        try:
            with self._sftp.open(place, "rb") as remote:
                remote.prefetch()
                content = remote.read()
            self._sftp.remove(place)
        except FileNotFoundError as error:
            raise JobFailed(f"The measuring process on {self._name} did not write {path.name}") from error
        except failures() as error:
            raise self._lost(error) from error
        write_bytes(path, content)

    def _execute(
        self, module: str, name: str, on_progress: OnProgress | None, timeout_s: float | None, finish_s: float
    ) -> tuple[dict | None, int, str]:
        """Run one job; the final message, the exit code as subprocess has it, and the limit that was passed."""
        line = self._line("-m", module, f"{name}.json", FOLLOW_PARENT)
        # The outer shell lives on to tell which signal ended the inner one, which becomes Python.
        inner = shlex.quote(f"echo $$ >{name}.pid; exec {line} 2>{name}.log")
        with self._answering():
            channel = self._open(f"cd -- {shlex.quote(self._folder)} || exit; sh -c {inner}; exit $?")
            channel.settimeout(None)
        verdict = []

        def expire() -> None:
            verdict.append(f"took longer than its limit of {timeout_s:g} s")
            self._kill(channel, name)

        timer = threading.Timer(timeout_s, expire) if timeout_s else None
        try:
            if timer:
                timer.daemon = True
                timer.start()
            try:
                final = follow(self._lines(channel), on_progress)
            except KeyboardInterrupt:
                if finish_s and (kept := self._finish(channel, name, finish_s)):
                    raise Interrupted(kept) from None
                raise
            code = channel.exit_status if channel.status_event.wait(ANSWER_S) else -1
        finally:
            if timer:
                timer.cancel()
            if not channel.exit_status_ready():
                self._kill(channel, name)
            channel.close()
        if code == -1 and not verdict:
            self._check_alive(None)
            return None, -9, ""
        return final, 128 - code if code > 128 else code, "".join(verdict)

    def _lines(self, channel: paramiko.Channel) -> Iterator[bytes]:
        with channel.makefile("rb") as output:
            while True:
                with self._answering():
                    line = output.readline()
                if not line:
                    return
                yield line

    def _finish(self, channel: paramiko.Channel, name: str, finish_s: float) -> dict | None:
        """What a job gives when it is interrupted and has so long to end; None where it gives no result."""
        self._shell(f"kill -INT $(cat {name}.pid)", timeout_s=CONNECT_S, check=False)
        timer = threading.Timer(finish_s, self._kill, (channel, name))
        timer.start()
        try:
            final = follow(self._lines(channel))
        finally:
            timer.cancel()
        return final["value"] if final and final["kind"] == "result" else None

    def _kill(self, channel: paramiko.Channel, name: str) -> None:
        """End a job: at once by its process id, and should it only be starting, by closing its standard input."""
        with contextlib.suppress(TransportError):
            self._shell(f"kill -9 $(cat {name}.pid)", timeout_s=CONNECT_S, check=False)
        with contextlib.suppress(*failures()):
            channel.shutdown_write()

    def _read_log(self, name: str) -> str:
        return self._shell(f"tail -c 4000 {name}.log")[1]

    def _line(self, *arguments: str) -> str:
        """A command line for the Python there, in the work folder.

        Relative paths: a colon in the folder's own path would split PYTHONPATH. -P keeps the folder itself out.
        """
        return (
            'env PYTHONPATH="package:runtime${PYTHONPATH:+:$PYTHONPATH}" TMPDIR="$PWD" '
            f"{self._python} -P {shlex.join(arguments)}"
        )

    def _module(self, *arguments: str) -> None:
        code, said = self._shell(self._line("-m", *arguments))
        if code:
            raise TransportError(f"A command failed on {self._name}", received=f"{arguments[0]}: {flat(said)}")

    def _shell(self, script: str, *, timeout_s: float = ANSWER_S, check: bool = True) -> tuple[int, str]:
        """Run a script in the work folder; its exit code and all that it printed.

        check: a full disk is raised as TransportError.
        """
        with self._answering():
            channel = self._open(f"cd -- {shlex.quote(self._folder)} || exit\n{script}", timeout_s)
            try:
                channel.set_combine_stderr(True)
                channel.shutdown_write()
                said = channel.makefile("rb").read().decode(errors="replace")
                code = channel.exit_status if channel.status_event.wait(timeout_s) else -1
            finally:
                channel.close()
            if code == -1 and not self._client.get_transport().is_active():
                raise EOFError
        if check and code and any(words in said for words in _NO_SPACE):
            raise self._no_space(flat(said))
        return code, said

    def _open(self, script: str, timeout_s: float = ANSWER_S) -> paramiko.Channel:
        """Start a shell script there, whatever the user's own shell is."""
        channel = self._client.get_transport().open_session(timeout=timeout_s)
        channel.settimeout(timeout_s)
        channel.exec_command("exec sh -c " + shlex.quote(script))
        return channel

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except failures() as error:
            raise self._lost(error) from error

    def _check_alive(self, cause: Exception | None) -> None:
        """Raise TransportError where the connection is lost."""
        try:
            self._shell(":", timeout_s=CONNECT_S, check=False)
        except TransportError as lost:
            raise lost from cause

    def _lost(self, error: Exception) -> TransportError:
        return TransportError(
            f"The connection to {self._name} was lost", received=str(error) or type(error).__name__,
            next_step="Check its power and network and try again",
        )  # fmt: skip

    def _no_space(self, detail: object) -> TransportError:
        return TransportError(
            f"A file cannot be written on {self._name}", received=f"{self._folder} ({detail})",
            next_step="Free some space there or choose another folder (folder)",
        )  # fmt: skip

    def _free_kib(self) -> int | None:
        words = self._shell("df -Pk . | tail -n 1", check=False)[1].split()
        return int(words[3]) if len(words) > 3 and words[3].isdigit() else None


def _package() -> bytes:
    """This package's modules as a zip."""
    root, content = Path(mobile_bench.__file__).parent, io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*.py")):
            archive.write(path, Path("mobile_bench", path.relative_to(root)).as_posix())
    return content.getvalue()


def _remote_path(path: str) -> str:
    """A path there for its shell. ~/x and a relative path with a folder begin at the user's home."""
    if path.startswith("~/"):
        return '"$HOME"/' + shlex.quote(path[2:])
    if "/" in path and not path.startswith("/"):
        return '"$HOME"/' + shlex.quote(path)
    return shlex.quote(path)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[-80:]


def _translate(text: str, there: Mapping[str, str], here: Mapping[str, Path]) -> str:
    for key, place in there.items():
        text = text.replace(place, str(here[key]))
    return text
