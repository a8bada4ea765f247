"""Which layers of a full-int8 file compute in float again: those that take most error away for what they cost.

Greedy, with gains measured on the deployed file: the best change is measured again with all that are already in
before it is taken, and its neighbours after it (a layer with float neighbours has more to give than one alone).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tfopt.rescue.graph import Graph
from tfopt.rescue.lift import KINDS, lift, units
from tfopt.rescue.score import Judge, Score

#: Images of the choice set that single layers are judged on.
IMAGES = 128
SPENDINGS = ("bytes", "ms", "both")


@dataclass(frozen=True)
class Lifted:
    """A layer that computes in float. gain: divergence it took away. extra_ms is 0 where no time was measured."""

    layer: str
    kind: str
    gain: float
    extra_bytes: int
    extra_ms: float


class Choice:
    """extra_ms: for each layer's name, how much longer it takes in float than in int8, in ms. keep: layers that are
    in float whatever it brings, name -> kind."""

    def __init__(
        self, floats: Graph, quantized: Graph, judge: Judge, *, spend: str, extra_ms: dict[str, float], most_bytes: int,
        keep: dict[str, str] | None = None,
    ):  # fmt: skip
        self.floats, self.quantized, self.judge, self.spend = floats, quantized, judge, spend
        self.names = {layer.operator: layer.name for layer in quantized.layers()}
        self.extra_ms, self.most_bytes = extra_ms, most_bytes
        self.size = len(quantized.pack())
        self.only = np.linspace(0, len(judge.float_answers) - 1, min(IMAGES, len(judge.float_answers))).astype(int)
        self.order = sorted(units(quantized))
        numbers = {name: number for number, name in self.names.items()}
        self.keep = {numbers[layer]: kind for layer, kind in (keep or {}).items()}

    def run(
        self, enough: Callable[[Score], bool], progress: Callable[[int, int], None] | None = None
    ) -> tuple[Graph, Score, tuple[Lifted, ...], dict[str, float]]:  # fmt: skip
        """The lifted file, its score, the layers in the order in which they were chosen, and for every layer the
        divergence that it alone would take away."""
        chosen = dict(self.keep)
        taken = [Lifted(self.names[unit], kind, 0.0, *self._extra(unit, kind)) for unit, kind in chosen.items()]
        best_graph = lift(self.floats, self.quantized, chosen) if chosen else self.quantized
        score = self.judge.score(best_graph)
        if enough(score):
            return best_graph, score, tuple(taken), {}
        now = self._divergence(chosen)
        free = [unit for unit in self.order if unit not in chosen]
        gains = {}
        for number, unit in enumerate(free):
            for kind in KINDS:
                gains[unit, kind] = now - self._divergence({**chosen, unit: kind})
            if progress:
                progress(number + 1, len(free))
        alone = {self.names[unit]: max(gains[unit, kind] for kind in KINDS) for unit in free}
        fresh: set[tuple[int, str]] = set(gains)
        while gains and not enough(score):
            best = max(gains, key=lambda one: gains[one] / self._cost(*one))
            unit, kind = best
            if gains[best] <= 0:
                break
            graph = lift(self.floats, self.quantized, {**chosen, unit: kind})
            if len(graph.pack()) > self.most_bytes:
                del gains[best]
                continue
            if best not in fresh:
                gains[best] = now - self._divergence({**chosen, unit: kind})
                fresh.add(best)
                continue
            chosen[unit] = kind
            taken.append(Lifted(self.names[unit], kind, gains[best], *self._extra(unit, kind)))
            now -= gains[best]
            gains = {one: gain for one, gain in gains.items() if one[0] != unit}
            fresh = set()
            place = self.order.index(unit)
            for near in self.order[max(0, place - 1) : place + 2]:
                for other in KINDS:
                    if (near, other) in gains:
                        gains[near, other] = now - self._divergence({**chosen, near: other})
                        fresh.add((near, other))
            best_graph, score = graph, self.judge.score(graph)
            if progress:
                progress(len(taken), len(self.order))
        return best_graph, score, tuple(taken), alone

    def _divergence(self, chosen: dict[int, str]) -> float:
        graph = lift(self.floats, self.quantized, chosen) if chosen else self.quantized
        return self.judge.divergence(graph, self.only)

    def _extra(self, unit: int, kind: str) -> tuple[int, float]:
        layer = next(layer for layer in self.quantized.layers() if layer.operator == unit)
        weights = self.quantized.array(layer.weights).size if kind == "float16" else 0
        return weights, self.extra_ms.get(layer.name, 0.0)

    def _cost(self, unit: int, kind: str) -> float:
        """As a share of the int8 file, and of the time that all layers in float would take longer; never 0."""
        more_bytes, more_ms = self._extra(unit, kind)
        shares = {"bytes": more_bytes / self.size, "ms": more_ms / max(sum(self.extra_ms.values()), 1e-9)}
        return 1e-3 + (sum(shares.values()) if self.spend == "both" else shares[self.spend])
