"""What a file keeps of the zeros and the clusters of its Keras model, layer by layer, read from the .tflite itself.

A converter folds batch norms into kernels and rounds them, each output channel with a scale of its own; neither moves
a zero or parts two equal weights of one channel. So a kernel of the file is found by its direction, channel by channel,
whatever the converter called it. Where each channel has its own scale, k values of a kernel are up to k for each
channel and more for the whole tensor: `channel_values` is what clustering promises, `values` what a file can be coded
with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mobile_bench.flatbuffer import read_model
from mobile_bench.xray.cpu_rules import stored
from mobile_bench.xray.rules import Node, nodes
from tfopt.errors import ConversionError
from tfopt.sparse import unpacked

#: More values than int8 has are no clusters; and the values of an untrained kernel are all different.
MOST_CLUSTERS = 256
_CHANNEL_AXIS = {"CONV_2D": 0, "FULLY_CONNECTED": 0, "TRANSPOSE_CONV": 0, "DEPTHWISE_CONV_2D": -1}
#: Kernels whose channels point further apart than this (1 - cosine) are not the same; rounding turns them far less.
_NEAR = 0.1


@dataclass(frozen=True, eq=False)
class KernelWeights:
    """A kernel as TFLite lays it out: `values` is float32 (channels out, weights of one channel)."""

    layer: str
    values: np.ndarray


@dataclass(frozen=True)
class LayerKept:
    """One kernel in the file beside the Keras one.

    zeros, values: how many are zero, how many different values there are, in the file; keras_zeros, keras_values: in
    the Keras kernel. channel_values: the most that one output channel of the file has. lost: weights that are zero in
    Keras and not in the file. found: whether the file has the kernel; its other figures are 0 if not.
    """

    layer: str
    weights: int
    keras_zeros: int
    keras_values: int
    zeros: int = 0
    values: int = 0
    channel_values: int = 0
    lost: int = 0
    found: bool = True

    @property
    def clustered(self) -> bool:
        return self.keras_values <= MOST_CLUSTERS and self.keras_values < self.weights


def is_clustered(kernel: np.ndarray) -> bool:
    """Whether some weights that are not zero share a value, and there are no more values than int8 has."""
    found = kernel[kernel != 0]
    return len(values := np.unique(found)) <= MOST_CLUSTERS and len(values) < found.size


def distinct(kernel: np.ndarray) -> int:
    """How many different values it has, 0 among them where it is there."""
    return len(np.unique(kernel))


def kernels(model) -> list[KernelWeights]:
    """The kernels of a Keras 3 model that pruning and clustering work on."""
    from tfopt.tfmot import bridge
    from tfopt.tfmot.kernels import KERNELS

    graph, weights = bridge.describe(model)
    found = []
    for node in graph.nodes:
        if node.trainable:
            arrays = [weights[node.weights[i]] for i in KERNELS.get(node.kind, ()) if i < len(node.weights)]
            found += [KernelWeights(node.source, by_channel(array, node.kind)) for array in arrays]
    return found


def measure(tflite: str | Path | bytes, kernels: list[KernelWeights]) -> tuple[LayerKept, ...]:
    """Each kernel as it is in the file. Raises what `read_model` raises."""
    rows = []
    for kernel, file in zip(kernels, _matched(kernels, _stored(tflite)), strict=True):
        own = kernel.values
        zero = own == 0
        row = LayerKept(kernel.layer, own.size, int(zero.sum()), distinct(own), found=False)
        if file is not None:
            row = LayerKept(
                kernel.layer, own.size, row.keras_zeros, row.keras_values, int(np.sum(file == 0)), distinct(file),
                max(distinct(channel) for channel in file), int(np.sum(zero & (file != 0))),
            )  # fmt: skip
        rows.append(row)
    return tuple(rows)


def check(rows: tuple[LayerKept, ...], *, sparse: bool, clustered: bool) -> None:
    """Raise ConversionError for the first layer whose zeros or clusters did not reach the file."""
    for row in rows:
        if sparse and row.lost:
            raise ConversionError(
                f"Layer {row.layer} lost zeros on the way into the file",
                received=f"{row.lost} of {row.keras_zeros} are not zero any more",
                next_step="Report this with the recipe and the model's architecture",
            )
        if clustered and row.clustered and row.channel_values > row.keras_values:
            raise ConversionError(
                f"Layer {row.layer} has more values in the file than it has clusters",
                received=f"{row.channel_values} in one channel",
                allowed=f"{row.keras_values}",
                next_step="Report this with the recipe and the model's architecture",
            )


def summary(rows: tuple[LayerKept, ...]) -> dict:
    """For a variant's record: figures of the whole file, and of each layer."""
    found = [row for row in rows if row.found]
    total = sum(row.weights for row in found)
    return {
        "sparsity": round(sum(row.zeros for row in found) / max(1, total), 6),
        "keras_sparsity": round(sum(row.keras_zeros for row in found) / max(1, total), 6),
        "most_channel_values": max((row.channel_values for row in found), default=0),
        "most_values": max((row.values for row in found), default=0),
        "not_found": [row.layer for row in rows if not row.found],
        "layers": [asdict(row) for row in rows],
    }


