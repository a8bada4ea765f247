"""What the commands share: the terminal, its bars and notes, and how options are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from tfopt.plan import OnEvent

console = Console(stderr=True)  # looks up sys.stderr at each use


def load_data(place: str):
    from tfopt import data

    with console.status(f"reading {place}"):
        return data.load(place)


def training_changes(items: list[str] | None) -> dict[str, dict]:
    """['steps=100', 'prune.steps=50'] to {'*': {'steps': 100}, 'prune': {'steps': 50}}."""
    from tfopt.errors import InputError, unknown_name
    from tfopt.technique import techniques

    changes: dict[str, dict] = {}
    for item in items or []:
        for part in item.split(","):
            key, equals, value = part.strip().partition("=")
            technique, dot, name = key.rpartition(".")
            if not equals or not name:
                raise InputError(
                    "A training setting is not KEY=VALUE", received=repr(part), allowed="steps=200, prune.steps=100"
                )
            if dot and technique not in techniques():
                raise unknown_name("technique", technique, techniques())
            if dot and name != "train" and name in techniques()[technique].__dataclass_fields__:
                raise InputError(
                    f"{name} is a setting of {technique} itself, and --train changes how it is trained", received=part,
                    next_step=f"Write a recipe with '- {technique}: {{{name}: {value}}}', and name its file",
                )  # fmt: skip
            changes.setdefault(technique or "*", {})[name] = _value(value)
    return changes


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def note(text: str) -> None:
    console.print(f"  {text}", style="dim", highlight=False)


@contextmanager
def watching() -> Iterator[OnEvent]:
    """A study's progress on the terminal."""
    from tfopt.progress import StudyProgress

    with StudyProgress(console) as progress:
        yield progress.on_event


@contextmanager
def bar(label: str) -> Iterator:
    """One bar: what is given is called with (done, total, facts)."""
    from tfopt.plan import Event
    from tfopt.progress import StudyProgress

    with StudyProgress(console) as progress:
        yield lambda done, total, facts: progress.on_event(Event("step", "", label, done, total, facts=facts))


@contextmanager
def kept_when_interrupted(out: Path) -> Iterator[None]:
    """Say, where Ctrl-C ends a study, what is there."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"{out} keeps what is finished, each step by itself; the same command goes on from there")
        raise
