"""What a layer is fed: first and second moments of its inputs, in the float file and in the quantized one.

Both files are run on the deployed kernels up to the layer, image by image; of large images a fixed random
sample of positions is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import load_runtime
from tfopt.rescue.graph import Graph, Layer

#: Positions of one image that are looked at.
POSITIONS = 1024


@dataclass(frozen=True)
class Moments:
    """Second moments are central: the bias takes up the means.

    Dense layers and convolutions with n inputs to a kernel: seen and true (n,), within (n, n). Depthwise ones with
    c channels and n taps: (c, n) and (c, n, n). `true` are the means of the float file's inputs; `seen` and
    `within` are of the quantized file's.
    """

    true: np.ndarray
    seen: np.ndarray
    within: np.ndarray


class Tap:
    """The values of some tensors of a graph for one image after another.

    upto: how many of the graph's operators are run. The images come as uint8 (height, width, channels).
    """

    def __init__(self, graph: Graph, upto: int, tensors: list[int], spec: InputSpec):
        self._graph, self._tensors, self._spec = graph, tensors, spec
        self._given = int(graph.main.inputs[0])
        self._interpreter = None
        if any(tensor != self._given for tensor in tensors):
            make = load_runtime("ai-edge-litert").interpreter
            self._interpreter = make(model_content=graph.cut(upto, tensors), num_threads=2)
            self._interpreter.allocate_tensors()

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        given = self._raw_input(image)
        if self._interpreter is None:
            return [self._graph.values(given, self._given) for _ in self._tensors]
        details = self._interpreter.get_input_details()[0]
        self._interpreter.set_tensor(details["index"], given)
        self._interpreter.invoke()
        found = [self._interpreter.get_tensor(d["index"]) for d in self._interpreter.get_output_details()]
        return [self._graph.values(raw, tensor) for raw, tensor in zip(found, self._tensors)]

    def _raw_input(self, image: np.ndarray) -> np.ndarray:
        values = self._spec.normalize(image[None])
        dtype = self._graph.dtype(self._given)
        if dtype == np.float32:
            return values
        scales, zeros = self._graph.scale(self._given)
        limits = np.iinfo(dtype)
        return np.clip(np.round(values / np.float32(scales[0])) + zeros[0], limits.min, limits.max).astype(dtype)


def moments(
    floats: Graph, layer: Layer, quantized: Graph, twin: Layer, images: np.ndarray, spec: InputSpec, *,
    weights: np.ndarray, bias: np.ndarray, seed: int = 0,
) -> Moments:  # fmt: skip
    """The moments of a layer's inputs over images (uint8, (count, height, width, channels)).

    weights, bias: the float layer's, which say where a depthwise layer's activation is saturated: what lies far
    outside its limits counts little, because no error there is seen.
    """
    there = Tap(floats, layer.operator, [layer.input], spec)
    here = Tap(quantized, twin.operator, [twin.input], spec)
    random = np.random.default_rng(seed)
    pairs = (_sampled(there(image)[0], here(image)[0], layer, random) for image in images)
    return _depthwise(pairs, layer, weights, bias) if layer.depthwise else _dense(pairs)


def _dense(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> Moments:
    count, sums = 0, None
    for true, seen in pairs:
        true, seen = (rows.reshape(len(rows), -1) for rows in (true, seen))
        parts = (true.sum(0), seen.sum(0), seen.T @ seen)
        sums = [p.astype(np.float64) for p in parts] if sums is None else [a + b for a, b in zip(sums, parts)]
        count += len(true)
    true, seen, within = (total / count for total in sums)
    return Moments(true, seen, within - np.outer(seen, seen))


def _depthwise(pairs, layer: Layer, weights: np.ndarray, bias: np.ndarray) -> Moments:
    low, high = _limits(layer.activation)
    kernel = weights.reshape(-1, weights.shape[-1])
    sums = None
    for true, seen in pairs:
        if layer.multiplier > 1:
            true, seen = (np.repeat(rows, layer.multiplier, axis=2) for rows in (true, seen))
        counted = np.ones((len(true), kernel.shape[1]), np.float32)
        if low is not None:
            answer = np.einsum("ptc,tc->pc", true, kernel, optimize=True) + bias
            counted = np.where((answer > low) & (answer < high), 1, 0.02).astype(np.float32)
        true, seen = true.transpose(2, 1, 0), seen.transpose(2, 1, 0)
        weighed_true, weighed = true * counted.T[:, None], seen * counted.T[:, None]
        parts = (counted.sum(0), weighed_true.sum(2), weighed.sum(2), weighed @ seen.transpose(0, 2, 1))
        sums = [p.astype(np.float64) for p in parts] if sums is None else [a + b for a, b in zip(sums, parts)]
    count = sums[0][:, None]
    true, seen = sums[1] / count, sums[2] / count
    return Moments(true, seen, sums[3] / count[..., None] - seen[:, :, None] * seen[:, None])


def _limits(activation: str) -> tuple[float | None, float | None]:
    """Where an activation's slope is not 0, with a margin of a twentieth of ReLU6's range."""
    return {"RELU": (-0.3, np.inf), "RELU6": (-0.3, 6.3), "RELU_N1_TO_1": (-1.1, 1.1)}.get(activation, (None, None))


def _sampled(true: np.ndarray, seen: np.ndarray, layer: Layer, random) -> tuple[np.ndarray, np.ndarray]:
    """(positions, taps, channels) of both, at the same positions."""
    if layer.op == "FULLY_CONNECTED":
        return tuple(rows.reshape(-1, 1, rows.shape[-1]) for rows in (true, seen))
    rows, columns = _starts(true.shape, layer)
    size = len(rows) * len(columns)
    chosen = np.arange(size) if size <= POSITIONS else random.choice(size, POSITIONS, replace=False)
    at = rows[chosen // len(columns)], columns[chosen % len(columns)]
    return tuple(_patches(values, layer, *at) for values in (true, seen))


def _starts(shape: tuple[int, ...], layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """The first row and column of every window, in the coordinates of the padded input."""
    found = []
    for size, window, stride, dilation in zip(shape[1:3], layer.window, layer.stride, layer.dilation):
        reach = (window - 1) * dilation + 1
        count = -(-size // stride) if layer.same_padding else (size - reach) // stride + 1
        found.append(np.arange(count) * stride)
    return tuple(found)


def _patches(values: np.ndarray, layer: Layer, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    if layer.same_padding:
        around = []
        for size, window, stride, dilation in zip(values.shape[1:3], layer.window, layer.stride, layer.dilation):
            needed = max((-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size, 0)
            around.append((needed // 2, needed - needed // 2))
        values = np.pad(values, ((0, 0), *around, (0, 0)))
    taps = [
        values[0, rows + i * layer.dilation[0], columns + j * layer.dilation[1]]
        for i in range(layer.window[0])
        for j in range(layer.window[1])
    ]
    return np.stack(taps, axis=1)
