"""What layers answer on images: mean and covariance of every output channel, for factors that fit the data."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras

    from mobile_bench.inputs import InputSpec
    from tfopt.data.splits import Split

#: Positions of one batch that are looked at.
_POSITIONS = 8192


@dataclass(frozen=True)
class Answers:
    """Of a layer before bias and activation. mean: (outputs,). covariance: (outputs, outputs)."""

    mean: np.ndarray
    covariance: np.ndarray

    @cached_property
    def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = np.linalg.eigh(self.covariance)
        return np.maximum(values[::-1], 0), vectors[:, ::-1]

    @property
    def values(self) -> np.ndarray:
        """Standard deviations along the principal directions, falling: the singular values of the centred answers."""
        return np.sqrt(self._spectrum[0])

    @property
    def directions(self) -> np.ndarray:
        """(outputs, outputs): the principal directions as columns, in that order."""
        return self._spectrum[1]


def answers(
    model: keras.Model, layers: list, split: Split, spec: InputSpec, batch_size: int = 64
) -> dict[str, Answers]:
    """The answers of each layer on a split's images, by name; of all its calls where it has several."""
    sums = {layer.name: _Sums(int(layer.get_weights()[0].shape[-1])) for layer in layers}
    random = np.random.default_rng(0)

    def watch(layer, found: np.ndarray) -> None:
        rows = np.asarray(found, np.float64).reshape(-1, found.shape[-1])
        if len(rows) > _POSITIONS:
            rows = rows[random.choice(len(rows), _POSITIONS, replace=False)]
        sums[layer.name].add(rows)

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_listening(layer, watch))
        for images, _ in split.batches(spec, batch_size):
            model(images, training=False)
    return {name: total.finish() for name, total in sums.items()}


class _Sums:
    def __init__(self, outputs: int):
        self._count, self._first, self._second = 0, np.zeros(outputs), np.zeros((outputs, outputs))

    def add(self, rows: np.ndarray) -> None:
        self._count += len(rows)
        self._first += rows.sum(axis=0)
        self._second += rows.T @ rows

    def finish(self) -> Answers:
        mean = self._first / max(1, self._count)
        return Answers(mean, self._second / max(1, self._count) - np.outer(mean, mean))


@contextmanager
def _listening(layer, watch):
    """While this lasts, each call of the layer gives its answers before bias and activation to `watch`."""
    import keras

    own = layer.call

    def call(inputs, *args, **kwargs):
        if isinstance(layer, keras.layers.Dense):
            found = keras.ops.matmul(inputs, layer.kernel)
        else:
            found = layer.convolution_op(inputs, layer.kernel)
        watch(layer, keras.ops.convert_to_numpy(found))
        return own(inputs, *args, **kwargs)

    layer.call = call
    try:
        yield
    finally:
        del layer.call
