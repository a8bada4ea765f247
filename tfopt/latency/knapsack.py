"""One option for each layer, least lost within a budget: the multiple-choice knapsack, by dynamic programming.

Used for latency as in HALP (Shen et al. 2022, arXiv:2110.10811) and for MACs alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tfopt.errors import InputError

#: The budget is counted in so many parts; costs are rounded up to them, so that the choice is within it for certain.
BINS = 4000


@dataclass(frozen=True)
class Option:
    """What an option loses, in any unit that adds up, and what it costs, in the budget's unit."""

    lost: float
    cost: float


def choose(options: Sequence[Sequence[Option]], budget: float, *, unit: str = "") -> list[int]:
    """The index of one option for each group: least lost, costs within the budget.

    Costs are rounded up to a BINS-th of the budget; where that alone makes the budget too small, the cheapest options
    are taken as they are. Raises InputError, with the least that can be reached, where the budget is below that.
    """
    least = sum(min(option.cost for option in group) for group in options)
    if least > budget + 1e-12 * abs(budget):
        raise InputError(
            "The budget cannot be reached", received=f"{budget:g}{unit}", allowed=f"{least:g}{unit} and more",
            next_step="Raise it, or let more layers change",
        )  # fmt: skip
    if not options:
        return []
    if budget - least <= 1e-12 * abs(budget):
        return [min(range(len(group)), key=lambda i: (group[i].cost, group[i].lost)) for group in options]
    cheapest = [min(group, key=lambda option: option.cost).cost for group in options]
    spare = budget - least
    part = spare / BINS
    lost = np.zeros(BINS + 1)
    taken = []
    for group, low in zip(options, cheapest):
        best, picked = np.full(BINS + 1, np.inf), np.zeros(BINS + 1, np.int64)
        for index, option in enumerate(group):
            over = option.cost - low
            steps = int(np.ceil(over / part - 1e-9)) if over > 0 else 0
            if steps > BINS:
                continue
            value = np.full(BINS + 1, np.inf)
            value[steps:] = lost[: BINS + 1 - steps] + option.lost
            better = value < best
            best[better], picked[better] = value[better], index
        taken.append((picked, group, low))
        lost = best
    chosen, left = [], BINS
    for picked, group, low in reversed(taken):
        index = int(picked[left])
        chosen.append(index)
        over = group[index].cost - low
        left -= int(np.ceil(over / part - 1e-9)) if over > 0 else 0
    return chosen[::-1]
