"""Child processes: one protocol for everything that may crash, leak or must start fresh.

The parent writes job.json and starts `python -m MODULE job.json`. The child prints one JSON object a
line on its standard output, each with a `kind`: 'progress' and 'log' as often as it likes, then
exactly one 'result' or 'error'. Artifacts are passed by path. Whatever a library prints goes to the
log beside job.json, never into the protocol.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from mobile_bench.errors import Interrupted, JobFailed, Problem
from mobile_bench.files import write_bytes

OnProgress = Callable[[dict], None]
#: With this argument a child ends when its standard input closes.
FOLLOW_PARENT = "--end-with-parent"
#: What TensorFlow says of itself at each start.
_CHATTER = re.compile(
    r"WARNING: All log messages before absl|I\d{4} |E\d{4} .*cuInit|To enable the following instructions"
)
_LOG_LINES, _LOG_CHARACTERS = 8, 1500


def run_job(
    module: str, job: dict, folder: Path, *, on_progress: OnProgress | None = None, timeout_s: float | None = None,
    memory_bytes: int | None = None, environment: dict[str, str] | None = None, finish_s: float = 0.0,
) -> dict:  # fmt: skip
    """Run `module` in a fresh process and return its result.

    folder: where job.json and the log are put; it stays. timeout_s and memory_bytes (resident, Linux
    only) end the child when passed. A Problem that the child raised is raised here again; a crash, a
    signal or a limit becomes JobFailed with the last lines of the log. An interrupt here ends the child,
    and so does the end of this process, however it comes. finish_s: for a child that ends early when it gets
    SIGINT: the first interrupt is passed on to it, and is raised as Interrupted with the result that it gives
    within that time.
    """
    folder = Path(folder)
    job_file, log_file = folder / "job.json", folder / "log.txt"
    write_job(job_file, {key: _named_in_text(value, folder / f"{key}.link") for key, value in job.items()})
    with open(log_file, "wb") as log:
        try:
            child = subprocess.Popen(
                # -P: a file in the current folder that is named like a library is not imported for it.
                [sys.executable, "-P", "-m", module, str(job_file), FOLLOW_PARENT],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, "PYTHONPATH": _python_path(), **(environment or {})},
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise JobFailed(f"The child process {module} cannot be started", received=error.strerror) from error
    guard = _Guard(child, timeout_s, memory_bytes)
    try:
        final = follow(child.stdout, on_progress)
        child.wait()
    except KeyboardInterrupt:
        kept = _finish(child, finish_s) if finish_s else None
        if kept is None:
            raise
        raise Interrupted(kept) from None
    finally:
        guard.stop()
        _end(child)
    return outcome(
        final, child.returncode, process=f"The child process {module}", verdict=guard.verdict,
        log=lambda: log_file.read_text(errors="replace"), next_step=f"The whole log is {log_file}",
    )  # fmt: skip


def write_job(path: Path, job: dict) -> None:
    """In ASCII, which keeps a file's name that is not UTF-8 as it is."""
    write_bytes(path, json.dumps(job, allow_nan=False).encode())


def _named_in_text(value: object, link: Path) -> object:
    """A file's path, or a link to it where its name is not UTF-8, which no runtime takes; other values as they are."""
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        if os.path.isfile(value):
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.abspath(value))
            return str(link)
    return value


def _finish(child: subprocess.Popen, finish_s: float) -> dict | None:
    """What the child gives when it is interrupted and has so long to end; None where it gives no result."""
    child.send_signal(signal.SIGINT)
    timer = threading.Timer(finish_s, _kill, (child,))
    timer.start()
    try:
        final = follow(child.stdout)
    finally:
        timer.cancel()
    return final["value"] if final and final["kind"] == "result" else None


def follow(lines: Iterable[bytes], on_progress: OnProgress | None = None) -> dict | None:
    """Relay a child's messages until its output ends; its 'result' or 'error', None where it sent neither."""
    final = None
    for line in lines:
        try:
            message = json.loads(line)
        except ValueError:
            continue  # a line cut short by a crash; the exit status tells the rest
        if not isinstance(message, dict):
            continue  # something printed before the child took over its standard output
        if message.get("kind") in ("result", "error"):
            final = message
        elif on_progress:
            on_progress(message)
    return final


