"""Pooling and resizing in operations that a delegate takes."""

from __future__ import annotations

import keras
from keras import ops

from tfopt.fixes.plan import Fix, Plan
from tfopt.rebuild import View

_LAST = "channels_last"


def _static_size(node) -> tuple[int, int] | None:
    """(height, width) of what a call reads, None where it is no image of a known size."""
    shape = node.input_tensors[0].shape
    return (shape[1], shape[2]) if len(shape) == 4 and None not in shape[1:3] else None


def _pooled(node) -> tuple[str, bool] | None:
    """('average' or 'max', whether height and width stay as 1 x 1) of a pooling of whole images."""
    operation, kind = node.operation, type(node.operation).__name__
    if isinstance(operation, (keras.layers.GlobalAveragePooling2D, keras.layers.GlobalMaxPooling2D)):
        average = isinstance(operation, keras.layers.GlobalAveragePooling2D)
        return ("average" if average else "max", bool(operation.keepdims)) if operation.data_format == _LAST else None
    if isinstance(operation, keras.Layer) or kind not in ("Mean", "Max") or len(node.input_tensors[0].shape) != 4:
        return None
    axes = operation.axis if isinstance(operation.axis, (tuple, list)) else (operation.axis,)
    # Some versions keep a lone axis as a number, and `initial` would change the result of a maximum.
    if None in axes or {axis % 4 for axis in axes} != {1, 2} or getattr(operation, "initial", None) is not None:
        return None
    return "average" if kind == "Mean" else "max", bool(operation.keepdims)


def _global_pool(view: View, spec) -> Plan:
    plan = Plan()
    for node in view.nodes:
        found = _pooled(node)
        if found is None:
            continue
        size = _static_size(node)
        if size is None:
            plan.refuse(node, "the size of its images is open: give the model a fixed one")
        else:
            plan.change(node, lambda make, node, found=found, size=size: _pool(make, node, *found, size))
    return plan


def _pool(make, node, how: str, keeps: bool, size: tuple[int, int]):
    kind = {"average": keras.layers.AveragePooling2D, "max": keras.layers.MaxPooling2D}[how]
    name, x = node.operation.name, make.value(node.input_tensors[0])
    if size == (1, 1):
        # The converter would keep a pooling of one pixel.
        return make.layer(name, lambda name: keras.layers.Reshape(node.outputs[0].shape[1:], name=name), x)
    pooled = make.layer(name, lambda name: kind(size, strides=size, padding="valid", name=name), x)
    if keeps:
        return pooled
    return make.layer(f"{name}_flat", lambda name: keras.layers.Reshape((x.shape[-1],), name=name), pooled)


def _resized(node) -> tuple[int, int, str] | None:
    """(height, width, interpolation) that a call gives; None for other calls."""
    operation, size = node.operation, node.outputs[0].shape[1:3]
    if getattr(operation, "data_format", None) != _LAST or len(node.outputs[0].shape) != 4:
        return None
    if isinstance(operation, (keras.layers.UpSampling2D, keras.layers.Resizing)):
        return (*size, operation.interpolation)
    if not isinstance(operation, keras.Layer) and type(operation).__name__ == "Resize":
        return (*size, operation.interpolation)
    return None


def _resize(view: View, spec) -> Plan:
    plan = Plan()
    for node in view.nodes:
        found = _resized(node)
        if found is None:
            continue
        source = _static_size(node)
        height, width, how = found
        plain = not any(
            getattr(node.operation, name, False)
            for name in ("antialias", "crop_to_aspect_ratio", "pad_to_aspect_ratio")
        )  # fmt: skip
        if source is None or None in (height, width):
            plan.refuse(node, "the size of its images is open: give the model a fixed one")
        elif how == "nearest" and isinstance(node.operation, keras.layers.UpSampling2D):
            plan.change(node, _nearest)
        elif how == "bilinear" and plain and source == (1, 1) and (height, width) != (1, 1):
            plan.change(node, _tile)
        elif how == "area" and plain and source[0] % height == 0 and source[1] % width == 0:
            plan.change(node, _average)
        elif how not in ("nearest", "bilinear"):
            plan.refuse(node, f"TFLite has no {how} resizing, and nothing else equals it: use nearest or bilinear")
        elif not plain:
            plan.refuse(node, "with antialias or an aspect ratio kept it is no single operation of TFLite")
    return plan


def _nearest(make, node):
    """Keras repeats rows and columns: two TILEs between three RESHAPEs of 5 dimensions."""
    height, width = node.outputs[0].shape[1:3]
    x = make.value(node.input_tensors[0])
    return make.layer(
        node.operation.name, lambda name: keras.layers.Resizing(height, width, interpolation="nearest", name=name), x
    )  # fmt: skip


def _tile(make, node):
    height, width = node.outputs[0].shape[1:3]
    x = make.value(node.input_tensors[0])
    return make.op(ops.tile, x, (1, height, width, 1), name=node.operation.name)


def _average(make, node):
    (high, wide), (height, width) = node.input_tensors[0].shape[1:3], node.outputs[0].shape[1:3]
    size = (high // height, wide // width)
    return make.layer(
        node.operation.name, lambda name: keras.layers.AveragePooling2D(size, name=name),
        make.value(node.input_tensors[0]),
    )  # fmt: skip


GLOBAL_POOL = Fix(
    "global_pool", "the mean or maximum of whole images as a pooling of their full size",
    ("edgetpu",), ("MEAN", "REDUCE_MAX"), ("AVERAGE_POOL_2D", "MAX_POOL_2D", "RESHAPE"), _global_pool,
)  # fmt: skip
RESIZE = Fix(
    "resize", "nearest upsampling as one resize, area shrinking as average pooling, one enlarged pixel as a tile",
    ("edgetpu", "gpu"), ("TILE", "RESHAPE", "RESIZE_BILINEAR"),
    ("RESIZE_NEAREST_NEIGHBOR", "AVERAGE_POOL_2D", "TILE"), _resize,
)  # fmt: skip
