"""How many channels each group keeps: the least importance lost within a budget of milliseconds.

A multiple-choice knapsack whose costs are coupled: a layer's time depends on the group that it reads and on the one
that it makes. Solved in three steps, each judged by the whole cost and not by its approximation:

1. min over counts of lost + λ · cost by coordinate descent, one group after the other exactly, with bisection over λ
   (Everett 1963, Generalized Lagrange Multiplier Method);
2. around the best of these, each group's costs with all others fixed make an ordinary knapsack, solved exactly and
   taken if the whole cost keeps the budget, as HALP (Shen et al. 2022, arXiv:2110.10811) linearizes; the neighbourhood
   shrinks where it does not;
3. channels are given back one group at a time, or exchanged between two, until nothing gains.

Each step only ever lowers what is lost. Without coupling the second alone is exact; with it, the tests compare all
three with every combination.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tfopt.errors import InputError, ModelRefused
from tfopt.latency.knapsack import Option, choose
from tfopt.latency.predict import Cost

_HALVINGS, _SWEEPS, _ROUNDS = 30, 20, 40
_NEIGHBOURHOODS = (6, 3, 1)
_EXCHANGES = 200
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
                next_step="Exclude fewer layers, lower multiple, or ask for less",
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
        for _ in range(_EXCHANGES):
            found = self._raised(best, budget) or self._swapped(best, budget)
            if found is None:
                break
            best = found
        return best

    def _raised(self, best: list[int], budget: float) -> list[int] | None:
        spare, found = budget - self._total(best), None
        gain = 0.0
        for group in self._groups:
            costs = self._costs(group, best)
            for place in range(len(self._options[group])):
                more = self._lost[group][best[group]] - self._lost[group][place]
                if more > gain and costs[place] - costs[best[group]] <= spare:
                    found, gain = [*best[:group], place, *best[group + 1 :]], more
        return found if gain > _SAME * max(self._loss(best), 1e-30) else None

    def _swapped(self, best: list[int], budget: float) -> list[int] | None:
        """One group a step down and the best that another can make of it."""
        now = self._loss(best)
        for group in self._groups:
            for step in (1, 2, 3):
                if best[group] < step:
                    continue
                lower = [*best[:group], best[group] - step, *best[group + 1 :]]
                if self._total(lower) > budget:
                    continue
                found = self._raised(lower, budget)
                if found and self._loss(found) < now * (1 - _SAME):
                    return found
        return None

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
