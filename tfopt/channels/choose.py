"""Which units go: a share of each group, of all groups together, or as much as a target of multiplications asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tfopt.channels.dependencies import Dependencies, Group
from tfopt.errors import InputError

SCOPES = ("uniform", "global")
#: Of each group at least so many channels stay, whatever a global ranking says.
_LEAST = 1


def uniform(
    groups: list[Group], importance: Mapping[int, float], ratio: float | Mapping[Group, float], multiple: int = 8
) -> set[int]:
    """The least important `ratio` of each group; what stays is a multiple of `multiple` where the group is wide enough.

    ratio: above 0, below 1; or one for each group (0 leaves it alone).
    """
    gone: set[int] = set()
    for group in groups:
        own = ratio[group] if isinstance(ratio, Mapping) else ratio
        if own:
            gone |= _least(group, importance, stays(len(group.units), own, multiple))
    return gone


def ranked(groups: list[Group], importance: Mapping[int, float], ratio: float, multiple: int = 8) -> set[int]:
    """The least important `ratio` of all units together, each group rounded as in `uniform`; none loses nine tenths."""
    everything = np.sort([importance[unit] for group in groups for unit in group.units])
    limit = everything[min(len(everything) - 1, round(ratio * len(everything)))]
    gone: set[int] = set()
    for group in groups:
        below = sum(importance[unit] < limit for unit in group.units) / len(group.units)
        if below:
            gone |= _least(group, importance, stays(len(group.units), min(below, 0.9), multiple))
    return gone


def stays(width: int, ratio: float, multiple: int = 8) -> int:
    """How many of `width` channels stay: width · (1 - ratio), rounded to the nearest multiple, one multiple at least.

    Narrow groups are rounded to 4, 2 or 1, so that rounding moves the ratio by an eighth of the width at most.
    """
    if not 0 < ratio < 1:
        raise InputError("The share of channels to cut is out of range", received=ratio, allowed="above 0, below 1")
    while multiple > 1 and width < 4 * multiple:
        multiple //= 2
    wanted = max(multiple, int(width * (1 - ratio) / multiple + 0.5) * multiple)
    return max(_LEAST, min(wanted, width))


def to_macs(
    macs: Callable[[set[int]], int], choose: Callable[[float], set[int]], share: float, before: int, steps: int = 12
) -> tuple[set[int], float]:
    """The units to cut so that about `share` of the multiplications stay, and the ratio that chose them.

    macs: units that go -> multiplications that stay. choose: ratio -> units that go, more for a larger ratio.
    Bisection; of the ratios tried, the one nearest to the target.
    """
    low, high = 0.0, 1.0
    best: tuple[float, set[int], float] | None = None
    for _ in range(steps):
        ratio = (low + high) / 2
        gone = choose(ratio)
        reached = macs(gone) / before
        if best is None or abs(reached - share) < best[0]:
            best = abs(reached - share), gone, ratio
        low, high = (ratio, high) if reached > share else (low, ratio)
    return best[1], best[2]


def sizes(dependencies: Dependencies, gone: set[int]) -> dict[str, tuple[int, int]]:
    """Layer -> (channels that it makes, channels that stay)."""
    found = {}
    for use in dependencies.uses.values():
        if use.makes is not None:
            stay = ~np.isin(dependencies.unit(use.makes), list(gone))
            found[use.layer.name] = len(stay), int(stay.sum())
    return found


def _least(group: Group, importance: Mapping[int, float], stay: int) -> set[int]:
    order = sorted(group.units, key=lambda unit: (importance[unit], unit))
    return set(order[: len(group.units) - stay])
