"""How many channels each group keeps: the least importance lost within a budget of milliseconds.

A multiple-choice knapsack whose costs are coupled: a layer's time depends on the group that it reads and on the one
that it makes. Solved in three steps, each judged by the whole cost and not by its approximation:

1. min over counts of lost + λ · cost by coordinate descent, one group after the other exactly, with bisection over λ
   (Everett 1963, Generalized Lagrange Multiplier Method);
2. around the best of these, each group's costs with all others fixed make an ordinary knapsack, solved exactly and
   taken if the whole cost keeps the budget, as HALP (Shen et al. 2022, arXiv:2110.10811) linearizes; the neighbourhood
   shrinks where it does not;
3. one group or two are lowered and channels given back to where they gain most, until no such exchange gains.

Each step only ever lowers what is lost. Without coupling the second alone is exact; with it, the tests compare all
three with every combination.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tfopt.errors import InputError, ModelRefused
from tfopt.latency.knapsack import Option, choose
from tfopt.latency.predict import Cost

_HALVINGS, _SWEEPS, _ROUNDS = 30, 20, 40
_NEIGHBOURHOODS = (6, 3, 1)
_EXCHANGES, _DEEPEST, _KICKS = 200, 8, 100
_SAME = 1e-9


@dataclass(frozen=True)
class Choice:
    """counts: units that each group keeps. cost: of the whole network. lost: importance, in the scores' unit."""

    counts: tuple[int, ...]
    cost: float
    lost: float


