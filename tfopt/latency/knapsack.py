"""One option for each layer, least lost within a budget: the multiple-choice knapsack, by dynamic programming.

Exact: after each group all pairs of cost and loss are kept that no other beats in both (Nemhauser and Ullmann 1969,
Discrete Dynamic Programming and Capital Allocation). Used for latency as in HALP (Shen et al. 2022, arXiv:2110.10811)
and for MACs alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tfopt.errors import InputError

#: Of more pairs than these, neighbours in cost are merged, the one that loses least staying: the budget still holds.
MOST_PAIRS = 20_000


@dataclass(frozen=True)
class Option:
    """What an option loses, in any unit that adds up, and what it costs, in the budget's unit."""

    lost: float
    cost: float


def choose(options: Sequence[Sequence[Option]], budget: float, *, unit: str = "") -> list[int]:
    """The index of one option for each group: least lost, costs within the budget; of equals the cheapest.

    Raises InputError, with the least that can be reached, where the budget is below that.
    """
    cheapest = [min(option.cost for option in group) for group in options]
    least = sum(cheapest)
    slack = 1e-12 * max(abs(budget), sum(map(abs, cheapest)))
    if least > budget + slack:
        raise InputError(
            "The budget cannot be reached", received=f"{budget:g}{unit}", allowed=f"{least:g}{unit} and more",
            next_step="Raise it, or let more layers change",
        )  # fmt: skip
    # Costs are counted from the cheapest option of each group, so that all are 0 or more.
    spare = max(budget - least, 0.0)
    costs, lost = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for group, low in zip(options, cheapest):
        own = np.array([option.cost - low for option in group])
        all_costs = (costs[:, None] + own).ravel()
        all_lost = (lost[:, None] + np.array([option.lost for option in group])).ravel()
        kept = _front(all_costs, all_lost, spare + slack)
        steps.append((kept // len(group), kept % len(group)))
        costs, lost = all_costs[kept], all_lost[kept]
    chosen, place = [], len(costs) - 1
    for before, picked in reversed(steps):
        chosen.append(int(picked[place]))
        place = int(before[place])
    return chosen[::-1]


def _front(costs: np.ndarray, lost: np.ndarray, budget: float) -> np.ndarray:
    """The places of those that no other beats in both, by rising cost and falling loss."""
    order = np.lexsort((lost, costs))
    order = order[costs[order] <= budget]
    falling = lost[order]
    best = np.minimum.accumulate(falling)
    order = order[np.concatenate([[True], falling[1:] < best[:-1]])]
    if len(order) > MOST_PAIRS:
        # The last of each piece loses least; the cheapest of all stays, so that something always fits.
        piece = np.minimum((costs[order] / max(budget, 1e-300) * MOST_PAIRS).astype(np.int64), MOST_PAIRS - 1)
        last = np.concatenate([piece[1:] != piece[:-1], [True]])
        last[0] = True
        order = order[last]
    return order
