"""What a job needs on a board and the board lacks: installed with pip into the session's own folder, or said."""

from __future__ import annotations

from collections.abc import Callable

from mobile_bench.errors import TransportError
from mobile_bench.interpreter import RUNTIMES
from mobile_bench.jobs import OnProgress

INSTALL_S = 1800
_REQUIREMENTS = {
    "ai-edge-litert": ("ai-edge-litert>=2.3,<3",),
    "tflite-runtime": ("tflite-runtime>=2.14,<3", "numpy<2"),
}


class Installer:
    """shell: runs a script in the session's folder and gives its exit code and text. line: a command line of the
    board's Python, which finds what was installed. name, python: the board and its Python, for people."""

    def __init__(self, shell: Callable[..., tuple[int, str]], line: Callable[..., str], name: str, python: str):
        self._shell, self._line, self._name, self._python = shell, line, name, python
        self._there: set[str] = set()

    def runtime(self, wanted: str, on_progress: OnProgress | None) -> None:
        """Make sure that a TFLite runtime ('auto' or its name) can be imported there."""
        if wanted in self._there:
            return
        probe = f"import numpy; from mobile_bench.interpreter import load_runtime; load_runtime({wanted!r})"
        code, said = self._shell(self._line("-c", probe), check=False)
        tries = []
        for candidate in RUNTIMES if wanted == "auto" else (wanted,):
            if code == 0:
                break
            self._say(f"no TFLite runtime for {self._python}: installing {candidate}", on_progress)
            code, said = self._install(*_REQUIREMENTS[candidate])
            if code == 0:
                code, said = self._shell(self._line("-c", probe))
            tries.append(f"{candidate}: {flat(said)}")
        if code:
            raise TransportError(
                f"There is no TFLite runtime on {self._name}, and none can be installed", received="; ".join(tries),
                next_step=f"Install one there by hand: {self._python} -m pip install ai-edge-litert (or "
                "tflite-runtime 'numpy<2' for a Python below 3.12)",
            )  # fmt: skip
        self._there.add(wanted)

    def module(self, name: str, requirement: str, on_progress: OnProgress | None) -> None:
        """Make sure that a module can be imported there. requirement: what pip knows it by."""
        if name in self._there:
            return
        code, _ = self._shell(self._line("-c", f"import {name}"), check=False)
        if code:
            self._say(f"no {name} for {self._python}: installing {requirement}", on_progress)
            code, said = self._install(requirement)
            if code == 0:
                code, said = self._shell(self._line("-c", f"import {name}"))
            if code:
                raise TransportError(
                    f"{self._name} lacks the module {name}, and it cannot be installed", received=flat(said),
                    next_step=f"Install it there by hand: {self._python} -m pip install '{requirement}'",
                )  # fmt: skip
        self._there.add(name)

    def _say(self, what: str, on_progress: OnProgress | None) -> None:
        if on_progress:
            on_progress({"kind": "log", "text": f"{self._name} has {what} into the work folder"})

    def _install(self, *requirements: str) -> tuple[int, str]:
        return self._shell(
            self._line(
                "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-cache-dir",
                "--upgrade", "--target", "runtime", *requirements,
            ),
            timeout_s=INSTALL_S,
        )  # fmt: skip


def flat(text: str) -> str:
    """The end of what a command printed, in one line."""
    return " | ".join(line for line in text.splitlines() if line.strip())[-600:] or "no answer"
