"""Whether two models give the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import keras
import numpy as np

from mobile_bench.inputs import InputSpec
from tfopt.graph import flat_layers
from tfopt.rebuild import Rebuild, View, graph_of, nodes_of

#: Of the range of the outputs: float32 rounding through a deep network stays below it.
TOLERANCE = 1e-5
_IMAGES = 8


def random_pixels(spec: InputSpec, seed: int) -> np.ndarray:
    """Noise over the whole range of pixels, uint8 (images, height, width, channels)."""
    return np.random.default_rng(seed).integers(0, 256, (_IMAGES, *spec.shape), np.uint8)


def probe_of(model: keras.Model, seed: int) -> keras.Model:
    """A copy with random batch norms, and with random values in each array that is all one value."""
    probe = Rebuild(View(model)).model()
    rng = np.random.default_rng(seed)
    for layer in flat_layers(probe):
        if isinstance(layer, (keras.layers.Normalization, keras.layers.Rescaling)):
            continue
        if isinstance(layer, keras.layers.BatchNormalization):
            _randomize_norm(layer, rng)
            continue
        for variable in layer.weights:
            array = keras.ops.convert_to_numpy(variable)
            if array.dtype.kind == "f" and array.size > 1 and np.ptp(array) == 0:
                variable.assign(array + rng.normal(0, 0.1, array.shape).astype(array.dtype))
    return probe


def _randomize_norm(layer, rng: np.random.Generator) -> None:
    shape = layer.moving_mean.shape
    layer.moving_mean.assign(rng.normal(0, 0.3, shape))
    layer.moving_variance.assign(rng.uniform(0.5, 1.5, shape))
    if layer.scale:
        layer.gamma.assign(rng.uniform(0.5, 1.5, shape))
    if layer.center:
        layer.beta.assign(rng.normal(0, 0.3, shape))


def largest_difference(one: keras.Model, other: keras.Model, images: np.ndarray, others: np.ndarray) -> float:
    """The largest difference of two models' scores over the range of the first one's.

    images, others: the same images as each model wants them. A softmax or sigmoid in the last layer is left out, as
    it would flatten differences. Not a number where an output is none; infinite where the scores do not depend on
    the image and differ.
    """
    with _linear_head(one), _linear_head(other):
        expected, got = _answers(one, images), _answers(other, others)
    difference, spread = float(np.abs(got - expected).max()), float(np.ptp(expected))
    if difference == 0:
        return 0.0
    return difference / spread if spread else float("inf")


def _answers(model: keras.Model, images: np.ndarray) -> np.ndarray:
    batch = model.inputs[0].shape[0] or len(images)
    parts = [model(images[i : i + batch], training=False) for i in range(0, len(images), batch)]
    return np.concatenate([keras.ops.convert_to_numpy(part) for part in parts]).astype(np.float64)


@contextmanager
def _linear_head(model: keras.Model) -> Iterator[None]:
    """For a while, the model without the activation of its last layer."""
    graph = graph_of(model)
    last = nodes_of(graph)[-1].operation
    while (inner := graph_of(last)) is not None:
        last = nodes_of(inner)[-1].operation
    kept = getattr(last, "activation", None)
    if kept in (keras.activations.softmax, keras.activations.sigmoid):
        last.activation = keras.activations.linear
    try:
        yield
    finally:
        if kept is not None:
            last.activation = kept
