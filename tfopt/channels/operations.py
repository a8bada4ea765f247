"""Rules of those functions of keras.ops that take parts, add margins or sum up. The others stand with their layers."""

from __future__ import annotations

import numpy as np

from tfopt.channels.ids import SHAPE, Label
from tfopt.channels.rules import opaque, rule


@rule("Mean", "Sum", "Max", "Min", "Amax", "Amin", "Std", "Var", "Prod", "Any", "All", "Logsumexp", "Median")
def reduced(walk, node):
    """A mean over positions keeps the channels; one over the channels needs them all."""
    tensor, operation = node.input_tensors[0], node.operation
    rank, label, axes = len(tensor.shape), walk.label(tensor), operation.axis
    axes = range(rank) if axes is None else axes if isinstance(axes, (list, tuple)) else [axes]
    gone = {axis % rank for axis in axes}
    if label is None or label.axis in gone:
        walk.keep_inputs(node, f"{operation.name} ({type(operation).__name__}) takes them together")
        return walk.fixed(node.outputs[0], f"{operation.name} takes channels together")
    keepdims = getattr(operation, "keepdims", False)
    return Label(label.axis if keepdims else label.axis - sum(axis < label.axis for axis in gone), label.ids)


@rule("Pad")
def pad(walk, node):
    """Zeros in front of the channels and behind them are channels too, and go with those that they are added to."""
    tensor, operation = node.input_tensors[0], node.operation
    label, widths = walk.label(tensor), [tuple(pair) for pair in operation.pad_width]
    widths = widths * len(tensor.shape) if len(widths) == 1 else widths
    if label is None:
        return opaque(walk, node)[0]
    before, after = widths[label.axis]
    if not before and not after:
        return label
    if operation.mode != "constant" or min(before, after) < 0:
        return opaque(walk, node)[0]
    front, back = walk.all.new(before), walk.all.new(after)

    def call(keep, rebuild, node):
        fewer = list(widths)
        fewer[label.axis] = (keep.count(front), keep.count(back))
        changed = type(operation)(tuple(fewer), operation.mode, name=operation.name)
        return rebuild.apply(changed, node.arguments.args, node.arguments.kwargs)

    walk.edit(node, call)
    return Label(label.axis, np.concatenate([front, label.ids, back]))


@rule("Split")
def split(walk, node):
    tensor, operation = node.input_tensors[0], node.operation
    label, axis = walk.label(tensor), operation.axis % len(tensor.shape)
    if label is None:
        return opaque(walk, node)
    if label.axis != axis:
        return [label] * len(node.outputs)
    sizes = [int(out.shape[axis]) for out in node.outputs]
    edges = np.cumsum(sizes)[:-1].tolist()
    parts = np.split(label.ids, edges)

    def call(keep, rebuild, node):
        fewer = np.cumsum([keep.count(part) for part in parts])[:-1].tolist()
        changed = type(operation)(tuple(fewer), operation.axis, name=operation.name)
        return rebuild.apply(changed, node.arguments.args, node.arguments.kwargs)

    walk.edit(node, call)
    return [Label(axis, part) for part in parts]


@rule("Stack")
def stack(walk, node):
    rank = len(node.outputs[0].shape)
    new = node.operation.axis % rank
    axes = {label.axis for tensor in node.input_tensors if (label := walk.label(tensor)) is not None}
    if not axes:
        return walk.fixed(node.outputs[0], f"{node.operation.name} makes them")
    axis = max(axes)
    parts = [walk.along(tensor, axis, node.operation.name) for tensor in node.input_tensors]
    for part in parts[1:]:
        walk.all.tie(parts[0], part)
    return Label(axis + (new <= axis), parts[0])


@rule("Unstack")
def unstack(walk, node):
    tensor = node.input_tensors[0]
    label, axis = walk.label(tensor), node.operation.axis % len(tensor.shape)
    if label is None or label.axis == axis:
        return opaque(walk, node)
    return [Label(label.axis - (axis < label.axis), label.ids)] * len(node.outputs)


@rule("Flip", "Roll")
def turned(walk, node):
    """Along positions. Channels that change places keep them all."""
    label, axes = walk.label(node.input_tensors[0]), node.operation.axis
    axes = axes if isinstance(axes, (list, tuple)) else [axes]
    rank = len(node.input_tensors[0].shape)
    if label is None or any(axis is None or axis % rank == label.axis for axis in axes):
        return opaque(walk, node)[0]
    return label


@rule("GetItem")
def part(walk, node):
    """x[:, :, :, 16:32]: a run of channels is followed; a step or single ones are not."""
    tensor, out = node.input_tensors[0], node.outputs[0]
    label, rank = walk.label(tensor), len(tensor.shape)
    key, given_by_name = _key(node)
    if label is None or key is None:
        return opaque(walk, node)[0]
    if Ellipsis in key:
        place = key.index(Ellipsis)
        missing = rank - sum(entry is not None and entry is not Ellipsis for entry in key)
        key = [*key[:place], *[slice(None)] * missing, *key[place + 1 :]]
    old, new, found = 0, 0, None
    for place, entry in enumerate(key):
        if entry is not None and old == label.axis:
            found = (place, entry)
            break
        old, new = old + (entry is not None), new + (not isinstance(entry, (int, np.integer)))
    else:
        return Label(new + label.axis - old, label.ids)
    place, entry = found
    if not isinstance(entry, slice) or entry.step not in (None, 1):
        walk.keep_inputs(node, f"{node.operation.name} picks some of them", SHAPE)
        return walk.fixed(out, f"{node.operation.name} picks some channels", SHAPE)
    start, stop, _ = entry.indices(label.ids.size)
    ids = label.ids[start:stop]
    if ids.size != label.ids.size:

        def call(keep, rebuild, node):
            begin = keep.count(label.ids[:start])
            changed = list(key)
            changed[place] = slice(begin, begin + keep.count(ids))
            args, kwargs = node.arguments.args, node.arguments.kwargs
            if given_by_name:
                return rebuild.apply(node.operation, args, {**kwargs, "key": tuple(changed)})
            return rebuild.apply(node.operation, (args[0], tuple(changed)), kwargs)

        walk.edit(node, call)
    return Label(new, ids)


def _key(node) -> tuple[list | None, bool]:
    """What stands in the brackets, as a list; None where it is computed. Whether it was given by name."""
    args, kwargs = node.arguments.args, node.arguments.kwargs
    key = kwargs["key"] if "key" in kwargs else args[1]
    key = list(key) if isinstance(key, (list, tuple)) else [key]
    plain = all(entry is None or entry is Ellipsis or isinstance(entry, (int, slice, np.integer)) for entry in key)
    return (key if plain else None), "key" in kwargs
