"""Which units go so that the network takes a share of its measured time and loses least importance.

What a layer costs depends on the channels before it and after it, so the groups are not independent as a knapsack's
options must be. Two ways are tried, and the one that loses less is taken: steps from the whole network, each where
least importance is lost for a millisecond (NetAdapt, Yang et al. 2018, arXiv:1804.03230, with a table of their kind);
and the multiple-choice knapsack around what was found so far (as HALP, Shen et al. 2022, arXiv:2110.10811), again and
again. Both are judged by the full table.
"""

from __future__ import annotations

import numpy as np

from tfopt.channels import choose
from tfopt.channels.dependencies import Dependencies
from tfopt.channels.importance import comparable
from tfopt.errors import InputError, ModelRefused
from tfopt.latency import knapsack
from tfopt.latency.table import Predictor, Table

_TRIALS = 6


def to_latency(
    found: Dependencies, scores: np.ndarray, budget_ms: float, table: Table, multiple: int = choose.MULTIPLE, *,
    kind: str = "l1",
) -> list[int]:  # fmt: skip
    """The units to remove; raises ModelRefused where even the fewest channels take longer than the budget."""
    predictor = Predictor(found, table)
    values = comparable(found, scores, kind)
    allowed = [_allowed(group, multiple) for group in found.groups]
    lost = [_lost(values[group.units], counts) for group, counts in zip(found.groups, allowed)]
    least = predictor.ms([counts[0] for counts in allowed])
    if least > budget_ms:
        raise ModelRefused(
            "So little time cannot be reached by removing channels", received=f"{budget_ms:.4g} ms of kernels",
            allowed=f"at least {least:.4g} ms", next_step="Exclude fewer layers, lower multiple, or ask for more time",
        )  # fmt: skip
    best = _by_steps(predictor, allowed, lost, budget_ms)
    total = lambda picked: sum(costs[index] for costs, index in zip(lost, picked))
    now = best
    for _ in range(_TRIALS):
        now = _by_knapsack(predictor, allowed, lost, budget_ms, now)
        if now is None or predictor.ms(_counts(allowed, now)) > budget_ms or total(now) >= total(best):
            break
        best = now
    return choose.least(found, scores, _counts(allowed, best))


def _by_steps(predictor: Predictor, allowed: list, lost: list, budget_ms: float) -> list[int]:
    """Indices into `allowed`, from all channels down."""
    picked = [len(counts) - 1 for counts in allowed]
    now_ms = predictor.ms(_counts(allowed, picked))
    while now_ms > budget_ms:
        steps = []
        for number, index in enumerate(picked):
            if index:
                fewer = [*picked[:number], index - 1, *picked[number + 1 :]]
                saved = now_ms - predictor.ms(_counts(allowed, fewer))
                more_lost = lost[number][index - 1] - lost[number][index]
                # A step that saves nothing by itself may be the way to one that does; it comes last.
                steps.append((more_lost / max(saved, 1e-12), number))
        _, number = min(steps)
        picked[number] -= 1
        now_ms = predictor.ms(_counts(allowed, picked))
    return picked


def _by_knapsack(predictor: Predictor, allowed: list, lost: list, budget_ms: float, around: list[int]):
    """Each group's options priced with the others as they are; None where the budget is too small in that picture."""
    now_ms = predictor.ms(_counts(allowed, around))
    options = []
    for number, counts in enumerate(allowed):
        group = []
        for index in range(len(counts)):
            changed = [*around[:number], index, *around[number + 1 :]]
            cost = predictor.ms(_counts(allowed, changed)) - now_ms
            group.append(knapsack.Option(lost[number][index], cost))
        options.append(group)
    try:
        return knapsack.choose(options, budget_ms - now_ms)
    except InputError:
        return None


def _allowed(group, multiple: int) -> list[int]:
    least = max(1, round((1 - choose.MOST_OF_A_GROUP) * len(group)))
    return [count for count in choose.allowed(group, multiple) if count >= least or count == len(group)]


def _lost(values: np.ndarray, counts: list[int]) -> list[float]:
    """The importance of the least important units that a count leaves out."""
    whole = np.concatenate([[0.0], np.cumsum(np.sort(values))])
    return [float(whole[len(values) - count]) for count in counts]


def _counts(allowed: list, picked: list[int]) -> list[int]:
    return [counts[index] for counts, index in zip(allowed, picked)]
