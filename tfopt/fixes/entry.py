"""What stands before the first convolution: scaling inside the model, and the batch size."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
from keras import ops

from mobile_bench.inputs import SCALINGS, InputSpec
from tfopt.fixes.plan import Fix, Plan
from tfopt.rebuild import View, graph_of

_FIRST = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
Affine = tuple[np.ndarray, np.ndarray]


def _affine(node) -> Affine | None:
    """(scale, offset), float64 of (channels,), of a Rescaling or Normalization; None for all else."""
    layer, shape = node.operation, node.outputs[0].shape
    if isinstance(layer, keras.layers.Rescaling):
        scale, offset = np.asarray(layer.scale, np.float64), np.asarray(layer.offset, np.float64)
    elif isinstance(layer, keras.layers.Normalization):
        mean, variance = (np.asarray(ops.convert_to_numpy(v), np.float64) for v in (layer.mean, layer.variance))
        deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
        scale, offset = (deviation, mean) if layer.invert else (1 / deviation, -mean / deviation)
    else:
        return None
    if len(shape) != 4 or any(part.size not in (1, shape[-1]) for part in (scale, offset)):
        return None
    return tuple(np.broadcast_to(part.reshape(-1), (shape[-1],)) for part in (scale, offset))


def _rescaling(view: View, spec: InputSpec | None) -> Plan:
    plan = Plan(spec=spec)
    first = {id(tensor) for tensor in view.entries()}
    for node in view.nodes:
        if not isinstance(node.operation, (keras.layers.Rescaling, keras.layers.Normalization)):
            continue
        affine = _affine(node)
        if affine is None:
            plan.refuse(node, "it does not scale channel by channel")
            continue
        after = view.reader(node.outputs[0])
        why = _no_fold(view, node, after, affine)
        if not why:
            plan.change(node, _pass)
            plan.change(after, lambda make, node, affine=affine: _fold(make, node, affine))
            continue
        # The model's input, or what is left of it once the layers before are gone.
        at_entry = id(node.input_tensors[0]) in first and view.reader(node.input_tensors[0]) is node
        if at_entry and view.calls(node.operation) == 1 and plan.spec is not None and (affine[0] > 0).all():
            plan.spec = _moved(plan.spec, affine)
            plan.change(node, _pass)
            first |= {id(tensor) for tensor in _onwards(view, node.outputs[0])}
        else:
            place = "it is not the first layer" if not at_entry else "its scale is not positive, or the input unknown"
            plan.refuse(node, f"{why}, and {place}, so its scaling cannot move into the input spec")
    return plan


def _onwards(view: View, tensor):
    """The tensor, and the input of a nested model that alone reads it."""
    yield tensor
    node = view.reader(tensor)
    inner = graph_of(node.operation) if node is not None else None
    if inner is not None and view.calls(node.operation) == 1:
        yield from inner.inputs[:1]


def _pass(make, node):
    return make.value(node.input_tensors[0])


def _no_fold(view: View, node, after, affine: Affine) -> str:
    """Why the scaling cannot go into the weights of the convolution after it; '' where it can."""
    layer = after.operation if after is not None else None
    if not isinstance(layer, _FIRST) or layer.data_format != "channels_last":
        return "no convolution alone reads what it gives"
    if view.calls(layer) != 1 or view.calls(node.operation) != 1:
        return "it or the convolution after it is used more than once"
    if getattr(layer, "groups", 1) != 1:
        return "the convolution after it is grouped"
    pads = layer.padding != "valid" and any(n > 1 for n in layer.kernel.shape[:2])
    if pads and affine[1].any():
        return f"the zeros around the image of {layer.name} are added after its offset"
    return ""


def _fold(make, node, affine: Affine):
    """conv(k, s x + o) = conv(k s, x) + the sum of k o."""
    layer = node.operation
    kernel, *bias = (np.asarray(array, np.float64) for array in layer.get_weights())
    scale, offset = (part.reshape(-1, 1) for part in affine)
    # (height, width, in, out), of a depthwise convolution (height, width, in, multiplier).
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    moved = (kernel * offset).sum((0, 1)).reshape(-1) if depthwise else (kernel * offset).sum((0, 1, 2))
    total = moved + (bias[0] if bias else 0.0)
    weights = [(kernel * scale).astype(np.float32), total.astype(np.float32)]
    if not bias and not moved.any():
        return make.keep(layer, weights[:1])(make.value(node.input_tensors[0]))
    return make.keep(layer, weights, use_bias=True)(make.value(node.input_tensors[0]))


def _moved(spec: InputSpec, affine: Affine) -> InputSpec:
    """The spec that gives s (p - mean) / std + o of a pixel p: mean - o std / s, and std / s."""
    scale, offset = affine
    std = np.asarray(spec.std) / scale
    mean = np.asarray(spec.mean) - offset * std
    made = dataclasses.replace(spec, mean=_written(mean), std=_written(std))
    for name in SCALINGS:
        named = made.with_scaling(name)
        if named.order == made.order and _close(named.mean, made.mean) and _close(named.std, made.std):
            return named
    return made


def _written(values: np.ndarray) -> tuple[float, ...]:
    """Without the last digits, which are rounding; one value where all channels have the same."""
    short = [float(f"{value:.7g}") for value in values]
    return tuple(short[:1] if len(set(short)) == 1 else short)


def _close(one, other) -> bool:
    return np.allclose(*np.broadcast_arrays(one, other), rtol=1e-6, atol=1e-5)


def _static(view: View, spec) -> Plan:
    image = view.model.inputs[0]
    return Plan(batch=1, layers=[image.name]) if image.shape[0] is None else Plan()


RESCALING = Fix(
    "rescaling", "Rescaling and Normalization into the next convolution, or else into the input spec",
    ("edgetpu", "gpu"), ("MUL", "ADD", "SUB"), (), _rescaling,
)  # fmt: skip
STATIC_BATCH = Fix(
    "static_batch", "the batch size 1 in the Keras model itself, for converters that do not fix it (ours does)",
    ("edgetpu", "gpu"), ("SHAPE", "STRIDED_SLICE", "PACK"), (), _static, in_all=False,
)  # fmt: skip
