"""What a network costs on a target once its groups keep so many channels each, by a latency table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tfopt.channels.dependencies import Dependencies
from tfopt.latency.anchor import factors
from tfopt.latency.parts import Anatomy, Part, anatomy
from tfopt.latency.table import Table


class Cost(Protocol):
    """The cost of a whole network, a sum of terms each of which sees a few groups."""

    groups: tuple[int, ...]

    def of(self, counts: Sequence[int]) -> float: ...

    def seeing(self, group: int, counts: Sequence[int]) -> float: ...


class Latency:
    """Milliseconds by a table: kernels by their cells, other operations by the values that they read and write.

    of(counts): the whole network where group g keeps counts[g] units. seeing(g, counts): of that, what depends on
    counts[g]. The model that the table was measured with takes what was measured: its kernels are scaled to that all by
    one factor, or where `anchored` each by its own from the profile (tfopt.latency.anchor), which foretold no better in
    benchmarks/latency_tables.py.
    """

    def __init__(
        self, found: Dependencies | Anatomy, table: Table, first: Anatomy | None = None, *, anchored: bool = False
    ):
        """first: the model that the table was measured with, where this one is already narrower."""
        self._anatomy = own = found if isinstance(found, Anatomy) else anatomy(found)
        first = first or own
        self.groups = own.groups
        self._table, self._known = table, {}
        alone = [self._alone(part, first.groups) for part in first.parts]
        layers = table.profiled if anchored else {}
        self._factors = dict(
            zip(
                [(part.layer, part.family) for part in first.parts],
                factors(first.parts, alone, layers, table.whole_ms - table.rest_ms),
            )
        )
        values = first.values(first.groups)
        self._per_value = table.rest_ms / values if values else 0.0
        # What no other operation takes is there whatever becomes of the channels.
        self._fixed = 0.0 if values else table.rest_ms
        self._parts_of = [[p for p in own.parts if _sees(g, p.read, p.made)] for g in range(len(own.groups))]
        self._others_of = [[o for o in own.others if _sees(g, o.channels)] for g in range(len(own.groups))]

    def of(self, counts: Sequence[int]) -> float:
        return self._fixed + self._sum(self._anatomy.parts, self._anatomy.others, counts)

    def seeing(self, group: int, counts: Sequence[int]) -> float:
        return self._sum(self._parts_of[group], self._others_of[group], counts)

    def layers(self, counts: Sequence[int]) -> dict[str, float]:
        """layer -> milliseconds of its kernel."""
        found: dict[str, float] = {}
        for part in self._anatomy.parts:
            found[part.layer] = found.get(part.layer, 0.0) + self._sum([part], [], counts)
        return found

    def _alone(self, part: Part, counts) -> float:
        key = part.family, max(1, part.read.of(counts)), part.made and max(1, part.made.of(counts))
        if key not in self._known:
            self._known[key] = self._table.families[key[0]].ms(key[1], key[2])
        return self._known[key]

    def _sum(self, parts, others, counts) -> float:
        total = sum(self._factors[part.layer, part.family] * self._alone(part, counts) for part in parts)
        return total + self._per_value * sum(other.values * other.channels.of(counts) for other in others)


class Macs:
    """The same face for multiply-accumulates, which depend on the numbers of channels as `found`'s kernels say."""

    def __init__(self, found: Dependencies):
        from tfopt.latency.parts import macs_of

        self._anatomy = anatomy(found)
        self.groups = self._anatomy.groups
        self._macs = macs_of
        self._parts_of = [[p for p in self._anatomy.parts if _sees(g, p.read, p.made)] for g in range(len(self.groups))]
        self._known: dict[tuple, float] = {}

    def of(self, counts: Sequence[int]) -> float:
        return self._sum(self._anatomy.parts, counts)

    def seeing(self, group: int, counts: Sequence[int]) -> float:
        return self._sum(self._parts_of[group], counts)

    def _sum(self, parts, counts) -> float:
        total = 0.0
        for part in parts:
            key = part.family, part.read.of(counts), part.made and part.made.of(counts)
            if key not in self._known:
                self._known[key] = self._macs(*key)
            total += self._known[key]
        return total


def _sees(group: int, *counts) -> bool:
    return any(count is not None and group in count.units for count in counts)
