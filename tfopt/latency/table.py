"""What each kernel layer of a network costs on a target, by how many channels go in and out.

Measured on micro-models (tfopt.latency.micro) over a grid of counts, and linear between its points. What is summed is
the kernels' time: additions, pooling and the like are not in it, nor what a whole file gains by its caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tfopt.latency.micro import Place

if TYPE_CHECKING:
    import keras

    from tfopt.channels.dependencies import Dependencies

#: Shares of the channels at which layers are timed.
GRID = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True, eq=False)
class Row:
    """One layer. inputs, outputs: rising counts; ms: (inputs, outputs), of all the layer's calls together.

    A layer whose output has the channels of its input (depthwise) has one entry in `inputs`, and its own count in
    `outputs`. `proportional`: one point alone was timed, and time is taken to follow the number of weights.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ms: np.ndarray
    proportional: bool = False

    def at(self, inputs: float, outputs: float) -> float:
        if self.proportional:
            return float(self.ms[0, 0]) * inputs / self.inputs[0] * outputs / self.outputs[0]
        along = np.array([np.interp(outputs, self.outputs, row) for row in self.ms])
        return float(np.interp(inputs, self.inputs, along))


@dataclass(frozen=True, eq=False)
class Table:
    """layers: name -> Row. place: where it was measured."""

    layers: dict[str, Row]
    place: Place


def measure(
    found: Dependencies, place: Place, folder: Path, tell: Callable[[int, int, str], None] | None = None
) -> Table:
    """Time every layer whose channels may change. Minutes: a network of 20 layers has some 250 micro-models."""
    from tfopt.latency import micro

    grids = {layer: _grid(layer, shape) for layer, shape, _ in _layers(found)}
    calls = {layer: count for layer, _, count in _layers(found)}
    models = {}
    for layer, shape, _ in _layers(found):
        for counts in itertools.product(*grids[layer]):
            models[layer.name, counts] = _micro(layer, shape, counts, proportional=len(grids[layer][1]) == 1)
    tell = tell or (lambda *_: None)
    tell(0, len(models), "converting layers")
    files = micro.convert(models, place.scheme, folder)
    ms = micro.times(list(files.values()), place, tell=lambda done, total: tell(done, total, "timing layers"))
    known = dict(zip(files, ms))
    rows = {}
    for layer, (inputs, outputs) in grids.items():
        values = [[known[layer.name, (a, b)] * calls[layer] for b in outputs] for a in inputs]
        alone = len(inputs) == len(outputs) == 1 and not _depthwise(layer)
        rows[layer.name] = Row(inputs, outputs, np.array(values), proportional=alone)
    return Table(rows, place)


class Predictor:
    """The kernels' time of a network as a function of how many units each group keeps."""

    def __init__(self, found: Dependencies, table: Table):
        from tfopt.channels.cut import by_layer

        self._rows: list[tuple[Row, np.ndarray, np.ndarray]] = []
        group_of = {unit: number for number, group in enumerate(found.groups) for unit in group.units.tolist()}
        for layer, uses in by_layer(found.uses).items():
            row = table.layers.get(layer.name)
            if row is None:
                continue
            kernels = [use for use in uses if use.kind == "kernel"]
            along = lambda role, kernels=kernels: next((use.ids for use in kernels if use.role == role), None)
            read, made = along("in"), along("out")
            if read is None and made is None:
                read = made = along("along")
            ends = [
                _weights(found, ids, group_of, counts[-1]) for ids, counts in ((read, row.inputs), (made, row.outputs))
            ]
            self._rows.append((row, *ends))

    def ms(self, counts: Sequence[int]) -> float:
        """counts: units that stay, of each group of the dependencies."""
        units = np.array([1.0, *counts])
        return sum(row.at(float(before @ units), float(after @ units)) for row, before, after in self._rows)


def _weights(found: Dependencies, ids, group_of: dict[int, int], whole: int) -> np.ndarray:
    """How many channels of a kernel's axis there are: a constant, and so many for each unit of each group."""
    weights = np.zeros(1 + len(found.groups))
    if ids is None:
        weights[0] = whole
        return weights
    for unit in found.units[ids.ravel()].tolist():
        if unit in group_of:
            number = group_of[unit]
            weights[1 + number] += 1 / len(found.groups[number])
        else:
            weights[0] += 1
    return weights


def _layers(found: Dependencies) -> list[tuple[keras.Layer, tuple, int]]:
    """(layer, the shape of its first call's input, calls) of every kernel of which a channel may go in or out."""
    from tfopt.channels.cut import by_layer
    from tfopt.graph import calls

    shapes: dict[int, list] = {}
    for operation, before, _ in calls(found.model):
        shapes.setdefault(id(operation), []).append(before)
    wanted = []
    for layer, uses in by_layer(found.uses).items():
        moves = any(use.kind == "kernel" and found.free(use.ids) for use in uses)
        if moves and id(layer) in shapes and None not in shapes[id(layer)][0]:
            wanted.append((layer, shapes[id(layer)][0], len(shapes[id(layer)])))
    return wanted


def _depthwise(layer) -> bool:
    import keras

    return isinstance(layer, keras.layers.DepthwiseConv2D) and layer.depth_multiplier == 1


def _plain(layer) -> bool:
    import keras

    kinds = keras.layers
    single = isinstance(layer, (kinds.Dense, kinds.Conv1D, kinds.Conv2D))
    return (
        single
        and not isinstance(layer, (kinds.SeparableConv1D, kinds.SeparableConv2D, kinds.DepthwiseConv2D))
        and (getattr(layer, "groups", 1) == 1)
    )


def _grid(layer, shape: tuple) -> tuple[tuple[int, ...], tuple[int, ...]]:
    inputs = int(shape[-1])
    if _depthwise(layer):
        return (inputs,), _counts(inputs)
    if not _plain(layer):
        return (inputs,), (int(getattr(layer, "filters", inputs)),)
    outputs = int(layer.kernel.shape[-1])
    # The input image itself has the channels it has.
    return (inputs,) if inputs <= 4 else _counts(inputs), _counts(outputs)


def _counts(channels: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(share * channels)) for share in GRID}))


def _micro(layer, shape: tuple, counts: tuple[int, int], proportional: bool):
    """The layer alone, followed by nothing: what batch norm and activation cost is fused into it in a file."""
    from tfopt.latency import micro

    config = layer.get_config()
    inputs, outputs = counts
    if _depthwise(layer):
        inputs = outputs
    elif _plain(layer):
        config["units" if "units" in config else "filters"] = outputs
    config |= {key: "glorot_uniform" for key in config if key.endswith(("kernel_initializer", "depthwise_initializer"))}
    return micro.chain([type(layer).from_config({**config, "name": "part"})], (*shape[:-1], inputs))
