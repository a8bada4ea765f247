"""What a choice of channels would cost: parameters and MACs, without building the smaller model."""

from __future__ import annotations

import math
from collections import defaultdict

from tfopt.channels.cut import by_layer
from tfopt.channels.dependencies import Dependencies
from tfopt.channels.ids import Keep
from tfopt.graph import macs_of_calls


class Costs:
    """Counts of a model once some units are gone; equal to those of the model that `cut` builds.

    A kernel's MACs are its weights times the places where each is used, and only the weights get fewer.
    """

    def __init__(self, found: Dependencies):
        calls: dict[int, int] = defaultdict(int)
        other = 0
        layers = by_layer(found.uses)
        known = {id(layer) for layer in layers}
        for operation, macs in macs_of_calls(found.model):
            if id(operation) in known:
                calls[id(operation)] += macs
            else:
                other += macs
        self._macs_elsewhere = other
        self._parameters_elsewhere = int(found.model.count_params())
        self._layers = []
        for layer, uses in layers.items():
            kernels = {use.index for use in uses if use.kind == "kernel"}
            shapes = [tuple(weight.shape) for weight in layer.weights]
            axes: dict[int, dict] = defaultdict(dict)
            for use in uses:
                if use.index is not None:
                    axes[use.index][use.axis] = use.ids
            weights = sum(math.prod(shapes[index]) for index in kernels)
            each = calls[id(layer)] / weights if weights else 0.0
            rows = [(shapes[index], found_axes, index in kernels) for index, found_axes in axes.items()]
            self._layers.append((each, rows))
            self._parameters_elsewhere -= sum(math.prod(shape) for shape, _, _ in rows)

    def parameters(self, keep: Keep) -> int:
        return self._parameters_elsewhere + sum(
            _size(shape, axes, keep) for _, rows in self._layers for shape, axes, _ in rows
        )

    def macs(self, keep: Keep) -> int:
        total = self._macs_elsewhere
        for each, rows in self._layers:
            if each:
                total += round(each * sum(_size(shape, axes, keep) for shape, axes, kernel in rows if kernel))
        return total


def _size(shape: tuple, axes: dict, keep: Keep) -> int:
    return math.prod(keep.count(axes[axis]) if axis in axes else n for axis, n in enumerate(shape))
