"""Rules of the layers that mix or scale channels: convolutions, dense layers, normalizations.

Shapes of kernels, i channels in, o out, g groups, m the depth multiplier:
Conv (k, k, i/g, o); transposed (k, k, o, i); depthwise (k, k, i, m); separable (k, k, i, m) and (1, 1, i·m, o);
Dense (i, o); EinsumDense by its equation, such as ab,bc->ac.
"""

from __future__ import annotations

import re

import keras
import numpy as np

from tfopt.channels.ids import UNSUPPORTED, Label, Reason
from tfopt.channels.rules import by_channel, channel_axis, opaque, rule

kinds = keras.layers


def _changed(layer) -> bool:
    """Whether more than the usual weights compute the answer: low-rank updates, stored int8."""
    return bool(getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None))


def _bias(walk, layer, ids: np.ndarray, role: str = "out") -> None:
    if getattr(layer, "bias", None) is not None:
        walk.use(layer, layer.bias, 0, ids, role, "bias")


@rule(kinds.Dense)
def dense(walk, node):
    layer = node.operation
    if _changed(layer):
        return opaque(walk, node)
    read = walk.ids(node, -1)
    made = walk.born(layer, layer.units)
    walk.use(layer, layer.kernel, 0, read, "in", "kernel")
    walk.use(layer, layer.kernel, 1, made, "out", "kernel")
    _bias(walk, layer, made)
    walk.settings(layer, lambda keep: {"units": keep.count(made)})
    return Label(len(node.outputs[0].shape) - 1, made)


@rule(kinds.EinsumDense)
def einsum_dense(walk, node):
    """Where one letter is summed over and one is new: ab,bc->ac, abc,cd->abd, ...x,xy->...y."""
    layer = node.operation
    found = re.fullmatch(r"(\.\.\.)?([a-zA-Z]+),([a-zA-Z]{2})->(\.\.\.)?([a-zA-Z]+)", layer.equation.replace(" ", ""))
    if not found or _changed(layer):
        return opaque(walk, node)
    before, (old, new), after = found[2], found[3], found[5]
    if before.count(old) != 1 or new in before or before.replace(old, "") != after.replace(new, "", 1):
        return opaque(walk, node)
    if after[-1] != new or set(layer.bias_axes or "") - {new}:
        return opaque(walk, node)
    read = walk.ids(node, before.index(old) - len(before))
    made = walk.born(layer, int(node.outputs[0].shape[-1]))
    walk.use(layer, layer.kernel, 0, read, "in", "kernel")
    walk.use(layer, layer.kernel, 1, made, "out", "kernel")
    _bias(walk, layer, made)
    shape = layer.partial_output_shape
    walk.settings(layer, lambda keep: {"output_shape": (*shape[:-1], keep.count(made))})
    return Label(len(node.outputs[0].shape) - 1, made)


