"""How much a unit of channels matters: a number for each, comparable within a layer and, normalized, between layers.

| name       | a channel's importance                              | source                           |
|------------|-----------------------------------------------------|----------------------------------|
| l1, l2     | norm of its filter                                  | Li 2017, arXiv:1608.08710        |
| batch_norm | the factor of the batch norm behind it              | Liu 2017, arXiv:1708.06519       |
| taylor     | the loss's first-order change without it, on data   | Molchanov 2019, arXiv:1906.10771 |
| median     | its filter's distance to all others of the layer    | He 2019 (FPGM), arXiv:1811.00250 |
| random     | drawn by lot, for comparison                        |                                  |

A unit's importance is the sum over the layers that make it, each layer's divided by its mean.
"""

from __future__ import annotations

from collections.abc import Iterable

import keras
import numpy as np

from tfopt.channels.dependencies import SEPARABLE, TRANSPOSED, Dependencies, Use
from tfopt.errors import InputError, unknown_name

NAMES = ("l1", "l2", "batch_norm", "taylor", "median", "random")
_SMALL = 1e-12


def of_units(
    model: keras.Model, dependencies: Dependencies, name: str = "l1", *, seed: int = 0,
    batches: Iterable[tuple[np.ndarray, np.ndarray]] | None = None, loss=None,
) -> dict[int, float]:  # fmt: skip
    """Unit -> importance, for all units that some layer makes.

    batches: for 'taylor', images as the model takes them, float32 (batch, height, width, channels), and class indices
    (batch,). loss: a function of (labels, outputs) with one value an image; by default the cross-entropy of
    probabilities. Raises InputError for an unknown name, or where taylor has no images.
    """
    if name not in NAMES:
        raise unknown_name("importance of channels", str(name), NAMES)
    if name == "random":
        random = np.random.default_rng(seed)
        units = sorted({unit for use in _makers(dependencies) for unit in dependencies.unit(use.makes).tolist()})
        return dict(zip(units, random.random(len(units)).tolist()))
    slopes = _slopes(model, batches, loss) if name == "taylor" else {}
    found: dict[int, float] = {}
    factors = _factors(dependencies) if name == "batch_norm" else {}
    for use in _makers(dependencies):
        values = _of_layer(use, name, slopes)
        units = dependencies.unit(use.makes)
        if name == "batch_norm":
            values = np.array([factors.get(int(unit), value) for unit, value in zip(units, values)])
        values = values / max(float(np.mean(values)), _SMALL)
        for unit, value in zip(units.tolist(), values.tolist()):
            found[unit] = found.get(unit, 0.0) + value
    return found


def _makers(dependencies: Dependencies) -> list[Use]:
    return [use for use in dependencies.uses.values() if use.makes is not None]


def filters(layer: keras.Layer, array: np.ndarray | None = None) -> np.ndarray:
    """A kernel, or an array of its shape, as (outputs, weights of one output), float64."""
    array = np.asarray(kernel_of(layer) if array is None else array, np.float64)
    axis = -2 if isinstance(layer, TRANSPOSED) else -1
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def kernel_of(layer: keras.Layer):
    return layer.pointwise_kernel if isinstance(layer, SEPARABLE) else layer.kernel


def _of_layer(use: Use, name: str, slopes: dict) -> np.ndarray:
    rows = filters(use.layer)
    if name == "taylor":
        return np.abs(np.sum(rows * filters(use.layer, slopes[id(kernel_of(use.layer))]), axis=1))
    if name == "median":
        squares = np.sum(rows**2, axis=1)
        apart = np.maximum(squares[:, None] + squares[None] - 2 * rows @ rows.T, 0)
        return np.sqrt(apart).sum(axis=1)
    return np.abs(rows).sum(axis=1) if name == "l1" else np.sqrt(np.sum(rows**2, axis=1))


def _factors(dependencies: Dependencies) -> dict[int, float]:
    """Unit -> the mean |gamma| of the batch norms that scale it."""
    found: dict[int, list[float]] = {}
    for use in dependencies.uses.values():
        if isinstance(use.layer, keras.layers.BatchNormalization) and use.layer.scale:
            for unit, gamma in zip(dependencies.unit(use.scales).tolist(), np.abs(use.layer.get_weights()[0]).tolist()):
                found.setdefault(unit, []).append(gamma)
    return {unit: float(np.mean(values)) for unit, values in found.items()}


def _slopes(model: keras.Model, batches, loss) -> dict[int, np.ndarray]:
    """id of a weight -> the mean gradient of the loss over the batches."""
    import tensorflow as tf

    if batches is None:
        raise InputError("Importance by taylor needs images", next_step="Give batches of images and labels")
    loss = loss or keras.losses.SparseCategoricalCrossentropy(reduction="mean")
    weights = [weight.value for weight in model.trainable_weights]
    total, count = [np.zeros(weight.shape, np.float64) for weight in weights], 0
    for images, labels in batches:
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(loss(labels, model(images, training=False)))
        for place, slope in zip(total, tape.gradient(value, weights)):
            if slope is not None:
                place += np.asarray(slope)
        count += 1
    if not count:
        raise InputError("Importance by taylor needs images", received="no batch")
    return {id(weight): slope / count for weight, slope in zip(model.trainable_weights, total)}
