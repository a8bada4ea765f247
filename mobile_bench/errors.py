"""Every error that is meant for a person.

Problem                     something a person can put right; exit code 2
├── InputError              a file, flag or value that cannot be used
├── DataError               images or labels that cannot be read
├── ModelRefused            a runtime or a technique will not take this model
├── TransportError          a target cannot be reached, will not let us in, or went away; exit code 1
├── DelegateError           a delegate's library is missing, or it fell back or was wrong
└── JobFailed               a child process failed, was killed or ran out of time or memory; exit code 1

tfopt.errors adds its own branches to the same tree, so that one `except Problem` at the
top of each command line is enough.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_NAMES_SHOWN = 40


class Interrupted(KeyboardInterrupt):
    """A KeyboardInterrupt that brings what was measured before it; `kept` is what the raiser's docstring says."""

    def __init__(self, kept: object):
        self.kept = kept
        super().__init__()


class Problem(Exception):
    """What failed, what was received, what is allowed and what to do next.

    Only `what` is required; each other part becomes one sentence of the message.
    """

    exit_code = 2

    def __init__(self, what: str, *, received: object = None, allowed: object = None, next_step: str | None = None):
        self.what, self.received, self.allowed, self.next_step = what, received, allowed, next_step
        super().__init__(what)

    def __str__(self) -> str:
        parts = [_sentence(self.what)]
        if self.received is not None:
            parts.append(_sentence(f"Received: {self.received}"))
        if self.allowed is not None:
            parts.append(_sentence(f"Allowed: {self.allowed}"))
        if self.next_step:
            parts.append(_sentence(self.next_step))
        return " ".join(parts)

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.received, self.allowed, self.next_step)


class InputError(Problem):
    """A file, flag or value that cannot be used."""


class DataError(Problem):
    """Images or labels that cannot be read or do not fit."""


class ModelRefused(Problem):
    """A runtime or a technique will not take this model."""


class DelegateError(Problem):
    """A delegate's library is missing, or it fell back or computed something else."""


class TransportError(Problem):
    """A target cannot be reached, will not let us in, or went away half-way."""

    exit_code = 1


class JobFailed(Problem):
    """A child process failed, was killed or ran out of time or memory."""

    exit_code = 1


def unknown_name(kind: str, name: str, known: Iterable[str], *, error: type[Problem] = InputError) -> Problem:
    """The error for a name that does not exist: the near misses, and those that do, 40 of them at most."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else None
    shown = ", ".join(known[:_NAMES_SHOWN]) + (f", … ({len(known)} in all)" if len(known) > _NAMES_SHOWN else "")
    return error(f"There is no {kind} of that name", received=repr(name), allowed=shown, next_step=hint)


def _sentence(text: str) -> str:
    text = str(text).strip()
    return text if text.endswith((".", "!", "?", ":")) else text + "."


def _rebuild(cls, what, received, allowed, next_step):
    return cls(what, received=received, allowed=allowed, next_step=next_step)
