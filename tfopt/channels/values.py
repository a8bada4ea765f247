"""Rules of the layers that treat each value by itself, or each map by itself: nothing mixes channels here."""

from __future__ import annotations

import keras
import numpy as np

from tfopt.channels.ids import SHAPE, UNSUPPORTED, Label, Reason
from tfopt.channels.rules import by_channel, channel_axis, opaque, rule

kinds = keras.layers


def _known(*names: str) -> list[type]:
    """Those layers of keras.layers that this version of Keras has."""
    return [getattr(kinds, name) for name in names if hasattr(kinds, name)]


@rule(
    kinds.ReLU, kinds.LeakyReLU, kinds.ELU, kinds.Identity, kinds.Dropout, kinds.SpatialDropout1D,
    kinds.SpatialDropout2D, kinds.SpatialDropout3D, kinds.GaussianDropout, kinds.GaussianNoise, kinds.AlphaDropout,
    kinds.ActivityRegularization,
)  # fmt: skip
def unchanged(walk, node):
    return walk.label(node.input_tensors[0])


@rule(kinds.Activation)
def activation(walk, node):
    function = node.operation.activation
    if not by_channel(function):
        name = getattr(function, "__name__", type(function).__name__)
        walk.keep_inputs(node, f"{node.operation.name} is {name}, which mixes channels")
        if node.outputs[0].shape != node.input_tensors[0].shape:
            return walk.fixed(node.outputs[0], f"{node.operation.name} mixes channels")
    return walk.label(node.input_tensors[0])


@rule(kinds.Softmax, "Softmax", "LogSoftmax", "Sparsemax", "Normalize")
def softmax(walk, node):
    axes = node.operation.axis
    tensor = node.input_tensors[0]
    label = walk.label(tensor)
    axes = axes if isinstance(axes, (list, tuple)) else [axes]
    if label is not None and any(axis is None or axis % len(tensor.shape) == label.axis for axis in axes):
        walk.keep_inputs(node, f"{node.operation.name} divides by a sum over them")
    return label


@rule(
    kinds.MaxPooling1D, kinds.MaxPooling2D, kinds.MaxPooling3D, kinds.AveragePooling1D, kinds.AveragePooling2D,
    kinds.AveragePooling3D, kinds.ZeroPadding1D, kinds.ZeroPadding2D, kinds.ZeroPadding3D, kinds.Cropping1D,
    kinds.Cropping2D, kinds.Cropping3D, kinds.UpSampling1D, kinds.UpSampling2D, kinds.UpSampling3D, kinds.Resizing,
    kinds.CenterCrop, kinds.RandomFlip, kinds.RandomRotation, kinds.RandomTranslation, kinds.RandomZoom,
    kinds.RandomCrop,
    *_known("AdaptiveAveragePooling1D", "AdaptiveAveragePooling2D", "AdaptiveAveragePooling3D"),
    *_known("AdaptiveMaxPooling1D", "AdaptiveMaxPooling2D", "AdaptiveMaxPooling3D"),
    "MaxPool", "AveragePool", "AdaptiveMaxPool", "AdaptiveAveragePool", "Resize",
)  # fmt: skip
def each_map(walk, node):
    """(batch, positions…, channels): positions change, each channel's map by itself."""
    rank = len(node.outputs[0].shape)
    axis = channel_axis(node.operation, rank) if rank > 2 else rank - 1
    return Label(axis, walk.ids(node, axis))


@rule(
    kinds.GlobalAveragePooling1D, kinds.GlobalAveragePooling2D, kinds.GlobalAveragePooling3D,
    kinds.GlobalMaxPooling1D, kinds.GlobalMaxPooling2D, kinds.GlobalMaxPooling3D,
)  # fmt: skip
def global_pooling(walk, node):
    axis = channel_axis(node.operation, len(node.input_tensors[0].shape))
    ids = walk.ids(node, axis)
    return Label(axis if node.operation.keepdims else 1, ids)


@rule(kinds.Rescaling, kinds.Normalization)
def rescaled(walk, node):
    layer = node.operation
    numbers = [layer.scale, layer.offset] if isinstance(layer, kinds.Rescaling) else [layer.mean]
    if any(np.size(number) > 1 for number in numbers if number is not None):
        walk.keep_inputs(node, f"{layer.name} has a number for each of them")
    return walk.label(node.input_tensors[0])


@rule(
    kinds.MultiHeadAttention, kinds.GroupQueryAttention, kinds.Attention, kinds.AdditiveAttention, kinds.Dot,
    kinds.Embedding, kinds.LSTM, kinds.GRU, kinds.SimpleRNN, kinds.RNN, kinds.ConvLSTM1D, kinds.ConvLSTM2D,
    kinds.ConvLSTM3D, kinds.Bidirectional, kinds.TimeDistributed, kinds.Masking, kinds.SpectralNormalization,
    kinds.RandomBrightness, kinds.RandomContrast, kinds.CategoryEncoding, kinds.Discretization,
)  # fmt: skip
def known_and_whole(walk, node):
    return opaque(walk, node)


