"""Which candidate each layer gets: by its own criterion, or together under a budget of MACs or of measured time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tfopt.errors import InputError
from tfopt.latency.knapsack import Option, choose
from tfopt.lowrank.layers import Candidate, Factorable

if TYPE_CHECKING:
    from tfopt.latency.micro import Place

#: Ranks of a layer that are timed, from an eighth to three quarters of the full one.
_TIMED_SHARES = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.75)


@dataclass(frozen=True)
class Timed:
    """A candidate against its layer on the target: milliseconds of both, the ratio with its interval, the verdict."""

    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    verdict: str

    def text(self) -> str:
        return f"{self.after_ms:.4g} ms against {self.before_ms:.4g} ms, {self.verdict}"


@dataclass
class Choice:
    """candidates: layer -> what replaces it. times: layer -> the timing of that, where there was one."""

    candidates: dict[str, Candidate] = field(default_factory=dict)
    times: dict[str, Timed] = field(default_factory=dict)


def cheapest(candidates: Sequence[Candidate]) -> Candidate:
    """Of several that keep as much, the one with the least multiplications."""
    return min(candidates, key=lambda candidate: (candidate.macs, candidate.parameters))


def under_macs(layers: Sequence[Factorable], methods: Callable, share: float, others: float, whole: float) -> Choice:
    """The candidates that lose least, where these layers and the `others` take at most that share of the model's MACs.

    What layers lose is taken as -log(1 - error), so that the product of what each keeps is largest, which follows the
    accuracy before fine-tuning well (Kim et al. 2019, Efficient Neural Network Compression, arXiv:1811.12781, eq. 6).
    """
    groups, options = [], []
    for layer in layers:
        found: list[Candidate | None] = [None]
        found += [
            candidate for method in methods(layer) for candidate in layer.ladder(method) if candidate.macs < layer.macs
        ]
        groups.append(found)
        options.append([Option(_lost(c), (layer.macs if c is None else c.macs) / whole) for c in found])
    options.append([Option(0.0, others / whole)])
    picked = [group[index] for group, index in zip(groups, choose(options, share, unit=" of the model's MACs"))]
    return Choice({candidate.layer: candidate for candidate in picked if candidate})


def under_latency(
    layers: Sequence[Factorable], methods: Callable, share: float, place: Place, folder: Path, tell: Callable
) -> Choice:
    """The candidates with which the layers together take that share of their measured time and lose least.

    Each layer's ranks are timed beside it, a few of each method; those that are not faster do not count.
    """
    timed: list[tuple[list, list[Timed | None]]] = []
    for number, layer in enumerate(layers):
        tell(number, len(layers), layer.name)
        found = [
            layer.at(method, tuple(max(1, round(part * most)) for most in layer.full_rank(method)))
            for method in methods(layer) for part in _TIMED_SHARES
        ]  # fmt: skip
        found = [candidate for candidate in found if candidate.macs < layer.macs]
        times = race({layer.name: (layer, found)}, place, folder / str(number))[layer.name] if found else []
        rows = [(c, t) for c, t in zip(found, times) if t.verdict == "faster"]
        # Without a faster candidate the layer's own time is not known from here, and does not matter.
        own = times[0].before_ms if times else 0.0
        timed.append(([(None, None, own), *((c, t, own * t.ratio) for c, t in rows)], times))
    groups = [rows for rows, _ in timed]
    options = [[Option(_lost(candidate), cost) for candidate, _, cost in rows] for rows in groups]
    budget = share * sum(rows[0][2] for rows in groups)
    try:
        picked = choose(options, budget, unit=" ms")
    except InputError as error:
        raise InputError(
            f"Low rank alone does not bring the layers to {share:g} of their time here", received=error.received,
            allowed=error.allowed, next_step="Ask for less, or allow more methods",
        ) from error  # fmt: skip
    choice = Choice()
    for rows, index in zip(groups, picked):
        candidate, times, _ = rows[index]
        if candidate:
            choice.candidates[candidate.layer], choice.times[candidate.layer] = candidate, times
    return choice


def race(
    pairs: Mapping[str, tuple[Factorable, Sequence[Candidate]]], place: Place, folder: Path,
    tell: Callable[[int, int, str], None] | None = None,
) -> dict[str, list[Timed]]:  # fmt: skip
    """Time each layer's candidates beside the layer itself, at the shape of its first call."""
    from tfopt.latency import micro

    models = {}
    for name, (layer, candidates) in pairs.items():
        shape = layer.shapes[0][0]
        models[name, 0] = _built([(type(layer.layer), layer.layer.get_config(), layer.layer.get_weights())], shape)
        for number, candidate in enumerate(candidates, 1):
            parts = [(_class(part.kind), part.config, part.weights) for part in candidate.parts]
            models[name, number] = _built(parts, shape)
    files = micro.convert(models, place.scheme, folder)
    found = {}
    for done, (name, (_, candidates)) in enumerate(pairs.items()):
        if tell:
            tell(done, len(pairs), name)
        verdicts = micro.race([files[name, number] for number in range(len(candidates) + 1)], place)
        found[name] = [
            Timed(v.reference_ms, v.median_ms, v.ratio, v.low, v.high, v.verdict) for v in verdicts
        ]  # fmt: skip
    return found


def _built(parts: Sequence[tuple], shape: tuple):
    from tfopt.latency import micro

    layers = [kind.from_config({**config, "name": f"part{number}"}) for number, (kind, config, _) in enumerate(parts)]
    model = micro.chain(layers, shape)
    for layer, (_, _, weights) in zip(layers, parts):
        layer.set_weights(weights)
    return model


def _class(kind: str):
    import keras

    return getattr(keras.layers, kind)


def _lost(candidate: Candidate | None) -> float:
    return 0.0 if candidate is None else -math.log(max(1e-12, 1 - candidate.error))
