"""At which numbers of channels a family is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable

POINTS = 4
#: Counts of channels are measured in these steps up to _DENSE, and at both sides of each _TILE beyond it.
STEP = 8
_DENSE, _TILE = 128, 64
#: Along one edge no more than these.
_MOST = 28


def axis(
    most: Iterable[int], fixed: Iterable[int] = (), points: int = POINTS, groups: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The few numbers of channels that every row has, and the many along an edge; both rising, the largest last.

    most: what the layers of the family have in the whole model and may lose; fixed: what others of them always have.
    groups: of a grouped convolution, of which each number is a multiple.
    """
    most, fixed = set(most), set(fixed)
    if not most:
        return tuple(sorted(fixed)), tuple(sorted(fixed))
    largest = max(most)
    step = math.lcm(STEP, groups)
    while step > groups and largest < 2 * step:
        step = max(groups, step // 2)
    round_to = lambda value: min(largest, max(step, round(value / step) * step))
    least = round_to(0)
    few = {round_to(least + (largest - least) * part / (points - 1)) for part in range(points)} | {largest, *fixed}
    many = [value for value in range(step, largest, step) if value <= _DENSE or value % _TILE in (0, STEP)]
    if len(many) > _MOST:
        many = [many[round(place * (len(many) - 1) / (_MOST - 1))] for place in range(_MOST)]
    return tuple(sorted(few)), tuple(sorted({*few, *many, *most}))


def cells(reads: tuple[tuple, tuple], mades: tuple[tuple, tuple] | None) -> list[tuple[int, int]]:
    """The (channels in, channels out or 0) of a family from its two axes."""
    few_in, many_in = reads
    if mades is None:
        return [(read, 0) for read in sorted({*few_in, *many_in})]
    few_out, many_out = mades
    found = {(read, made) for read in few_in for made in few_out}
    found |= {(few_in[-1], made) for made in many_out} | {(read, few_out[-1]) for read in many_in}
    return sorted(found)