@rule(
    kinds.Add, kinds.Subtract, kinds.Multiply, kinds.Average, kinds.Maximum, kinds.Minimum,
    "Add", "Subtract", "Multiply", "Divide", "TrueDivide", "DivideNoNan", "FloorDivide", "Maximum", "Minimum",
    "Fmax", "Fmin", "Power", "Mod", "Where", "Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual",
    "LogicalAnd", "LogicalOr", "LogicalNot", "LogicalXor", "Arctan2", "Hypot", "Logaddexp",
)  # fmt: skip
def elementwise(walk, node):
    """Values of several tensors meet place by place; an axis of size 1 meets all: (1, 1, C) with (H, W, C)."""
    out = node.outputs[0]
    rank, spread = len(out.shape), []
    for tensor in node.input_tensors:
        label, shift = walk.label(tensor), rank - len(tensor.shape)
        if label is not None and (label.ids.size > 1 or out.shape[label.axis + shift] == 1):
            spread.append((label.axis + shift, label))
    if not spread:
        walk.keep_inputs(node, f"{node.operation.name} spreads one channel over others")
        return walk.fixed(out, f"{node.operation.name} spreads one channel over others")
    axes = {axis for axis, _ in spread}
    if len(axes) > 1:
        moving = {axis for axis, label in spread if not walk.all.is_fixed(label.ids)}
        axes = moving or axes
    axis = max(axes)
    ids = None
    for tensor in node.input_tensors:
        own = axis - rank + len(tensor.shape)
        label = walk.label(tensor)
        if own >= 0 and tensor.shape[own] == out.shape[axis]:
            found = walk.along(tensor, own, node.operation.name) if own else None
            if found is None:
                raise ValueError("a batch meets channels")
            ids = found if ids is None else ids
            walk.all.tie(ids, found)
        elif label is not None:
            reason = f"{node.operation.name} spreads them over other channels"
            walk.all.fix(label.ids, Reason(SHAPE, reason))
    _constants(walk, node, axis, ids)
    return Label(axis, ids)


def _constants(walk, node, axis: int, ids: np.ndarray) -> None:
    """Numbers written into the call, one for each channel, get fewer with the channels."""
    rank = len(node.outputs[0].shape)

    def lies_along(value) -> int | None:
        shape = getattr(value, "shape", None)
        if isinstance(value, keras.KerasTensor) or not shape:
            return None
        own = axis - rank + len(shape)
        return own if own >= 0 and shape[own] == len(ids) > 1 else None

    found = [value for value in keras.tree.flatten(_arguments(node)) if lies_along(value) is not None]
    if any(isinstance(value, keras.Variable) for value in found):
        walk.all.fix(ids, Reason(UNSUPPORTED, f"{node.operation.name} reads a variable"))
    elif found:

        def call(keep, rebuild, node):
            def part(value):
                own = lies_along(value)
                return value if own is None else np.compress(keep.mask(ids), np.asarray(value), axis=own)

            args, kwargs = keras.tree.map_structure(part, _arguments(node))
            return rebuild.apply(node.operation, args, kwargs)

        walk.edit(node, call)


def _arguments(node) -> tuple:
    return node.arguments.args, node.arguments.kwargs


@rule(
    "Absolute", "Abs", "Fabs", "Arccos", "Arccosh", "Arcsin", "Arcsinh", "Arctan", "Arctanh", "Cbrt", "Ceil", "Clip",
    "Cos", "Cosh", "Exp", "Exp2", "Expm1", "Floor", "Heaviside", "Isfinite", "Isinf", "Isnan", "Log", "Log10",
    "Log1p", "Log2", "NanToNum", "Negative", "OnesLike", "Reciprocal", "Round", "Sign", "Sin", "Sinc", "Sinh", "Sqrt",
    "Square", "Tan", "Tanh", "Trunc", "ZerosLike", "Copy", "Relu", "Relu6", "Sigmoid", "SparseSigmoid", "Softplus",
    "Softsign", "SoftShrink", "SparsePlus", "Silu", "Squareplus", "LogSigmoid", "LeakyRelu", "HardSigmoid",
    "HardSilu", "Elu", "Selu", "Gelu", "Celu", "TanhShrink", "HardTanh", "HardShrink", "Threshold", "Cast",
    "SaturateCast", "StopGradient", "Rsqrt", "Erf", "Erfc", "Erfinv",
)  # fmt: skip
def one_by_one(walk, node):
    return walk.label(node.input_tensors[0])
