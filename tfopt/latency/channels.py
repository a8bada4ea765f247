"""Which channels go so that a network keeps a budget of milliseconds: a latency table and scores make a choice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfopt.channels import choose as channels
from tfopt.channels.dependencies import Dependencies
from tfopt.channels.importance import comparable
from tfopt.errors import InputError, ModelRefused
from tfopt.latency.budget import Choice, Search
from tfopt.latency.fill import file_of, measure, model_key
from tfopt.latency.micro import Place
from tfopt.latency.parts import Anatomy, anatomy
from tfopt.latency.predict import Cost, Latency
from tfopt.latency.table import Setting, Table, load


@dataclass(frozen=True)
class Wanted:
    """What a recipe asks for: `latency`, a fraction of what the model takes, or `milliseconds`.

    table: the path of one that is measured, or '' to measure it. target, scheme, threads: where it is measured, or
    what the table must be of; '' and 0 where it is not said: local, float32 and 1, or the table's own.
    """

    latency: float | None = None
    milliseconds: float | None = None
    table: str = ""
    target: str = ""
    scheme: str = ""
    threads: int = 0

    def setting(self, known: Setting) -> Setting:
        return Setting(self.target or known.target, self.scheme or known.scheme, self.threads or known.threads)

    def place(self) -> Place:
        return Place(self.target or "local", self.scheme or "float32", self.threads or 1)


class Budget:
    """The way from a model to its budget, in rounds. found: of the model that the way begins with."""

    def __init__(self, wanted: Wanted, found: Dependencies, table: Table, first: Anatomy | None = None):
        self._first = first or anatomy(found)
        self.table = table
        self.before_ms = Latency(self._first, table).of(self._first.groups)
        self.goal_ms = wanted.milliseconds or (wanted.latency or 1.0) * self.before_ms
        if self.goal_ms >= self.before_ms:
            raise ModelRefused(
                "The model keeps the budget as it is", received=f"{self.goal_ms:.4g} ms",
                allowed=f"below {self.before_ms:.4g} ms", next_step="Ask for less, or leave this step out",
            )  # fmt: skip

    def choose(self, found: Dependencies, scores: np.ndarray, share: float, *, kind: str, multiple: int) -> list[int]:
        """The units that go in a round after which that share of the way is gone. Raises ModelRefused where it
        cannot be gone, with the least that can be reached."""
        cost = Latency(found, self.table, self._first)
        budget = self.before_ms * (self.goal_ms / self.before_ms) ** share
        choice = search(found, scores, cost, kind=kind, multiple=multiple).within(budget)
        return channels.by_counts(found, scores, choice.counts)

    def facts(self, after: Dependencies) -> dict:
        """For the report: predicted milliseconds before and after, the budget, and what the table is of."""
        after_ms = Latency(after, self.table, self._first)
        setting = self.table.setting
        return {
            "target": setting.target, "scheme": setting.scheme, "threads": setting.threads,
            "measured_ms": round(self.table.whole_ms, 6), "budget_ms": round(self.goal_ms, 6),
            "predicted_ms": round(after_ms.of(after_ms.groups), 6),
            "table_of": self.table.created_at, "table_ratio": round(self.table.ratio, 3),
        }  # fmt: skip


def search(found: Dependencies, scores: np.ndarray, cost: Cost, *, kind: str = "l1", multiple: int = 8) -> Search:
    """The choices of a network. kind: the importance that the scores are of, for one scale over all groups."""
    values = comparable(found, scores, kind)
    options = [channels.allowed(group, multiple) for group in found.groups]
    lost = [channels.losses(group, values, counts) for group, counts in zip(found.groups, options)]
    return Search(cost, options, lost)


def removed(found: Dependencies, scores: np.ndarray, choice: Choice) -> list[int]:
    """The units that a choice takes off."""
    return channels.by_counts(found, scores, choice.counts)


def table_for(
    wanted: Wanted, found: Dependencies, spec, progress: Callable[[int, int, dict], None] | None = None
) -> tuple[Table, Anatomy]:
    """The table that a recipe names, or one that is measured now or was before. Refuses one that does not hold."""
    first = anatomy(found)
    if wanted.table:
        table = load(wanted.table)
        check(table, first, wanted.setting(table.setting))
        return table, first
    from tfopt.data.cache import cache_folder

    place = wanted.place()
    setting = Setting(place.target, place.scheme, place.threads)
    name = hashlib.sha256(f"{model_key(first)} {setting}".encode()).hexdigest()[:16]
    path = cache_folder() / "latency" / f"{name}.json"
    if path.is_file():
        try:
            table = load(path)
            check(table, first, setting)
            return table, first
        except InputError:
            pass  # the machine or its runtime has changed since, so it is measured anew
    path.parent.mkdir(parents=True, exist_ok=True)
    table = measure(
        first, file_of(found.model, spec, place.scheme), found.model.name, place, path, on_progress=progress
    )
    return table, first


def check(table: Table, first: Anatomy, setting: Setting | None) -> None:
    """Raise InputError where a table does not hold for this model, setting and, if it is of this machine, machine."""
    table.check([part.family for part in first.parts], setting, here() if table.setting.target == "local" else None)
    if table.model_key != model_key(first):
        raise InputError(
            "The latency table is of another model", received=f"{table.model}, measured {table.created_at}",
            allowed="one with the same layers and channels", next_step="Measure this one: tfopt latency MODEL",
        )  # fmt: skip


def here() -> dict:
    """The facts that tell this machine and its runtime from others."""
    import importlib.metadata

    from mobile_bench import device

    facts = {name: value for name, value in device.describe().items() if name in ("cpu", "machine", "board")}
    try:
        version = importlib.metadata.version("ai-edge-litert")
    except importlib.metadata.PackageNotFoundError:
        return facts
    return {**facts, "runtime": "ai-edge-litert", "runtime_version": version}


def is_current(path: Path, first: Anatomy, setting: Setting) -> Table | None:
    """The finished table at a path where it holds for this model, setting and machine; None where there is none.

    Raises InputError for another file or a table that does not hold.
    """
    if not path.exists():
        return None
    table = load(path)
    check(table, first, setting)
    return table
