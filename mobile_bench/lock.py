"""One measurement at a time on a machine: two would slow each other down and neither be true."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobile_bench.errors import InputError, Problem
from mobile_bench.jobs import OnProgress


@contextmanager
def held(path: Path, refusal: Problem) -> Iterator[None]:
    """Hold the lock file `path` for the block; raises `refusal` at once where another process holds it.

    The system frees it when the process ends, however it ends. Where files cannot be locked, nothing is.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        yield


@contextmanager
def one_at_a_time(place: str, *, wait_s: float, on_progress: OnProgress | None = None) -> Iterator[None]:
    """Hold the lock of `place` ('local', or a device's name) for the block, waiting for it up to wait_s.

    The system frees it when the process ends, however it ends. Where files cannot be locked, nothing is.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = lock_path(place)
    with open(path, "a+") as file:
        started, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = path.read_text().strip() or "unknown"
                if time.monotonic() - started >= wait_s:
                    raise InputError(
                        f"Another measurement is still under way on {place}",
                        received=f"process {holder}, after waiting {wait_s:g} s",
                        next_step="Wait for it to end, or end it",
                    ) from None
                if not told and on_progress:
                    text = f"Waiting for the measurement on {place} by process {holder} to end: one at a time is true"
                    on_progress({"kind": "log", "text": text})
                told = True
                time.sleep(0.2)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def lock_path(place: str) -> Path:
    """The lock file of a place, in the user's cache folder, or the temporary one where that is closed."""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in place) + ".lock"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "mobile-bench"
    for folder in (cache, Path(tempfile.gettempdir()) / f"mobile-bench-{_user()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "a"):
                return folder / name
        except OSError:
            continue
    raise InputError("No folder for the measurement lock can be written", received=cache)


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"
