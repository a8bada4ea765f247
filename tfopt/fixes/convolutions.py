"""Convolutions and batch norms in forms that a delegate takes."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from tfopt.fixes.plan import Fix, Plan
from tfopt.rebuild import KERNELS, View

_LAST = "channels_last"


def norm_affine(layer: keras.layers.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    """(scale, offset), float64 of (channels,): what a batch norm does at inference, x * scale + offset."""
    values = lambda variable: np.asarray(ops.convert_to_numpy(variable), np.float64)
    mean, variance = values(layer.moving_mean), values(layer.moving_variance)
    scale = (values(layer.gamma) if layer.scale else 1.0) / np.sqrt(variance + layer.epsilon)
    offset = (values(layer.beta) if layer.center else 0.0) - mean * scale
    return np.broadcast_to(scale, mean.shape), np.broadcast_to(offset, mean.shape)


def is_norm(node) -> bool:
    """Whether a call is a batch norm of images' channels (axis -1 of 4)."""
    layer = node.operation
    if not isinstance(layer, keras.layers.BatchNormalization) or len(node.input_tensors[0].shape) != 4:
        return False
    return layer.axis in (-1, 3) and node.arguments.kwargs.get("mask") is None


def _norms(view: View, spec) -> Plan:
    plan = Plan()
    for node in view.nodes:
        if is_norm(node) and not _follows_kernel(view, node):
            plan.change(node, _depthwise_norm)
    return plan


def _follows_kernel(view: View, node) -> bool:
    """Whether the converter joins this batch norm with the weights before it."""
    before = view.producer(node.input_tensors[0])
    if before is None or not isinstance(before.operation, KERNELS):
        return False
    return before.operation.activation is keras.activations.linear and view.reader(node.input_tensors[0]) is node


def _depthwise_norm(make, node):
    layer = node.operation
    scale, offset = norm_affine(layer)
    weights = [scale.reshape(1, 1, -1, 1).astype(np.float32), offset.astype(np.float32)]
    x = make.value(node.input_tensors[0])
    build = lambda name: keras.layers.DepthwiseConv2D(1, dtype=layer.dtype_policy, name=name)
    return make.layer(layer.name, build, x, weights)


def _dilations(view: View, spec) -> Plan:
    plan = Plan()
    kinds = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D)
    for node in view.nodes:
        layer = node.operation
        # Conv2DTranspose is no subclass of these.
        if isinstance(layer, kinds) and layer.dilation_rate[0] != layer.dilation_rate[1]:
            plan.change(node, _spread)
    return plan


def _spread(make, node):
    """The same taps in a kernel with zeros between them, as far as the two dilations differ."""
    layer = node.operation
    kernel, *rest = layer.get_weights()
    # With one row (or column) there is nothing to spread, and its dilation may be anything.
    rates = [rate if size > 1 else 0 for rate, size in zip(layer.dilation_rate, kernel.shape)]
    shared = math.gcd(*rates) or 1
    steps = [max(rate // shared, 1) for rate in rates]
    size = [(n - 1) * step + 1 for n, step in zip(kernel.shape, steps)]
    wide = np.zeros((*size, *kernel.shape[2:]), kernel.dtype)
    wide[:: steps[0], :: steps[1]] = kernel
    copy = make.keep(layer, [wide, *rest], kernel_size=tuple(size), dilation_rate=(shared, shared))
    return copy(make.value(node.input_tensors[0]))


def _groups(view: View, spec) -> Plan:
    plan = Plan()
    for node in view.nodes:
        layer = node.operation
        if not isinstance(layer, keras.layers.Conv2D) or layer.groups == 1:
            continue
        if layer.data_format != _LAST:
            plan.refuse(node, "its images have their channels first")
            continue
        norm = view.reader(node.outputs[0])
        alone = norm is not None and is_norm(norm) and layer.activation is keras.activations.linear
        # Behind the concatenation the batch norm would be left on its own.
        if alone and view.calls(layer) == 1 and view.calls(norm.operation) == 1:
            plan.change(node, lambda make, node, norm=norm: _branches(make, node, norm_affine(norm.operation)))
            plan.change(norm, lambda make, node: make.value(node.input_tensors[0]))
        else:
            plan.change(node, _branches)
    return plan


def _branches(make, node, affine: tuple[np.ndarray, np.ndarray] | None = None):
    """One convolution a group, or one depthwise convolution where each input channel is a group.

    affine: the scale and the offset of the batch norm that goes into the weights.
    """
    layer, x = node.operation, make.value(node.input_tensors[0])
    kernel, *bias = layer.get_weights()
    if affine:
        scale, offset = affine
        bias = [((bias[0] if bias else 0.0) * scale + offset).astype(kernel.dtype)]
        kernel = (kernel * scale).astype(kernel.dtype)
    config = {**layer.get_config(), "use_bias": bool(bias), "groups": 1}
    count = layer.groups
    if count == x.shape[-1] and layer.strides[0] == layer.strides[1]:
        keys = ("kernel_size", "strides", "padding", "dilation_rate", "activation", "use_bias", "dtype", "trainable")
        config = {key: config[key] for key in keys} | {"depth_multiplier": layer.filters // count}
        shaped = kernel.reshape(*kernel.shape[:2], count, layer.filters // count)
        build = lambda name: keras.layers.DepthwiseConv2D.from_config({**config, "name": name})
        return make.layer(layer.name, build, x, [shaped, *bias])
    config["filters"] = layer.filters // count
    parts = make.op(ops.split, x, count, axis=-1, name=f"{layer.name}_split")
    made = []
    for number, part in enumerate(parts):
        mine = slice(number * config["filters"], (number + 1) * config["filters"])
        weights = [kernel[..., mine], *(values[mine] for values in bias)]
        build = lambda name: keras.layers.Conv2D.from_config({**config, "name": name})
        made.append(make.layer(f"{layer.name}_group{number}", build, part, weights))
    return make.layer(layer.name, lambda name: keras.layers.Concatenate(name=name), made)


BATCH_NORM = Fix(
    "batch_norm", "a batch norm that follows no convolution as a depthwise 1 x 1 convolution",
    ("edgetpu", "gpu"), ("MUL", "ADD"), ("DEPTHWISE_CONV_2D",), _norms,
)  # fmt: skip
DILATION = Fix(
    "dilation", "unequal dilations as one dilation and zeros in the kernel: more multiplications, same answer",
    ("edgetpu",), (), ("CONV_2D", "DEPTHWISE_CONV_2D"), _dilations,
)  # fmt: skip
GROUPS = Fix(
    "groups", "grouped convolutions as a split, a convolution a group and a concatenation, or as a depthwise one",
    ("edgetpu",), (), ("SPLIT", "CONV_2D", "CONCATENATION", "DEPTHWISE_CONV_2D"), _groups,
)  # fmt: skip
