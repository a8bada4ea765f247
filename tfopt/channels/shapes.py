"""Rules of what moves values without changing them: reshaping, flattening, transposing, concatenating."""

from __future__ import annotations

import math

import keras
import numpy as np

from tfopt.channels.ids import SHAPE, Label
from tfopt.channels.rules import rule

kinds = keras.layers


def reshaped(walk, node, before=None) -> Label | None:
    """Row-major reshaping of everything behind the batch.

    (H, W, C) to (H·W·C): each channel owns every C-th place. (C,) to (g, n): one axis can get shorter, so the channels
    of one column are tied, along the axis that leaves the most to choose from.
    before: the label and the shape of the input, where they are not simply those of its tensor.
    """
    tensor, out = node.input_tensors[0], node.outputs[0]
    label, shape = before or (walk.label(tensor), tuple(tensor.shape))
    after = tuple(out.shape)
    if label is None:
        return walk.fixed(out, f"{node.operation.name} makes them of an axis that has none")
    count = label.ids.size
    if label.axis == len(shape) - 1 and after[-1] == count:
        return Label(len(after) - 1, label.ids)
    inside, wanted = shape[1:], after[1:]
    if None in inside or None in wanted or math.prod(inside) != math.prod(wanted) or count == 1:
        walk.keep_inputs(node, f"{node.operation.name} cannot be followed: {shape} becomes {after}", SHAPE)
        return walk.fixed(out, f"{node.operation.name} cannot be followed", SHAPE)
    places = label.ids.reshape([-1 if axis == label.axis - 1 else 1 for axis in range(len(inside))])
    places = np.broadcast_to(places, inside).reshape(wanted)
    varying = [axis for axis in range(len(wanted)) if (places != places.take([0], axis)).any()]
    axis = varying[0] if len(varying) == 1 else max(varying, key=lambda axis: (_choices(places, axis), axis))
    rows = np.moveaxis(places, axis, -1).reshape(-1, wanted[axis])
    ids = rows[0]
    if len(varying) > 1:
        for row in np.unique(rows, axis=0):
            walk.all.tie(ids, row)
    return Label(axis + 1, ids)


def _choices(places: np.ndarray, axis: int) -> int:
    """How many units are left if all places of equal index along the axis are tied."""
    rows = np.unique(np.moveaxis(places, axis, -1).reshape(-1, places.shape[axis]), axis=0)
    parent: dict = {}

    def find(x):
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    for row in rows:
        for index, found in enumerate(row.tolist()):
            parent[find(("id", found))] = find(("place", index))
    return sum(find(key) == key for key in list(parent))


def _shorter(shape, axis: int, ids: np.ndarray, keep) -> tuple:
    """A target shape with the axis as long as what stays of it; -1 works itself out."""
    return tuple(keep.count(ids) if i == axis and n != -1 else n for i, n in enumerate(shape))


@rule(kinds.Reshape)
def reshape_layer(walk, node):
    layer, label = node.operation, reshaped(walk, node)
    if label is not None:
        walk.use(layer, None, label.axis, label.ids, "along")
        target = layer.target_shape
        walk.settings(layer, lambda keep: {"target_shape": _shorter(target, label.axis - 1, label.ids, keep)})
    return label


@rule("Reshape")
def reshape_call(walk, node):
    label = reshaped(walk, node)
    if label is None:
        return None
    target = node.operation.newshape
    target = (target,) if isinstance(target, int) else tuple(target)

    def call(keep, rebuild, node):
        made = _shorter(target, label.axis, label.ids, keep)
        return rebuild.apply(type(node.operation)(made, name=node.operation.name), *_arguments(node))

    walk.edit(node, call)
    return label


@rule(kinds.Flatten, "Ravel")
def flatten(walk, node):
    tensor = node.input_tensors[0]
    label, shape = walk.label(tensor), tuple(tensor.shape)
    if getattr(node.operation, "data_format", None) == "channels_first" and len(shape) > 2 and label is not None:
        # The layer moves the channels to the end before it flattens.
        order = (0, *range(2, len(shape)), 1)
        label, shape = Label(order.index(label.axis), label.ids), tuple(shape[axis] for axis in order)
    return reshaped(walk, node, (label, shape))