class Search:
    """One network, one table. options: for each group the counts that it may keep, rising; lost: what each loses."""

    def __init__(self, cost: Cost, options: Sequence[Sequence[int]], lost: Sequence[Sequence[float]]):
        self._cost, self._options = cost, [list(group) for group in options]
        self._lost = [np.asarray(group, float) for group in lost]
        self._groups = range(len(self._options))

    def within(self, budget: float, *, unit: str = " ms") -> Choice:
        """The choice that loses least and costs at most `budget`. Raises ModelRefused, with the least, where there is
        none."""
        whole, least = [len(group) - 1 for group in self._options], self._least()
        if self._total(whole) <= budget:
            return self._choice(whole)
        if self._total(least) > budget:
            raise ModelRefused(
                "So little time cannot be reached by removing channels", received=f"{budget:.4g}{unit}",
                allowed=f"{self._total(least):.4g}{unit} and more",
                next_step="Exclude fewer layers, lower multiple, or allow more time",
            )  # fmt: skip
        best = self._bisect(budget, least)
        best = self._linearized(best, budget)
        return self._choice(self._exchanged(best, budget))

    def least(self) -> Choice:
        """The cheapest choice there is."""
        return self._choice(self._least())

    def _least(self) -> list[int]:
        low = [0] * len(self._options)
        other = self._descend([*low], 1.0, weight=0.0)
        return min(low, other, key=self._total)

    def _bisect(self, budget: float, best: list[int]) -> list[int]:
        scale = sum(float(group.max()) for group in self._lost) / max(
            self._total([len(g) - 1 for g in self._options]), 1e-30
        )
        low, high = 1e-6 * scale, 1e6 * scale
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            starts = ([len(group) - 1 for group in self._options], best)
            fitting = False
            for start in starts:
                found = self._descend([*start], middle)
                if self._total(found) <= budget:
                    fitting = True
                    if self._loss(found) < self._loss(best):
                        best = found
            low, high = (low, middle) if fitting else (middle, high)
        return best

    def _descend(self, places: list[int], price: float, weight: float = 1.0) -> list[int]:
        """Coordinate descent on weight · lost + price · cost."""
        for _ in range(_SWEEPS):
            moved = False
            for group in self._groups:
                values = weight * self._lost[group] + price * self._costs(group, places)
                place = int(np.argmin(values))
                if values[place] < values[places[group]] - _SAME * abs(values[places[group]]):
                    places[group], moved = place, True
            if not moved:
                break
        return places

    def _linearized(self, best: list[int], budget: float) -> list[int]:
        for reach in _NEIGHBOURHOODS:
            for _ in range(_ROUNDS):
                found = self._neighbour(best, budget, reach)
                if found is None:
                    break
                best = found
        return best

    def _neighbour(self, best: list[int], budget: float, reach: int) -> list[int] | None:
        """A better choice near this one, by a knapsack of the groups' own costs; None where there is none."""
        spare, now = budget - self._total(best), self._loss(best)
        near = [range(max(0, p - reach), min(len(o), p + reach + 1)) for p, o in zip(best, self._options)]
        rows = []
        for group in self._groups:
            costs = self._costs(group, best) - self._costs(group, best)[best[group]]
            rows.append([Option(float(self._lost[group][place]), float(costs[place])) for place in near[group]])
        room = spare
        for _ in range(4):
            try:
                picked = choose(rows, room)
            except InputError:
                return None
            found = [near[group][index] for group, index in enumerate(picked)]
            over = self._total(found) - budget
            if self._loss(found) >= now * (1 - _SAME):
                return None
            if over <= 0:
                return found
            room -= 1.2 * over
        return None

    def _exchanged(self, best: list[int], budget: float) -> list[int]:
        best = self._filled(best, budget)
        for _ in range(_EXCHANGES):
            found = next(filter(None, (self._refilled(best, lower, budget) for lower in self._lowered(best))), None)
            if found is None:
                return best
            best = found
        return best

    def _lowered(self, best: list[int]) -> Iterator[list[int]]:
        """One group lower, by each number of steps; then two at random, the same ones each time."""
        for group in self._groups:
            for place in range(best[group] - 1, max(-1, best[group] - 1 - _DEEPEST), -1):
                yield [*best[:group], place, *best[group + 1 :]]
        random = np.random.default_rng(0)
        for _ in range(_KICKS if len(best) > 1 else 0):
            found = [*best]
            for group in random.choice(len(best), 2, replace=False):
                found[group] = int(random.integers(0, best[group] + 1))
            yield found

    def _refilled(self, best: list[int], lower: list[int], budget: float) -> list[int] | None:
        if self._total(lower) > budget:
            return None
        # First without the groups that were lowered, which would take it all back.
        held = [group for group in self._groups if lower[group] != best[group]]
        found = self._filled(self._filled(lower, budget, held), budget)
        return found if self._loss(found) < self._loss(best) * (1 - _SAME) else None

    def _filled(self, places: list[int], budget: float, held: Sequence[int] = ()) -> list[int]:
        """Give channels back to the group that gains most by it, for as long as any fits."""
        while True:
            spare, gain, raised = budget - self._total(places), _SAME * max(self._loss(places), 1e-30), None
            for group in self._groups:
                if group in held or self._lost[group][places[group]] <= gain:
                    continue
                costs = self._costs(group, places)
                gains = np.where(
                    costs - costs[places[group]] <= spare, self._lost[group][places[group]] - self._lost[group], 0
                )
                if gains.max() > gain:
                    gain, raised = float(gains.max()), (group, int(gains.argmax()))
            if raised is None:
                return places
            places = [*places[: raised[0]], raised[1], *places[raised[0] + 1 :]]

    def _costs(self, group: int, places: list[int]) -> np.ndarray:
        """What the terms that see a group cost at each of its options, all others as they are."""
        counts = self._counts(places)
        found = []
        for count in self._options[group]:
            counts[group] = count
            found.append(self._cost.seeing(group, counts))
        return np.array(found)

    def _counts(self, places: list[int]) -> list[int]:
        return [options[place] for options, place in zip(self._options, places)]

    def _total(self, places: list[int]) -> float:
        return self._cost.of(self._counts(places))

    def _loss(self, places: list[int]) -> float:
        return float(sum(lost[place] for lost, place in zip(self._lost, places)))

    def _choice(self, places: list[int]) -> Choice:
        return Choice(tuple(self._counts(places)), self._total(places), self._loss(places))
