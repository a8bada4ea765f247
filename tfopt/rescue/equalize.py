"""Cross-layer equalization: use the whole range of every activation tensor in every channel.

Between two layers, channel c may be scaled by s_c in the first and by 1 / s_c in the second without changing the
answer, as long as no activation cuts it off (Nagel et al. 2019, arXiv:1906.04721, section 4.1). There the weights'
ranges are made equal, which per-channel weights do not need. Here the tensors between keep their scales, and channels
that use little of them are raised: by as much as fits for a depthwise consumer, whose weights have a scale for each
channel; for others until what the activations' steps and what the weights' steps cost are balanced:
s_c^4 = (step_a^2 sum_o w_oc^2) / (E[x_c^2] sum_o step_o^2).
"""

from __future__ import annotations

import numpy as np

from mobile_bench.inputs import InputSpec
from tfopt.rescue.graph import Graph, Layer
from tfopt.rescue.moments import Tap
from tfopt.rescue.refit import as_rows, rounded_to_nearest, twins

#: Other images may have larger values than these.
HEADROOM = 1.25
#: Activations that scale with their input, at least upwards.
_SCALABLE = ("NONE", "RELU", "RELU6")
#: Operators through which a channel's scale passes.
_THROUGH = ("MEAN", "AVERAGE_POOL_2D", "MAX_POOL_2D", "RESHAPE")


def equalize(floats: Graph, quantized: Graph, images: np.ndarray, spec: InputSpec) -> int:
    """Change both files in place, the weights rounded to nearest; how many channels were scaled.

    images: uint8 (count, height, width, channels).
    """
    pairs = twins(floats, quantized)
    found = _neighbours(floats, quantized, pairs)
    if not found:
        return 0
    tensors = sorted({tensor for _, _, path in found for tensor, _ in path})
    tap = Tap(floats, len(floats.main.operators), tensors, spec)
    low, high, square = ({tensor: None for tensor in tensors} for _ in range(3))
    for image in images:
        for tensor, values in zip(tensors, tap(image)):
            rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
            for kept, new, join in (
                (low, rows.min(0), np.minimum), (high, rows.max(0), np.maximum), (square, np.mean(rows**2, 0), np.add),
            ):  # fmt: skip
                kept[tensor] = new if kept[tensor] is None else join(kept[tensor], new)
    changed = 0
    for first, second, path in found:
        most = np.full(len(low[path[0][0]]), np.inf)
        for tensor, twin in path:
            bottom, top = _range(quantized, twin)
            with np.errstate(divide="ignore", invalid="ignore"):
                room = np.minimum(
                    np.where(high[tensor] > 0, top / (HEADROOM * high[tensor]), np.inf),
                    np.where(low[tensor] < 0, bottom / (HEADROOM * low[tensor]), np.inf),
                )
            most = np.minimum(most, room)
        # A channel that is always 0 has nothing to gain.
        most = np.where(np.isfinite(most), most, 1.0)
        tensor, twin = path[-1]
        scale = most
        if not second[0].depthwise:
            weights = as_rows(floats.array(second[0].weights), second[0]).reshape(
                len(floats.array(second[0].weights)), -1, len(most)
            )
            steps = np.abs(weights).max(axis=(1, 2)) / 127
            activations = quantized.scale(twin)[0][0] ** 2 * np.sum(weights**2, axis=(0, 1))
            power = square[tensor] / len(images) * np.sum(steps**2) * weights.shape[1]
            scale = np.minimum(most, (activations / np.maximum(power, 1e-30)) ** 0.25)
        scale = np.maximum(scale, 1.0)
        _scale_outputs(floats, first[0], scale)
        _scale_inputs(floats, second[0], scale)
        changed += int(np.sum(scale > 1.001))
    if changed:
        for layer, twin in pairs:
            rounded_to_nearest(floats, layer, quantized, twin)
    return changed


def _neighbours(floats: Graph, quantized: Graph, pairs: list) -> list:
    """(first pair, second pair, [(float tensor, quantized tensor) between]) where one layer alone feeds another."""
    readers: dict[int, list[int]] = {}
    for number, operator in enumerate(floats.main.operators):
        for tensor in map(int, operator.inputs):
            readers.setdefault(tensor, []).append(number)
    by_operator = {layer.operator: (layer, twin) for layer, twin in pairs}
    outputs = {int(t) for t in floats.main.outputs}
    found = []
    for layer, twin in pairs:
        tensor, path = layer.output, []
        while layer.activation in _SCALABLE and tensor not in outputs and len(readers.get(tensor, ())) == 1:
            same = quantized.find(floats.name(tensor))
            if same < 0 or not quantized.scale(same)[0].size:
                break
            path.append((tensor, same))
            number = readers[tensor][0]
            if number in by_operator:
                second = by_operator[number]
                if _can_take(floats, second[0], tensor):
                    found.append(((layer, twin), second, path))
                break
            operator = floats.main.operators[number]
            after = int(operator.outputs[0])
            same_channels = floats.main.tensors[tensor].shape[-1] == floats.main.tensors[after].shape[-1]
            if floats.op(number) not in _THROUGH or not same_channels or _over_last(floats, number):
                break
            tensor = after
    return found


def _over_last(floats: Graph, number: int) -> bool:
    """Whether an operator is a mean over channels."""
    operator = floats.main.operators[number]
    if floats.op(number) != "MEAN":
        return False
    rank = len(floats.main.tensors[int(operator.inputs[0])].shape)
    return not floats.is_constant(int(operator.inputs[1])) or bool(
        np.any(floats.array(int(operator.inputs[1])) % rank == rank - 1)
    )


def _can_take(floats: Graph, layer: Layer, tensor: int) -> bool:
    kernel, channels = floats.array(layer.weights).shape, floats.main.tensors[tensor].shape[-1]
    if layer.input != tensor or floats.dtype(layer.weights) != np.float32:
        return False
    return layer.multiplier == 1 and kernel[-1] == channels


def _range(quantized: Graph, tensor: int) -> tuple[float, float]:
    scale, zero = (float(part[0]) for part in quantized.scale(tensor))
    limits = np.iinfo(quantized.dtype(tensor))
    return (limits.min - zero) * scale, (limits.max - zero) * scale


def _scale_outputs(floats: Graph, layer: Layer, scale: np.ndarray) -> None:
    kernel = floats.array(layer.weights)
    floats.set_array(
        layer.weights, kernel * (scale if layer.depthwise else scale.reshape(-1, *[1] * (kernel.ndim - 1)))
    )
    if layer.bias >= 0:
        floats.set_array(layer.bias, floats.array(layer.bias) * scale)


def _scale_inputs(floats: Graph, layer: Layer, scale: np.ndarray) -> None:
    floats.set_array(layer.weights, floats.array(layer.weights) / scale)