def transposed(walk, node, order) -> Label | None:
    """order: for each axis of the output, which axis of the input it is, the batch included."""
    label = walk.label(node.input_tensors[0])
    if label is None:
        return walk.fixed(node.outputs[0], f"{node.operation.name} makes them of an axis that has none")
    axis = list(order).index(label.axis)
    if axis == 0:
        raise ValueError("the batch and the channels change places")
    return Label(axis, label.ids)


@rule(kinds.Permute)
def permute(walk, node):
    return transposed(walk, node, (0, *node.operation.dims))


@rule("Transpose")
def transpose(walk, node):
    rank = len(node.input_tensors[0].shape)
    axes = node.operation.axes
    return transposed(walk, node, [axis % rank for axis in axes] if axes is not None else range(rank)[::-1])


@rule("Swapaxes")
def swapaxes(walk, node):
    rank = len(node.input_tensors[0].shape)
    order, one, other = list(range(rank)), node.operation.axis1 % rank, node.operation.axis2 % rank
    order[one], order[other] = other, one
    return transposed(walk, node, order)


@rule("Moveaxis")
def moveaxis(walk, node):
    rank = len(node.input_tensors[0].shape)

    source, target = (np.atleast_1d(value) % rank for value in (node.operation.source, node.operation.destination))
    order = [axis for axis in range(rank) if axis not in source.tolist()]
    for place, axis in sorted(zip(target.tolist(), source.tolist())):
        order.insert(place, axis)
    return transposed(walk, node, order)


@rule("ExpandDims")
def expand_dims(walk, node):
    label, rank = walk.label(node.input_tensors[0]), len(node.outputs[0].shape)
    if label is None:
        return walk.fixed(node.outputs[0], f"{node.operation.name} makes them of an axis that has none")
    axes = node.operation.axis if isinstance(node.operation.axis, (list, tuple)) else [node.operation.axis]
    new = {axis % rank for axis in axes}
    old = [axis for axis in range(rank) if axis not in new]
    return Label(old[label.axis], label.ids)


@rule("Squeeze")
def squeeze(walk, node):
    tensor, label = node.input_tensors[0], walk.label(node.input_tensors[0])
    rank, axes = len(tensor.shape), node.operation.axis
    if axes is None:
        gone = {axis for axis in range(rank) if tensor.shape[axis] == 1}
    else:
        gone = {axis % rank for axis in (axes if isinstance(axes, (list, tuple)) else [axes])}
    if label is None or label.axis in gone:
        walk.keep_inputs(node, f"{node.operation.name} takes their axis away", SHAPE)
        return walk.fixed(node.outputs[0], f"{node.operation.name} took their axis away", SHAPE)
    return Label(label.axis - sum(axis < label.axis for axis in gone), label.ids)


@rule(kinds.RepeatVector)
def repeat_vector(walk, node):
    return Label(2, walk.ids(node, 1))


@rule(kinds.Concatenate, "Concatenate")
def concatenate(walk, node):
    """Along the channels one after the other; along another axis channel by channel."""
    rank, name = len(node.outputs[0].shape), node.operation.name
    axis = node.operation.axis % rank
    labels = [walk.label(tensor) for tensor in node.input_tensors]
    axes = {label.axis for label in labels if label is not None and not walk.all.is_fixed(label.ids)}
    if axis in axes or not axes:
        parts = [walk.along(tensor, axis, name) for tensor in node.input_tensors]
        return Label(axis, np.concatenate(parts))
    shared = max(axes)
    parts = [walk.along(tensor, shared, name) for tensor in node.input_tensors]
    for part in parts[1:]:
        walk.all.tie(parts[0], part)
    return Label(shared, parts[0])


def _arguments(node) -> tuple:
    return node.arguments.args, node.arguments.kwargs
