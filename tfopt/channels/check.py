"""Whether a cut did nothing but remove: the same model with the weights that read the removed channels set to zero
must give the same answers as the smaller one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import keras
import numpy as np

from tfopt.channels.cut import by_layer
from tfopt.channels.dependencies import Dependencies
from tfopt.graph import flat_layers
from tfopt.rebuild import Rebuild, View, graph_of

#: Of the size of the outputs: what float32 rounds in a deep network stays below it.
TOLERANCE = 1e-5
#: Outputs smaller than this count as this large.
_LEAST = 0.01
#: What stands in for a size that a model leaves open.
OPEN_SIZE = 32


def silenced(found: Dependencies, removed: Iterable[int]) -> keras.Model:
    """A copy of the model, as large as before, in which nothing reads these units."""
    keep = found.keep(removed)
    rebuild = Rebuild(View(found.model))
    for layer, uses in by_layer(found.uses).items():
        weights = layer.get_weights()
        for use in uses:
            if use.index is not None and use.role == "in":
                shape = [-1 if axis == use.axis else 1 for axis in range(weights[use.index].ndim)]
                weights[use.index] = weights[use.index] * keep.mask(use.ids).reshape(shape)
        rebuild.keep(layer, weights)
    return rebuild.model()


def random_inputs(model: keras.Model, count: int = 2, seed: int = 0) -> list[np.ndarray]:
    """Noise for each input of a model, (count, …): standard normal, or whole numbers 0 to 255."""
    rng, made = np.random.default_rng(seed), []
    for tensor in model.inputs:
        shape = (tensor.shape[0] or count, *(n or OPEN_SIZE for n in tensor.shape[1:]))
        whole = not str(tensor.dtype).startswith(("float", "bfloat"))
        made.append((rng.integers(0, 256, shape) if whole else rng.normal(size=shape)).astype(tensor.dtype))
    return made


def randomized(model: keras.Model, seed: int = 0) -> keras.Model:
    """A copy whose batch norms, and whatever else is all one value, have random numbers, as training would leave them.

    Fresh models have zeros as biases and ones as scales, which would hide that one was left in the wrong place.
    """
    copy = Rebuild(View(model)).model()
    rng = np.random.default_rng(seed)
    for layer in flat_layers(copy):
        if isinstance(layer, (keras.layers.Normalization, keras.layers.Rescaling)):
            continue
        for variable in layer.weights:
            values = keras.ops.convert_to_numpy(variable)
            if values.dtype.kind != "f" or values.size < 2 or np.ptp(values):
                continue
            near_one = variable is getattr(layer, "moving_variance", None) or variable is getattr(layer, "gamma", None)
            drawn = rng.uniform(0.5, 1.5, values.shape) if near_one else values + rng.normal(0, 0.3, values.shape)
            variable.assign(drawn.astype(values.dtype))
    return copy


def difference(one: keras.Model, other: keras.Model, inputs: Sequence[np.ndarray]) -> float:
    """The largest difference of two models' outputs over the size of the first one's, the worst of all outputs.

    A softmax or sigmoid at the end is left out, as it would flatten differences. Not a number where an output is none.
    """
    with _linear_ends(one), _linear_ends(other):
        expected, got = _answers(one, inputs), _answers(other, inputs)
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        # Where large numbers cancel, rounding is large beside the little that is left: so _LEAST.
        gap, size = float(np.abs(a - b).max()), float(max(np.ptp(a), np.abs(a).max(), _LEAST))
        worst = max(worst, gap / size) if np.isfinite(gap) else float("nan")
    return worst


def exactness(found: Dependencies, removed: Iterable[int], smaller: keras.Model, seed: int = 0) -> float:
    """`difference` of the smaller model and the silenced one on noise."""
    return difference(silenced(found, removed), smaller, random_inputs(smaller, seed=seed))


def _answers(model: keras.Model, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    given = keras.tree.pack_sequence_as(graph_of(model)._inputs_struct, list(inputs))
    answers = keras.tree.flatten(model(given, training=False))
    return [keras.ops.convert_to_numpy(answer).astype(np.float64) for answer in answers]


@contextmanager
def _linear_ends(model: keras.Model) -> Iterator[None]:
    view, kept = View(model), []
    for tensor in graph_of(model).outputs:
        node = view.producer(tensor)
        while node is not None and (inner := graph_of(node.operation)) is not None:
            node = view.producer(inner.outputs[0])
        layer = node.operation if node is not None else None
        if getattr(layer, "activation", None) in (keras.activations.softmax, keras.activations.sigmoid):
            kept.append((layer, layer.activation))
            layer.activation = keras.activations.linear
    try:
        yield
    finally:
        for layer, activation in kept:
            layer.activation = activation