def outcome(
    final: dict | None, exit_code: int, *, process: str, verdict: str, log: Callable[[], str], next_step: str
) -> dict:
    """The result of a child that has ended, or the Problem that it raised, or JobFailed.

    process begins the sentence of a JobFailed. verdict: which limit the child was ended for, or ''. log gives
    what it wrote to its standard error. exit_code is negative for a signal, as in subprocess.
    """
    if final and final["kind"] == "result" and exit_code == 0:
        return final["value"]
    if final and final["kind"] == "error":
        raise _rebuild(final)
    raise JobFailed(f"{process} {verdict or _exit_text(exit_code)}", received=_tail(log()), next_step=next_step)


def serve(main: Callable[[dict, Callable[..., None]], dict]) -> None:
    """The child's side: `main(job, emit)` returns the result; emit(kind='progress', …) reports on the way."""
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native libraries print to standard output belongs in the log

    def emit(kind: str = "progress", **facts) -> None:
        protocol.write(json.dumps({"kind": kind, **facts}, allow_nan=False) + "\n")
        protocol.flush()

    if FOLLOW_PARENT in sys.argv[2:]:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        emit("result", value=main(job, emit))
    except Problem as problem:
        _emit_error(emit, problem)
        sys.exit(problem.exit_code)
    except Exception as error:  # noqa: BLE001 - whatever it was, the parent gets one sentence, the log all of it
        traceback.print_exc()
        _emit_error(emit, JobFailed(f"The child process failed with {type(error).__name__}", received=error))
        sys.exit(1)


def _emit_error(emit: Callable[..., None], problem: Problem) -> None:
    fields = {name: _text(getattr(problem, name)) for name in ("what", "received", "allowed", "next_step")}
    emit("error", type=type(problem).__name__, module=type(problem).__module__, **fields)


def _end_with_parent() -> None:
    """Wait, at no cost, for the parent's end of standard input to close; then end with all that we started."""
    while os.read(0, 64):
        pass
    os.killpg(0, signal.SIGKILL)


def _rebuild(message: dict) -> Problem:
    try:
        kind = getattr(importlib.import_module(message["module"]), message["type"])
    except (ImportError, AttributeError):
        kind = JobFailed
    return kind(
        message["what"], received=message["received"], allowed=message["allowed"], next_step=message["next_step"]
    )


class _Guard:
    """Watches a child's time and memory from a thread; `verdict` says which limit it passed."""

    def __init__(self, child: subprocess.Popen, timeout_s: float | None, memory_bytes: int | None):
        self.verdict = ""
        self._done = threading.Event()
        self._child, self._timeout_s, self._memory_bytes = child, timeout_s, memory_bytes
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if timeout_s or memory_bytes:
            self._thread.start()

    def _watch(self) -> None:
        started = time.monotonic()
        while not self._done.wait(0.1):
            if self._timeout_s and time.monotonic() - started > self._timeout_s:
                self.verdict = f"took longer than its limit of {self._timeout_s:g} s"
            elif self._memory_bytes and _resident_bytes(self._child.pid) > self._memory_bytes:
                self.verdict = f"took more memory than its limit of {self._memory_bytes / 2**20:.0f} MiB"
            if self.verdict:
                _kill(self._child)
                return

    def stop(self) -> None:
        self._done.set()


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        _kill(child)
    child.stdout.close()
    child.stdin.close()
    child.wait()


def _kill(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _exit_text(code: int) -> str:
    if code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with exit code {code} and no result"


def _tail(log: str) -> str | None:
    lines = [line for line in log.splitlines() if line.strip() and not _CHATTER.match(line)]
    return " | ".join(lines[-_LOG_LINES:])[-_LOG_CHARACTERS:] or None


def _python_path() -> str:
    """The child finds the same packages, whether installed or run from a checkout.

    An installed copy is found anyway, and its folder in front would let site-packages shadow the
    standard library.
    """
    here = str(Path(__file__).resolve().parents[1])
    installed = here in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(filter(None, [*([] if installed else [here]), *known]))


def _text(value: object) -> str | None:
    return None if value is None else str(value)
