"""Ctrl-C and its like, made sure of: an interrupt that falls where Python or a C library loses it is not lost.

A signal's handler raises KeyboardInterrupt in whatever code runs. In a destructor Python prints it and goes on; a C
library may turn it into an error of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

_AGAIN_SECONDS = 0.05
_asked = threading.Event()


def listen() -> None:
    """Make SIGINT, SIGTERM (kill) and SIGHUP (a closed terminal) interrupts, where they are not ignored already."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.unraisablehook = _again


def asked() -> bool:
    """Whether an interrupt has come: an error that follows may be what became of it."""
    return _asked.is_set()


def _interrupt(*_) -> None:
    _asked.set()
    raise KeyboardInterrupt


def _again(unraisable) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)