@rule(kinds.Conv1D, kinds.Conv2D, kinds.Conv3D)
def convolution(walk, node):
    layer, axis = node.operation, channel_axis(node.operation, len(node.outputs[0].shape))
    if _changed(layer):
        return opaque(walk, node)
    read = walk.ids(node, axis)
    groups, filters = layer.groups, layer.filters
    if groups > 1 and len(read) == groups:
        return _one_each(walk, layer, read, axis)
    made = walk.born(layer, filters)
    if groups > 1:
        # What stays must be as much in each group, so the groups lose channels of the same places.
        _same_places(walk, read, groups)
        _same_places(walk, made, groups)
    walk.use(layer, layer.kernel, -2, read[: len(read) // groups], "in", "kernel")
    walk.use(layer, layer.kernel, -1, made, "out", "kernel")
    _bias(walk, layer, made)
    walk.settings(layer, lambda keep: {"filters": keep.count(made)})
    return Label(axis, made)


def _same_places(walk, ids: np.ndarray, groups: int) -> None:
    rows = ids.reshape(groups, -1)
    for row in rows[1:]:
        walk.all.tie(rows[0], row)


def _one_each(walk, layer, read: np.ndarray, axis: int) -> Label:
    """A group for each channel: a depthwise convolution by another name."""
    made = np.repeat(read, layer.filters // layer.groups)
    walk.use(layer, layer.kernel, -1, made, "along", "kernel")
    _bias(walk, layer, made, "along")
    walk.settings(layer, lambda keep: {"filters": keep.count(made), "groups": keep.count(read)})
    if not by_channel(layer.activation):
        walk.all.fix(made, Reason(UNSUPPORTED, f"{layer.name} ends in what mixes channels"))
    return Label(axis, made)


@rule(kinds.Conv1DTranspose, kinds.Conv2DTranspose, kinds.Conv3DTranspose)
def transposed(walk, node):
    layer, axis = node.operation, channel_axis(node.operation, len(node.outputs[0].shape))
    if _changed(layer) or getattr(layer, "groups", 1) != 1:
        return opaque(walk, node)
    read, made = walk.ids(node, axis), walk.born(layer, layer.filters)
    walk.use(layer, layer.kernel, -1, read, "in", "kernel")
    walk.use(layer, layer.kernel, -2, made, "out", "kernel")
    _bias(walk, layer, made)
    walk.settings(layer, lambda keep: {"filters": keep.count(made)})
    return Label(axis, made)


@rule(kinds.DepthwiseConv1D, kinds.DepthwiseConv2D)
def depthwise(walk, node):
    layer, axis = node.operation, channel_axis(node.operation, len(node.outputs[0].shape))
    read = walk.ids(node, axis)
    made = np.repeat(read, layer.depth_multiplier)
    walk.use(layer, layer.kernel, -2, read, "along", "kernel")
    _bias(walk, layer, made, "along")
    if not by_channel(layer.activation):
        walk.all.fix(made, Reason(UNSUPPORTED, f"{layer.name} ends in what mixes channels"))
    return Label(axis, made)


@rule(kinds.SeparableConv1D, kinds.SeparableConv2D)
def separable(walk, node):
    layer, axis = node.operation, channel_axis(node.operation, len(node.outputs[0].shape))
    read, made = walk.ids(node, axis), walk.born(layer, layer.filters)
    walk.use(layer, layer.depthwise_kernel, -2, read, "in", "kernel")
    walk.use(layer, layer.pointwise_kernel, -2, np.repeat(read, layer.depth_multiplier), "in", "kernel")
    walk.use(layer, layer.pointwise_kernel, -1, made, "out", "kernel")
    _bias(walk, layer, made)
    walk.settings(layer, lambda keep: {"filters": keep.count(made)})
    return Label(axis, made)


@rule(kinds.BatchNormalization)
def batch_norm(walk, node):
    """Its statistics are those of each channel, so the others do not notice."""
    layer, tensor = node.operation, node.input_tensors[0]
    label = walk.label(tensor)
    axis = layer.axis % len(tensor.shape)
    if label is None or label.axis != axis:
        return label
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        variable = getattr(layer, name, None)
        if variable is not None:
            walk.use(layer, variable, 0, label.ids, "along", "scale" if name == "gamma" else "other")
    return label


@rule(kinds.GroupNormalization)
def group_norm(walk, node):
    """Statistics of each group of neighbours: a whole group can go and the others do not notice."""
    layer, tensor = node.operation, node.input_tensors[0]
    axis = layer.axis % len(tensor.shape)
    ids = walk.ids(node, axis)
    rows = ids.reshape(layer.groups, -1)
    for column in rows.T[1:]:
        walk.all.tie(rows[:, 0], column)
    for variable in (layer.gamma, layer.beta):
        if variable is not None:
            walk.use(layer, variable, 0, ids, "along", "scale" if variable is layer.gamma else "other")
    walk.settings(layer, lambda keep: {"groups": keep.count(rows[:, 0])})
    return Label(axis, ids)


@rule(kinds.LayerNormalization, kinds.RMSNormalization, kinds.UnitNormalization)
def layer_norm(walk, node):
    layer, tensor = node.operation, node.input_tensors[0]
    label = walk.label(tensor)
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if label is not None and label.axis in [axis % len(tensor.shape) for axis in axes]:
        what = f"{layer.name} ({type(layer).__name__}) divides by a mean over them"
        walk.keep_inputs(node, what)
    return label


@rule(kinds.PReLU)
def prelu(walk, node):
    layer, label = node.operation, walk.label(node.input_tensors[0])
    if label is not None and label.axis not in (layer.shared_axes or ()) and label.ids.size > 1:
        walk.use(layer, layer.alpha, label.axis - 1, label.ids, "along")
    return label


def layer_scale(walk, node):
    """ConvNeXt's factor for each channel (Touvron et al. 2021, arXiv:2103.17239)."""
    layer, ids = node.operation, walk.ids(node, -1)
    walk.use(layer, layer.gamma, 0, ids, "along")
    walk.settings(layer, lambda keep: {"projection_dim": keep.count(ids)})
    return Label(len(node.outputs[0].shape) - 1, ids)


def _applications() -> None:
    """The layers that keras.applications keeps to itself."""
    from keras.src.applications import convnext, inception_resnet_v2

    from tfopt.channels.values import elementwise, unchanged

    rule(convnext.LayerScale)(layer_scale)
    rule(convnext.StochasticDepth)(unchanged)
    rule(inception_resnet_v2.CustomScaleLayer)(elementwise)


_applications()