def by_channel(kernel: np.ndarray, kind: str) -> np.ndarray:
    """(height, width, in, out) and its like to (out, height · width · in), TFLite's order."""
    if kind.startswith("Depthwise"):
        return kernel.reshape(-1, kernel.shape[-2] * kernel.shape[-1]).T
    outputs = -2 if kind == "Conv2DTranspose" else -1
    return np.moveaxis(kernel, outputs, 0).reshape(kernel.shape[outputs], -1)


def _stored(tflite) -> list[np.ndarray]:
    """Every stored kernel as (channels out, weights of one channel): its numbers in the file less the zero point."""
    model = read_model(tflite)
    packed = {}
    if any(tensor.sparse for tensor in model.main.tensors):
        packed = unpacked(tflite if isinstance(tflite, bytes) else Path(tflite).read_bytes())
    found = []
    for node in nodes(model):
        array = _constant(node, packed)
        if array is None:
            continue
        channels = np.moveaxis(array, _CHANNEL_AXIS[node.op], 0)
        found.append(channels.reshape(len(channels), -1))
    return found


def _constant(node: Node, packed: dict[int, np.ndarray]) -> np.ndarray | None:
    if node.op not in _CHANNEL_AXIS:
        return None
    tensor = stored(node, node.input(1))
    values = None if tensor is None else packed.get(tensor.index, node.model.constant(tensor))
    if values is None or values.ndim < 2:
        return None
    zero = tensor.zero_points[0] if len(tensor.zero_points) == 1 else 0
    return values.astype(np.float32) - zero


def _matched(kernels: list[KernelWeights], stored_kernels: list[np.ndarray]) -> list[np.ndarray | None]:
    """The stored kernel of each Keras kernel, each at most once.

    A kernel with one weight a channel has no direction but its sign, so that its zeros must tell.
    """
    from scipy.optimize import linear_sum_assignment

    found: list[np.ndarray | None] = [None] * len(kernels)
    for shape in {kernel.values.shape for kernel in kernels}:
        own = [n for n, kernel in enumerate(kernels) if kernel.values.shape == shape]
        other = [array for array in stored_kernels if array.shape == shape]
        apart = np.array([[_distance(kernels[n].values, array) for array in other] for n in own]).reshape(len(own), -1)
        lost = np.array([[np.mean((kernels[n].values == 0) & (array != 0)) for array in other] for n in own])
        for row, column in zip(*linear_sum_assignment(np.minimum(apart, 1.0) + _NEAR * lost.reshape(apart.shape))):
            if apart[row, column] <= _NEAR:
                found[own[row]] = other[column]
    return found


def _distance(own: np.ndarray, other: np.ndarray) -> float:
    """1 less the mean cosine between two kernels' channels, whichever sign a batch norm gave them.

    Channels that are empty in either, as a batch norm of factor 0 makes them, say nothing.
    """
    dots, sizes = np.sum(own * other, axis=1), np.linalg.norm(own, axis=1) * np.linalg.norm(other, axis=1)
    live = sizes > 0
    return float(1 - np.mean(np.abs(dots[live]) / sizes[live])) if np.any(live) else np.inf
