"""How a whole model's time is shared out among its layers, by the runtime's own profile of the file.

The share that kernels take of it scales a table. A factor for each layer is there to compare: what it takes in the
network, where other layers have pushed its weights out of the cache, over what it takes alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tfopt.errors import Problem
from tfopt.latency.parts import Part

#: Runs in each of several processes; of these the least of each operation counts, since other load only adds.
RUNS, REPEATS = 30, 5
#: The profiler counts whole microseconds, so a shorter step says nothing of itself.
_LEAST_MS = 0.005
#: What a profile calls the work of kernels.
_KERNELS = ("convolution", "fully connected", "deconvolution", "conv_2d", "depthwise_conv_2d", "fully_connected",
            "transpose_conv")  # fmt: skip


@dataclass(frozen=True)
class Anchor:
    """share: of the whole time that kernels take, None where it is not known. layers: layer -> its kernel's ms."""

    share: float | None = None
    layers: Mapping[str, float] = field(default_factory=dict)


def profiled(path: Path, target, connection=None) -> Anchor:
    """The profile of a whole model; an empty Anchor where the target's runtime has no profiler."""
    from mobile_bench.profile import profile

    try:
        found = [profile(path, target, connection=connection, runs=RUNS) for _ in range(REPEATS)]
    except Problem:
        return Anchor()
    if len({tuple(op.node_type for op in one.ops) for one in found}) != 1:
        return Anchor()
    kernels, others, layers = 0.0, 0.0, {}
    for ops in zip(*(one.ops for one in found)):
        ms = min(op.avg_ms for op in ops)
        if not ops[0].node_type.lower().startswith(_KERNELS):
            others += ms
            continue
        kernels += ms
        if ops[0].layer:
            layers[ops[0].layer] = layers.get(ops[0].layer, 0.0) + ms
    return Anchor(kernels / (kernels + others) if kernels else None, layers)


def factors(
    parts: Sequence[Part], alone_ms: Sequence[float], layers: Mapping[str, float], total_ms: float
) -> list[float]:
    """For each part, what its time alone is multiplied by; times alone then add up to total_ms.

    Layers of the same family and size share one factor, their median. Those that the profile does not name have that
    of all others together.
    """
    calls: dict[str, float] = {}
    for part, ms in zip(parts, alone_ms, strict=True):
        calls[part.layer] = calls.get(part.layer, 0.0) + ms
    known = {layer: ms for layer, ms in layers.items() if layer in calls and ms >= _LEAST_MS}
    alike: dict[tuple, list[float]] = {}
    for part, ms in zip(parts, alone_ms):
        if part.layer in known:
            alike.setdefault((part.family, round(ms, 9)), []).append(known[part.layer] / calls[part.layer])
    rest = sum(known.values()) / sum(calls[layer] for layer in known) if known else 1.0
    found = [
        statistics.median(alike.get((part.family, round(ms, 9)), [rest])) for part, ms in zip(parts, alone_ms)
    ]  # fmt: skip
    scale = total_ms / sum(factor * ms for factor, ms in zip(found, alone_ms))
    return [scale * factor for factor in found]
