"""How much each unit of channels matters: one number for each, higher for those to keep.

l1, l2       the norm of the weights that make a channel (Li et al. 2017, arXiv:1608.08710)
bn_scale     the factor of its batch norm (network slimming, Liu et al. 2017, arXiv:1708.06519)
fpgm         its distance from all other channels of the layer: those near the geometric median can be replaced by
             the others (He et al. 2019, arXiv:1811.00250, equation 4)
taylor       what the loss would change by, to first order: the mean over batches of (sum of gradient · weight)² over
             the weights that make a channel (Molchanov et al. 2019, arXiv:1906.10771, equations 5 and 8)
random       chance, by a seed: what any other measure has to beat

A unit that several layers make has the sum over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from tfopt.channels.dependencies import Dependencies, Use
from tfopt.channels.limits import IMPORTANCES
from tfopt.errors import InputError, unknown_name

_LARGE = 2**24
#: (images, labels) as the model and the loss take them.
Batches = Iterable[tuple[np.ndarray, np.ndarray]]


def scores(
    found: Dependencies,
    kind: str = "l1",
    *,
    batches: Batches | None = None,
    loss: Callable | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The importance of each unit, float64 (units,), never negative.

    batches, loss: for 'taylor' alone; loss(labels, outputs) -> values, as Keras's losses are called. Groups without a
    batch norm have their 'l1' instead of 'bn_scale' (see `comparable`).
    """
    if kind not in IMPORTANCES:
        raise unknown_name("importance", str(kind), IMPORTANCES)
    count = int(found.units.max()) + 1 if len(found.units) else 0
    if kind == "random":
        return np.random.default_rng(seed).random(count)
    if kind == "taylor":
        return _taylor(found, count, batches, loss)
    if kind == "bn_scale":
        own = _summed(found, count, "scale", lambda rows: np.abs(rows).sum(1))
        for group, weights in zip(found.groups, _by_group(found, "l1")):
            if not own[group.units].any():
                own[group.units] = weights
        return own
    return _summed(found, count, "kernel", _MEASURES[kind])


def comparable(found: Dependencies, values: np.ndarray, kind: str) -> np.ndarray:
    """The same scores on one scale for all groups: over the mean of the group, since norms grow with the kernel.

    What 'taylor' measures is a change of the loss, which is one scale already.
    """
    if kind == "taylor":
        return values
    scaled = values.copy()
    for group in found.groups:
        scaled[group.units] = values[group.units] / max(float(values[group.units].mean()), 1e-30)
    return scaled


def without_norm(found: Dependencies) -> list[str]:
    """The groups that 'bn_scale' cannot judge, by the name of their first layer."""
    along = [use.ids for use in found.uses if use.kind == "scale"]
    normed = set(np.unique(found.units[np.concatenate(along)]).tolist()) if along else set()
    return [group.name for group in found.groups if not normed & set(group.units.tolist())]


def _l1(rows: np.ndarray) -> np.ndarray:
    return np.abs(rows).sum(1)


def _l2(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(rows).sum(1))


def _distances(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.mean(0)  # distances stay, and less cancels below
    squares = np.square(rows).sum(1)
    between = squares[:, None] + squares[None, :] - 2 * rows @ rows.T
    return np.sqrt(np.maximum(between, 0)).sum(1)


_MEASURES = {"l1": _l1, "l2": _l2, "fpgm": _distances}


def _by_group(found: Dependencies, kind: str) -> list[np.ndarray]:
    values = scores(found, kind)
    return [values[group.units] for group in found.groups]


def _rows(use: Use, array: np.ndarray) -> np.ndarray:
    """A weight as (channels, all that makes one channel), in double precision unless that takes much memory."""
    array = np.asarray(array, np.float64 if array.size < _LARGE else np.float32)
    return np.moveaxis(array, use.axis, 0).reshape(use.ids.size, -1)


def _summed(found: Dependencies, count: int, kind: str, measure: Callable) -> np.ndarray:
    total = np.zeros(count)
    for use in found.uses:
        if use.kind == kind and use.role in ("out", "along") and use.index is not None:
            rows = _rows(use, np.asarray(use.layer.weights[use.index]))
            np.add.at(total, found.units[use.ids.ravel()], measure(rows))
    return total


def _taylor(found: Dependencies, count: int, batches: Batches | None, loss: Callable | None) -> np.ndarray:
    import tensorflow as tf

    if batches is None or loss is None:
        raise InputError("The importance taylor needs data", received="no batches", allowed="batches and a loss")
    makers = [
        use for use in found.uses
        if use.role in ("out", "along") and use.index is not None and use.layer.weights[use.index].trainable
    ]  # fmt: skip
    variables = [use.layer.weights[use.index].value for use in makers]

    @tf.function(reduce_retracing=True)
    def gradients(images, labels):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            value = tf.reduce_mean(loss(labels, found.model(images, training=False)))
        return tape.gradient(value, variables)

    weights = [np.asarray(variable, np.float64) for variable in variables]
    total, seen = np.zeros(count), 0
    for images, labels in batches:
        change = np.zeros(count)
        for use, weight, gradient in zip(makers, weights, gradients(tf.constant(images), tf.constant(labels))):
            if gradient is not None:
                part = _rows(use, weight * np.asarray(tf.convert_to_tensor(gradient))).sum(1)
                np.add.at(change, found.units[use.ids.ravel()], part)
        total += np.square(change)
        seen += 1
    if not seen or not np.isfinite(total).all():
        raise InputError(
            "The importance taylor cannot be computed",
            received="no data" if not seen else "gradients that are no numbers",
        )
    return total / seen
