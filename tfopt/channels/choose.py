"""Which units go: a ratio for every group, one threshold for all, a ratio of each group's own, or a number of MACs.

Counts of channels that stay are rounded to a multiple, 8 by default, since kernels of mobile processors work on so many
at a time. A group of fewer than two multiples is rounded to half of it, or a quarter, and so on.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

import numpy as np

from tfopt.channels.costs import Costs
from tfopt.channels.dependencies import Dependencies, Group
from tfopt.channels.importance import comparable
from tfopt.channels.limits import SCOPES, check_ratio
from tfopt.errors import InputError, ModelRefused, unknown_name

MULTIPLE = 8
#: With one threshold for all, no group loses more than this: a layer of a channel or two cuts the network in half.
MOST_OF_A_GROUP = 0.9
_HALVINGS = 16


def kept(group: Group, ratio: float, multiple: int = MULTIPLE, *, strict: bool = True) -> int:
    """How many units of a group stay when it loses that share: the nearest allowed count, never 0.

    Behind a grouped convolution a unit is several channels, and these are what the multiple counts. A group of one
    unit stays. strict: raise InputError for a ratio that would leave less than half a channel.
    """
    size = len(group)
    if size == 1 or ratio <= 0:
        return size
    wanted = size * (1 - ratio)
    if strict and wanted < 0.5:
        raise InputError(
            f"Layer {group.name} would be left without a channel", received=f"ratio {ratio:g} of {size} channels",
            allowed=f"at most {1 - 0.5 / size:.3g}", next_step=f"Lower the ratio, or exclude {group.name}",
        )  # fmt: skip
    return min(_allowed(group, multiple), key=lambda count: (abs(count - wanted), -count))


def _allowed(group: Group, multiple: int) -> list[int]:
    """The counts that a group may be left with, rising."""
    step = multiple // math.gcd(multiple, group.positions)
    while step > 1 and len(group) < 2 * step:
        step //= 2
    return [*range(step, len(group), step), len(group)]


def uniform(
    found: Dependencies, scores: np.ndarray, ratio: float, multiple: int = MULTIPLE, *, strict: bool = True
) -> list[int]:
    """The least important units, that share of every group."""
    return by_group(found, scores, [ratio] * len(found.groups), multiple, strict=strict)


def by_group(
    found: Dependencies, scores: np.ndarray, ratios: Sequence[float], multiple: int = MULTIPLE, *, strict: bool = True
) -> list[int]:
    """The least important units, of each group its own share."""
    for ratio in ratios:
        check_ratio(ratio)
    counts = [kept(group, ratio, multiple, strict=strict) for group, ratio in zip(found.groups, ratios, strict=True)]
    return _least(found, scores, counts)


def ratios_of(found: Dependencies, ratios: Mapping[str, float], default: float = 0.0) -> list[float]:
    """A share for each group by the names of its layers, such as a study of sensitivity gives; 'block3_*' is a pattern.

    Where several layers of a group have a ratio, the lowest holds: what one can bear is not what another can.
    """
    names = {layer for group in found.groups for layer in group.layers}
    for pattern, ratio in ratios.items():
        check_ratio(ratio, f"The ratio of {pattern}")
        if not fnmatch.filter(names, pattern):
            raise unknown_name("layer, or pattern of layers, that can lose channels", pattern, names)
    given = lambda group: [ratio for pattern, ratio in ratios.items() if fnmatch.filter(group.layers, pattern)]
    return [min(given(group), default=default) for group in found.groups]


def overall(
    found: Dependencies, scores: np.ndarray, ratio: float, multiple: int = MULTIPLE, *, kind: str = "l1"
) -> list[int]:
    """The least important units of all groups together, that share of all channels; groups lose what falls below.

    kind: the importance that the scores are of, for `comparable`. No group loses more than MOST_OF_A_GROUP.
    """
    check_ratio(ratio)
    return _least(found, scores, _overall(found, comparable(found, scores, kind), ratio, multiple))


def _overall(found: Dependencies, values: np.ndarray, ratio: float, multiple: int) -> list[int]:
    # Units count by the channels that they are; the threshold is the lowest that takes enough of them.
    rows = [(values[group.units], group) for group in found.groups if len(group) > 1]
    if not rows:
        return [len(group) for group in found.groups]
    pool = np.concatenate([np.sort(row)[: int(MOST_OF_A_GROUP * len(row))] for row, _ in rows])
    weight = np.concatenate([np.full(int(MOST_OF_A_GROUP * len(row)), group.positions) for row, group in rows])
    total = sum(len(group) * group.positions for _, group in rows)
    order = np.argsort(pool, kind="stable")
    needed = int(np.searchsorted(np.cumsum(weight[order]), ratio * total * (1 - 1e-12)))
    threshold = pool[order[min(needed, len(order) - 1)]] if ratio > 0 else -math.inf
    counts = []
    for group in found.groups:
        share = float(np.mean(values[group.units] <= threshold)) if len(group) > 1 else 0.0
        counts.append(kept(group, min(share, MOST_OF_A_GROUP), multiple, strict=False))
    return counts


def to_macs(
    found: Dependencies, scores: np.ndarray, fraction: float, multiple: int = MULTIPLE, *, scope: str = "uniform",
    kind: str = "l1",
) -> list[int]:  # fmt: skip
    """The fewest units whose removal leaves at most that fraction of the MACs, by bisection over the ratio.

    Raises ModelRefused where even the highest ratio leaves more.
    """
    if not (isinstance(fraction, (int, float)) and not isinstance(fraction, bool) and 0 < fraction < 1):
        raise InputError("The fraction of MACs is out of range", received=repr(fraction), allowed="above 0, below 1")
    if scope not in SCOPES:
        raise unknown_name("scope", str(scope), SCOPES)
    costs, values = Costs(found), comparable(found, scores, kind)
    before = costs.macs(found.keep())

    def choice(ratio: float) -> list[int]:
        if scope == "global":
            return _overall(found, values, ratio, multiple)
        return [kept(group, ratio, multiple, strict=False) for group in found.groups]

    def share(counts: list[int]) -> float:
        return costs.macs(found.keep(_least(found, scores, counts))) / max(before, 1)

    low, high = 0.0, 1 - 1e-6
    counts = choice(high)
    if share(counts) > fraction:
        raise ModelRefused(
            "So few MACs cannot be reached by removing channels",
            received=f"{fraction:.0%} of {before:,} MACs", allowed=f"at least {share(counts):.1%}",
            next_step="Exclude fewer layers, lower multiple, or ask for more MACs",
        )  # fmt: skip
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fewer = choice(middle)
        if share(fewer) <= fraction:
            counts, high = fewer, middle
        else:
            low = middle
    # One step of the ratio may take a multiple from many groups; those that matter most get one back where it fits.
    ordered = [np.sort(values[group.units])[::-1] for group in found.groups]
    back = []
    for number, group in enumerate(found.groups):
        now = counts[number]
        more = min((count for count in _allowed(group, multiple) if count > now), default=now)
        if more > now:
            back.append((float(ordered[number][now:more].mean()), number, more))
    for _, number, more in sorted(back, reverse=True):
        raised = [*counts[:number], more, *counts[number + 1 :]]
        if share(raised) <= fraction:
            counts = raised
    return _least(found, scores, counts)


def _least(found: Dependencies, scores: np.ndarray, counts: list[int]) -> list[int]:
    removed = []
    for group, count in zip(found.groups, counts, strict=True):
        order = np.argsort(scores[group.units], kind="stable")
        removed += group.units[order[: len(group) - count]].tolist()
    return removed


def allowed(group: Group, multiple: int = MULTIPLE) -> list[int]:
    """The counts of units that a group may keep under a budget, rising: no less than MOST_OF_A_GROUP leaves."""
    least = kept(group, MOST_OF_A_GROUP, multiple, strict=False)
    return [count for count in _allowed(group, multiple) if count >= least] if len(group) > 1 else [len(group)]


def losses(group: Group, values: np.ndarray, counts: Sequence[int]) -> list[float]:
    """The importance lost where a group keeps so many of its units, the least important ones gone."""
    rising = np.concatenate([[0.0], np.cumsum(np.sort(values[group.units]))])
    return [float(rising[len(group) - count]) for count in counts]


def by_counts(found: Dependencies, scores: np.ndarray, counts: Sequence[int]) -> list[int]:
    """The least important units of each group, so that it keeps that many."""
    return _least(found, scores, list(counts))
