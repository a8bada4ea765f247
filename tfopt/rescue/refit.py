"""Walk through a quantized file, layer by layer, and set each layer's weights and bias anew.

Every layer is fitted to what it is really fed: the deployed kernels run the file up to it, with all layers
before it already refitted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mobile_bench.inputs import InputSpec
from tfopt.errors import ConversionError
from tfopt.rescue.graph import Graph, Layer
from tfopt.rescue.moments import moments
from tfopt.rescue.rounding import corrected_bias, round_dense, round_depthwise

#: Above this many weights to one output the second moments no longer fit a small machine: only the bias is corrected.
MOST_INPUTS = 8192
_LARGEST = 2**31 - 1


def twins(floats: Graph, quantized: Graph) -> list[tuple[Layer, Layer]]:
    """The layers of both files, paired by name, or by order where a layer is called twice.

    Branches may come in another order in either file. Raises ConversionError where the layers are not the same.
    """
    pairs = list(zip(floats.layers(), quantized.layers()))
    plain = lambda layer: layer.name.rpartition("/")[2].removeprefix("quant_")
    others = {plain(other): other for _, other in pairs}
    if others.keys() == {plain(one) for one, _ in pairs} and len(others) == len(pairs):
        pairs = [(one, others[plain(one)]) for one, _ in pairs]
    if len(floats.layers()) != len(quantized.layers()):
        raise ConversionError(
            "The quantized file has other layers than the float one",
            received=len(quantized.layers()), allowed=len(floats.layers()),
        )  # fmt: skip
    for one, other in pairs:
        shapes = [graph.array(layer.weights).shape for graph, layer in ((floats, one), (quantized, other))]
        if one.op != other.op or shapes[0] != shapes[1]:
            raise ConversionError(
                f"Layer {one.name} is another one in the quantized file",
                received=f"{other.op} {shapes[1]}", allowed=f"{one.op} {shapes[0]}",
            )  # fmt: skip
    return pairs


def refit(
    floats: Graph, quantized: Graph, images: np.ndarray, spec: InputSpec, *, rounding: bool, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """Change `quantized` in place: its biases, and with `rounding` its weights and their scales too.

    images: uint8 (count, height, width, channels), no labels.
    """
    pairs = twins(floats, quantized)
    for number, (layer, twin) in enumerate(pairs):
        if progress:
            progress(number, len(pairs))
        kernel = floats.array(layer.weights)
        bias = floats.array(layer.bias) if layer.bias >= 0 else np.zeros(_outputs(kernel, layer), np.float32)
        found = None
        if layer.depthwise or kernel[0].size <= MOST_INPUTS:
            found = moments(floats, layer, quantized, twin, images, spec, weights=kernel, bias=bias, seed=seed)
        if found is None or twin.bias < 0 or quantized.dtype(twin.weights) != np.int8:
            continue
        rows = as_rows(kernel, layer).astype(np.float64)
        if rounding:
            numbers, scales = (round_depthwise if layer.depthwise else round_dense)(rows, found)
            if quantized.scale(twin.weights)[0].size == 1:  # one scale for all outputs: the file's own grid stays
                scales = np.full(len(rows), quantized.scale(twin.weights)[0][0])
                numbers = np.clip(np.round(rows / scales[:, None]), -127, 127).astype(np.int8)
        else:
            numbers = as_rows(quantized.array(twin.weights), layer)
            scales = np.broadcast_to(quantized.scale(twin.weights)[0], len(rows)).copy()
        scales = _bearable(scales, quantized, twin, bias)
        numbers = np.clip(np.round(numbers), -127, 127)
        new = corrected_bias(rows, bias.astype(np.float64), numbers * scales[:, None], found)
        _write(quantized, twin, numbers, scales, new, rounding)
    if progress:
        progress(len(pairs), len(pairs))


def as_rows(kernel: np.ndarray, layer: Layer) -> np.ndarray:
    """A kernel as TFLite stores it, as (outputs, inputs to one output)."""
    return kernel.reshape(-1, kernel.shape[-1]).T if layer.depthwise else kernel.reshape(len(kernel), -1)


def rounded_to_nearest(floats: Graph, layer: Layer, quantized: Graph, twin: Layer) -> None:
    """The plain int8 weights and bias of a float layer, in place: symmetric, up to the largest weight."""
    if quantized.dtype(twin.weights) != np.int8 or twin.bias < 0:
        return
    kernel = floats.array(layer.weights)
    rows = as_rows(kernel, layer).astype(np.float64)
    bias = floats.array(layer.bias).astype(np.float64) if layer.bias >= 0 else np.zeros(len(rows))
    largest = np.abs(rows).max(axis=1)
    if quantized.scale(twin.weights)[0].size == 1:
        largest = np.full(len(rows), largest.max())
    scales = _bearable(np.maximum(largest, 1e-10) / 127, quantized, twin, bias)
    numbers = np.clip(np.round(rows / scales[:, None]), -127, 127)
    quantized.set_scale(twin.weights, scales if quantized.scale(twin.weights)[0].size > 1 else scales[:1])
    _write(quantized, twin, numbers, scales, bias, rounding=True)


def _outputs(kernel: np.ndarray, layer: Layer) -> int:
    return kernel.shape[-1] if layer.depthwise else len(kernel)


def _bearable(scales: np.ndarray, quantized: Graph, twin: Layer, bias: np.ndarray) -> np.ndarray:
    """Scales under which the bias still fits 32 bits: those of channels that are almost 0 are raised."""
    step = quantized.scale(twin.input)[0]
    if not step.size:
        return scales
    return np.maximum(scales, 2 * np.abs(bias) / (step[0] * _LARGEST))


def _write(
    quantized: Graph, twin: Layer, numbers: np.ndarray, scales: np.ndarray, bias: np.ndarray, rounding: bool
) -> None:  # fmt: skip
    shape = quantized.array(twin.weights).shape
    if rounding:
        stored = numbers.T.reshape(shape) if twin.depthwise else numbers.reshape(shape)
        quantized.set_array(twin.weights, stored)
        if quantized.scale(twin.weights)[0].size > 1:
            quantized.set_scale(twin.weights, scales)
    if quantized.dtype(twin.bias) == np.float32:
        quantized.set_array(twin.bias, bias)
        return
    # The product of two float32 scales, as the runtime computes it.
    steps = np.asarray(scales, np.float32).astype(np.float64) * quantized.scale(twin.input)[0][0]
    if rounding:
        quantized.set_scale(twin.bias, steps if quantized.scale(twin.bias)[0].size > 1 else steps[:1])
    limit = np.iinfo(quantized.dtype(twin.bias)).max
    quantized.set_array(twin.bias, np.clip(np.round(bias / steps), -limit, limit))
