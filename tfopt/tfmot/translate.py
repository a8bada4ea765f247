"""One Keras 3 layer or keras.ops call -> the tf_keras layers that mean the same.

Most layers have a namesake with the same settings (PLAIN). The others become a chain of simpler ones:

| Keras 3                               | becomes                                          |
|---------------------------------------|--------------------------------------------------|
| SeparableConv2D                       | DepthwiseConv2D, Conv2D                          |
| an activation that TFMOT cannot fuse  | a layer of its own                               |
| hard_sigmoid                          | + 3, ReLU6, x 1/6                                |
| Rescaling, Normalization              | a frozen 1x1 DepthwiseConv2D                     |
| x + 3.0, ops.multiply(x, 2.0), …      | Scalar                                           |
| x * array, x + array                  | Constant                                         |
| ops.mean, ops.pad, slices, …          | Function, Merge: named functions of TensorFlow   |
| RandomFlip, GaussianNoise, …          | nothing: they act in training only               |
| a registered layer of the user's, and | Foreign: Keras 3's own layer, run inside         |
| Keras's own that tf_keras lacks       |                                                  |

Regularizers and constraints stay behind; the way back copies weights only.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import pairwise

import keras
import numpy as np

from tfopt.errors import ModelRefused

_RNN = "units use_bias return_sequences go_backwards"
_CONV_RNN = "filters kernel_size strides padding data_format dilation_rate use_bias return_sequences go_backwards"
#: class -> the settings that mean the same in tf_keras
PLAIN = {
    "Conv1D": "filters kernel_size strides padding data_format dilation_rate groups use_bias",
    "Conv2D": "filters kernel_size strides padding data_format dilation_rate groups use_bias",
    "Conv3D": "filters kernel_size strides padding data_format dilation_rate groups use_bias",
    "Conv1DTranspose": "filters kernel_size strides padding output_padding data_format dilation_rate use_bias",
    "Conv2DTranspose": "filters kernel_size strides padding output_padding data_format dilation_rate use_bias",
    "Conv3DTranspose": "filters kernel_size strides padding output_padding data_format dilation_rate use_bias",
    "DepthwiseConv1D": "kernel_size strides padding depth_multiplier data_format dilation_rate use_bias",
    "DepthwiseConv2D": "kernel_size strides padding depth_multiplier data_format dilation_rate use_bias",
    "SeparableConv1D": "filters kernel_size strides padding depth_multiplier data_format dilation_rate use_bias",
    "Dense": "units use_bias",
    "EinsumDense": "equation output_shape bias_axes",
    "Embedding": "input_dim output_dim mask_zero",
    "BatchNormalization": "axis momentum epsilon center scale",
    "LayerNormalization": "axis epsilon center scale",
    "GroupNormalization": "groups axis epsilon center scale",
    "UnitNormalization": "axis",
    "ReLU": "max_value negative_slope threshold",
    "ELU": "alpha",
    "PReLU": "shared_axes",
    "Softmax": "axis",
    "Add": "", "Subtract": "", "Multiply": "", "Average": "", "Maximum": "", "Minimum": "",
    "Concatenate": "axis",
    "Dot": "axes normalize",
    "Attention": "use_scale score_mode",
    "AdditiveAttention": "use_scale",
    "MultiHeadAttention": "num_heads key_dim value_dim use_bias output_shape attention_axes",
    **{f"{kind}Pooling{n}D": "pool_size strides padding data_format" for kind in ("Max", "Average") for n in (1, 2, 3)},
    **{f"Global{kind}Pooling{n}D": "data_format keepdims" for kind in ("Max", "Average") for n in (1, 2, 3)},
    "Flatten": "data_format",
    "Reshape": "target_shape",
    "Permute": "dims",
    "RepeatVector": "n",
    "Masking": "mask_value",
    "ZeroPadding1D": "padding", "ZeroPadding2D": "padding data_format", "ZeroPadding3D": "padding data_format",
    "Cropping1D": "cropping", "Cropping2D": "cropping data_format", "Cropping3D": "cropping data_format",
    "UpSampling1D": "size", "UpSampling2D": "size data_format interpolation", "UpSampling3D": "size data_format",
    "CenterCrop": "height width",
    "Resizing": "height width interpolation crop_to_aspect_ratio",
    "Dropout": "rate", "SpatialDropout1D": "rate", "SpatialDropout2D": "rate data_format",
    "SpatialDropout3D": "rate data_format",
    "SimpleRNN": _RNN, "GRU": f"{_RNN} reset_after", "LSTM": f"{_RNN} unit_forget_bias",
    "ConvLSTM1D": _CONV_RNN, "ConvLSTM2D": _CONV_RNN, "ConvLSTM3D": _CONV_RNN,
}  # fmt: skip
SPECIAL = ("Activation", "LeakyReLU", "Normalization", "Rescaling", "SeparableConv2D")
TRAINING_ONLY = ("Identity", "ActivityRegularization", "GaussianNoise", "GaussianDropout", "AlphaDropout")
#: Layers of keras.layers that stay out, though tf_keras has them, and why.
LEFT_OUT = {
    **dict.fromkeys(
        ("Bidirectional", "TimeDistributed", "SpectralNormalization", "Wrapper", "RNN", "StackedRNNCells", "GRUCell",
         "LSTMCell", "SimpleRNNCell"), "holds other layers: TFMOT's wrappers do not see inside"
    ),
    **dict.fromkeys(
        ("CategoryEncoding", "Discretization", "HashedCrossing", "Hashing", "IntegerLookup", "StringLookup",
         "TextVectorization"), "reads categories or text, which no image classifier does"
    ),
    "Lambda": "holds Python code that no file can carry to another process",
    "InputLayer": "is no layer of the graph", "Layer": "is only a base class",
}  # fmt: skip
#: Settings whose other values mean what tf_keras does not know: class -> {setting: the value that crosses}.
_STATELESS = {"return_state": False, "stateful": False}
_ONLY = {
    "LSTM": _STATELESS, "GRU": _STATELESS, "SimpleRNN": _STATELESS, "ConvLSTM1D": _STATELESS, "ConvLSTM2D": _STATELESS,
    "ConvLSTM3D": _STATELESS,
    "LayerNormalization": {"rms_scaling": False},
    "MultiHeadAttention": {"use_gate": False, "sliding_window": None},
    "Resizing": {"antialias": False, "pad_to_aspect_ratio": False, "data_format": "channels_last"},
    "CenterCrop": {"data_format": "channels_last"},
    "ZeroPadding1D": {"data_format": "channels_last"},
}  # fmt: skip
_RECURRENT = ("LSTM", "GRU", "SimpleRNN", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")
#: activations that TFMOT knows how to quantize inside a kernel layer
_FUSED = ("linear", "relu", "softmax", "sigmoid", "tanh")
#: Keras 3 activation -> tf_keras layers (kind, settings)
_ACTIVATIONS = {
    "linear": [],
    "relu": [("ReLU", {})],
    "relu6": [("ReLU", {"max_value": 6.0})],
    "leaky_relu": [("LeakyReLU", {"alpha": 0.2})],
    "hard_silu": [("HardSilu", {})],
    "hard_sigmoid": [
        ("Scalar", {"operation": "add", "value": 3.0}),
        ("ReLU", {"max_value": 6.0}),
        ("Scalar", {"operation": "multiply", "value": 1 / 6}),
    ],
    "silu": [("Activation", {"activation": "swish"})],
    "log_softmax": [("Function", {"function": "log_softmax", "axis": -1})],
    **{
        name: [("Activation", {"activation": name})]
        for name in ("softmax", "sigmoid", "tanh", "elu", "selu", "softplus", "softsign", "exponential", "gelu")
    },
}
_UNARY_OPS = {
    "Relu": "relu", "Relu6": "relu6", "Sigmoid": "sigmoid", "Tanh": "tanh", "Silu": "silu",
    "HardSigmoid": "hard_sigmoid", "HardSilu": "hard_silu",
    "Elu": "elu", "Selu": "selu", "Softplus": "softplus", "Softsign": "softsign",
}  # fmt: skip
#: keras.ops of one tensor -> the function in the worker
_FUNCTION_OPS = {
    "Square": "square", "Sqrt": "sqrt", "Rsqrt": "rsqrt", "Absolute": "abs", "Abs": "abs", "Exp": "exp", "Log": "log",
    "Sign": "sign", "Floor": "floor", "Sin": "sin", "Cos": "cos", "Erf": "erf",
}  # fmt: skip
_REDUCTIONS = {"Mean": "mean", "Max": "max", "Amax": "max", "Min": "min", "Amin": "min", "Sum": "sum", "Prod": "prod"}
_BINARY_OPS = {
    "Add": "Add", "Subtract": "Subtract", "Multiply": "Multiply", "Maximum": "Maximum", "Minimum": "Minimum",
    "TrueDivide": "Divide", "Divide": "Divide", "Power": "Power", "Matmul": "Matmul",
}  # fmt: skip
_MERGED = {"Divide": "divide", "Power": "power", "Matmul": "matmul"}
_RESHAPED = ("Reshape", "Squeeze", "ExpandDims", "Ravel", "Flatten")


@dataclass(frozen=True)
class Tensor:
    """Stands for a numbered tensor in the recorded arguments of a call."""

    number: int


@dataclass(frozen=True)
class Part:
    kind: str
    config: dict
    weights: tuple[str, ...] = ()  # keys as in Node, without the layer's name
    trainable: bool = True


#: Parts, and the arrays of those that are no weights of the user's.
Parts = tuple[list[Part], dict[str, np.ndarray]]


def of_layer(layer: keras.Layer) -> Parts:
    """The tf_keras layers that a layer becomes, and constants that are no weights of the user's."""
    kind = type(layer).__name__
    if not type(layer).__module__.startswith("keras."):
        return _foreign(layer), {}
    if kind in TRAINING_ONLY or kind.startswith("Random"):
        return [], {}
    if layer.compute_dtype not in ("float32", "float16", "bfloat16"):  # in mixed precision the weights are float32
        raise refused(layer, f"{kind} that computes in {layer.compute_dtype}")
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        raise refused(layer, f"{kind} with Keras's own quantization or LoRA")
    keys = tuple(str(i) for i in range(len(layer.get_weights())))
    config = layer.get_config()
    if kind == "Activation":
        return _activation(layer), {}
    if kind == "LeakyReLU":
        return [Part("LeakyReLU", {"alpha": float(layer.negative_slope)})], {}
    if kind in ("Rescaling", "Normalization"):
        return _affine(layer)
    if kind == "SeparableConv2D":
        shared = {"data_format": config["data_format"]}
        own = ("kernel_size", "strides", "padding", "depth_multiplier", "dilation_rate")
        depthwise = {key: config[key] for key in own}
        first = Part("DepthwiseConv2D", {**depthwise, **shared, "use_bias": False}, keys[:1], layer.trainable)
        pointwise = {"filters": config["filters"], "kernel_size": 1, "use_bias": config["use_bias"], **shared}
        fused, rest = _fused(layer)
        return [first, Part("Conv2D", {**pointwise, "activation": fused}, keys[1:], layer.trainable), *rest], {}
    if kind in LEFT_OUT:
        raise refused(layer, f"{kind}, which {LEFT_OUT[kind]}")
    if kind not in PLAIN:  # tf_keras has no such layer: it runs as it is
        return _foreign(layer), {}
    for setting, allowed in _ONLY.get(kind, {}).items():
        if config.get(setting, allowed) != allowed:
            raise refused(layer, f"{kind} with {setting} {config[setting]}")
    settings = {key: config[key] for key in PLAIN[kind].split() if key in config}
    rest: list[Part] = []
    if kind in _RECURRENT:
        # Their activations are part of the recurrence, and hard_sigmoid is another one in tf_keras.
        for name in ("activation", "recurrent_activation"):
            if hasattr(layer, name):
                settings[name] = _activation_name(layer, name)
                if settings[name] not in ("tanh", "sigmoid", "relu", "linear"):
                    raise refused(layer, f"{kind} with {name} {settings[name]}")
    elif hasattr(layer, "activation"):
        settings["activation"], rest = _fused(layer)
    return [Part(kind, settings, keys, layer.trainable), *rest], {}


def of_operation(operation, args, kwargs, shape: tuple | None) -> Parts:
    """The same of a keras.ops call. shape: of its first output, with the batch, None where it has several."""
    kind = type(operation).__name__
    if not type(operation).__module__.startswith("keras."):
        raise refused(operation, kind)
    operands = [*args, *kwargs.values()]
    if kind in _UNARY_OPS:
        return [Part(*item) for item in _ACTIVATIONS[_UNARY_OPS[kind]]], {}
    if kind in _FUNCTION_OPS:
        return [Part("Function", {"function": _FUNCTION_OPS[kind]})], {}
    if kind in _BINARY_OPS and len(operands) == 2:
        return _binary(operation, *operands)
    single = _single(operation, kind, args, kwargs, shape)
    if single is None:
        raise refused(operation, f"the operation {kind}")
    return single, {}


def pieces_of(operation, rank: int, length: int) -> list[Part] | None:
    """One Part for each output of keras.ops.split; None for any other operation. length: of the axis, rank with it."""
    if type(operation).__name__ != "Split" or not type(operation).__module__.startswith("keras."):
        return None
    where, axis = operation.indices_or_sections, operation.axis % rank
    if axis == 0:
        raise refused(operation, "a split of the batch")
    ends = [length * i // where for i in range(1, where)] if isinstance(where, int) else list(where)
    bounds = [0, *ends, length]
    whole: list = [[None, None, None]] * rank
    cut = lambda start, stop: [*whole[:axis], [int(start), int(stop), None], *whole[axis + 1 :]]
    return [Part("Function", {"function": "slice", "key": cut(a, b)}) for a, b in pairwise(bounds)]


def refused(operation, kind: str) -> ModelRefused:
    return ModelRefused(
        f"Layer {operation.name} cannot be rebuilt for TFMOT, which pruning and quantization-aware training need",
        received=kind,
        allowed=", ".join([*PLAIN, *SPECIAL]),
        next_step="Use recipes without prune and qat (post-training int8 works), or make the layer of the allowed ones",
    )


def _single(operation, kind: str, args, kwargs, shape: tuple | None) -> list[Part] | None:
    """A keras.ops call of one tensor, or of several to be joined; None where it is none of these."""
    function = lambda name, **settings: [Part("Function", {"function": name, **settings})]
    if kind in _REDUCTIONS:
        axis = operation.axis if isinstance(operation.axis, (list, tuple)) else [operation.axis]
        if None in axis or getattr(operation, "initial", None) is not None:
            raise refused(operation, f"{kind} over the batch, too, or with an initial value")
        rank = len(shape) + (0 if operation.keepdims else len(axis))
        axis = sorted(a % rank for a in axis)
        if 0 in axis:
            raise refused(operation, f"{kind} over the batch")
        if rank == 4 and axis == [1, 2] and kind in ("Mean", "Max"):
            name = {"Mean": "GlobalAveragePooling2D", "Max": "GlobalMaxPooling2D"}[kind]
            return [Part(name, {"keepdims": bool(operation.keepdims)})]
        return function("reduce", how=_REDUCTIONS[kind], axis=axis, keepdims=bool(operation.keepdims))
    if kind in _RESHAPED:
        if shape is None or any(n is None for n in shape[1:]) or shape[0] is not None:
            raise refused(operation, f"{kind} into {shape}, which mixes images or has an open size")
        return [Part("Reshape", {"target_shape": [int(n) for n in shape[1:]]})]
    if kind in ("Transpose", "Swapaxes", "Moveaxis"):
        order = _order(operation, kind, len(shape))
        if order[0] != 0:
            raise refused(operation, f"{kind} that moves the batch")
        return [Part("Permute", {"dims": order[1:]})]
    if kind == "Concatenate":
        return [Part("Concatenate", {"axis": int(operation.axis)})]
    if kind == "Stack":
        return [Part("Merge", {"function": "stack", "axis": int(operation.axis)})]
    if kind == "Pad":
        return _pad(operation, args, kwargs)
    if kind == "Clip":
        low, high = float(operation.x_min), float(operation.x_max)
        if (low, high) == (0.0, 6.0):
            return [Part("ReLU", {"max_value": 6.0})]
        bounds = (("maximum", low), ("minimum", high))
        return [Part("Scalar", {"operation": name, "value": value}) for name, value in bounds]
    if kind == "Negative":
        return [Part("Scalar", {"operation": "multiply", "value": -1.0})]
    if kind == "LeakyRelu":
        return [Part("LeakyReLU", {"alpha": float(operation.negative_slope)})]
    if kind == "Gelu":
        return function("gelu", approximate=bool(operation.approximate))
    if kind == "Softmax":
        return [Part("Softmax", {"axis": int(operation.axis)})]
    if kind == "LogSoftmax":
        return function("log_softmax", axis=int(operation.axis))
    if kind == "GetItem":
        return function("slice", key=_key(operation, args[1]))
    if kind in ("AveragePool", "MaxPool") and len(shape) == 4:
        settings = {name: getattr(operation, name) for name in ("pool_size", "strides", "padding", "data_format")}
        return [Part(f"{kind}ing2D", settings)]
    if kind == "Cast" and str(operation.dtype) == "float32":
        return [Part("Activation", {"activation": "linear"})]
    return None


def _order(operation, kind: str, rank: int) -> list[int]:
    if kind == "Transpose":
        axes = operation.axes or range(rank)[::-1]
        return [a % rank for a in axes]
    order = list(range(rank))
    if kind == "Swapaxes":
        one, other = operation.axis1 % rank, operation.axis2 % rank
        order[one], order[other] = order[other], order[one]
        return order
    sources, targets = (
        [int(a) % rank for a in np.atleast_1d(part)] for part in (operation.source, operation.destination)
    )
    order = [a for a in order if a not in sources]
    for target, origin in sorted(zip(targets, sources)):
        order.insert(target, origin)
    return order


def _pad(operation, args, kwargs) -> list[Part]:
    value = kwargs.get("constant_values", args[1] if len(args) > 1 else None)
    width = operation.pad_width
    pairs = [[int(n) for n in (pair if isinstance(pair, (list, tuple)) else (pair, pair))] for pair in width]
    if pairs[0] != [0, 0] or operation.mode not in ("constant", "reflect", "symmetric"):
        raise refused(operation, f"Pad of {pairs}, mode {operation.mode}")
    plain = operation.mode == "constant" and not value
    if plain and len(pairs) == 4 and pairs[3] == [0, 0]:
        return [Part("ZeroPadding2D", {"padding": pairs[1:3]})]
    return [Part("Function", {"function": "pad", "width": pairs, "mode": operation.mode, "value": float(value or 0)})]


def _key(operation, key) -> list:
    key = key if isinstance(key, tuple) else (key,)
    found = []
    for part in key:
        if isinstance(part, slice):
            found.append([None if n is None else int(n) for n in (part.start, part.stop, part.step)])
        elif isinstance(part, int):
            found.append(part)
        else:
            raise refused(operation, f"a slice with {part!r}")
    if found and found[0] != [None, None, None]:
        raise refused(operation, "a slice of the batch")
    return found


def _binary(operation, left, right) -> Parts:
    kind = type(operation).__name__
    merge = _BINARY_OPS[kind]
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return [Part("Merge", {"function": _MERGED[merge]}) if merge in _MERGED else Part(merge, {})], {}
    first = isinstance(left, Tensor)
    value = np.asarray(keras.ops.convert_to_numpy(right if first else left), np.float32)
    if value.size == 1 and merge != "Matmul":
        return [Part("Scalar", _scalar(operation, merge, float(value.reshape(())), tensor_first=first))], {}
    if merge not in ("Add", "Subtract", "Multiply", "Divide") or not first:
        raise refused(operation, f"{kind} with an array of shape {value.shape}")
    if merge in ("Subtract", "Divide"):
        merge, value = ("Add", -value) if merge == "Subtract" else ("Multiply", 1 / value)
    return [Part("Constant", {"operation": merge.lower()}, ("value",), trainable=False)], {"value": value}


def _scalar(operation, merge: str, value: float, tensor_first: bool) -> dict:
    if merge == "Power":
        if not tensor_first or not math.isfinite(value):
            raise refused(operation, "a power of a number")
        return {"operation": "power", "value": value}
    if merge in ("Subtract", "Divide") and not tensor_first:
        return {"operation": {"Subtract": "subtract_from", "Divide": "divide_into"}[merge], "value": value}
    if merge == "Subtract":
        return {"operation": "add", "value": -value}
    if merge == "Divide":
        return {"operation": "multiply", "value": 1 / value}
    return {"operation": merge.lower(), "value": value}


def _foreign(layer: keras.Layer) -> list[Part]:
    """A layer of somebody else's class: it runs as it is, where the other process can find its class."""
    cls = type(layer)
    name, module = keras.saving.get_registered_name(cls), cls.__module__
    registered = module.startswith("keras.") or keras.saving.get_registered_object(name) is cls
    if not registered or module == "__main__" or "<locals>" in cls.__qualname__:
        what = "defined in a program, not in a module" if registered else "not registered with Keras"
        raise ModelRefused(
            f"Layer {layer.name} cannot be rebuilt for TFMOT: its class is {what}",
            received=f"{module}.{cls.__qualname__}",
            allowed="Keras's own layers, and classes that another process can import and find by their registered name",
            next_step=f"Put class {cls.__name__} into a module of its own, with "
            "@keras.saving.register_keras_serializable(package='…') above it; or use recipes without prune and qat",
        )
    config = {"layer": keras.saving.serialize_keras_object(layer), "module": module, "path": [p for p in sys.path if p]}
    keys = tuple(str(i) for i in range(len(layer.get_weights())))
    return [Part("Foreign", config, keys, layer.trainable)]


def _fused(layer) -> tuple[str, list[Part]]:
    """The activation to leave inside a kernel layer, and the layers to put behind it instead."""
    name = _activation_name(layer)
    return (name, []) if name in _FUSED else ("linear", _activation(layer))


def _activation(layer) -> list[Part]:
    name = _activation_name(layer)
    if name not in _ACTIVATIONS:
        raise refused(layer, f"the activation {name}")
    # A linear one still needs a layer of its own, so that the name is there.
    return [Part(*item) for item in _ACTIVATIONS[name]] or [Part("Activation", {"activation": "linear"})]


def _activation_name(layer, attribute: str = "activation") -> str:
    own = getattr(layer, attribute)
    name = getattr(own, "__name__", type(own).__name__)
    known = name in _ACTIVATIONS and keras.activations.get(name) is own
    return name if known else f"{name} (not Keras's own)" if name in _ACTIVATIONS else name


def _affine(layer) -> Parts:
    """x * scale + offset by channel, as a frozen 1x1 depthwise convolution: one op that int8 can do."""
    if type(layer).__name__ == "Rescaling":
        scale, offset = np.asarray(layer.scale, np.float64), np.asarray(layer.offset, np.float64)
    else:
        mean, variance = (np.asarray(keras.ops.convert_to_numpy(v), np.float64) for v in (layer.mean, layer.variance))
        deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
        scale, offset = (deviation, mean) if layer.invert else (1 / deviation, -mean / deviation)
    channels = int(layer.output.shape[-1])
    if len(layer.output.shape) != 4 or any(part.size not in (1, channels) for part in (scale, offset)):
        raise refused(layer, f"{type(layer).__name__} that is not per channel")
    spread = lambda part: np.broadcast_to(part.reshape(-1), (channels,)).astype(np.float32)
    constants = {"kernel": spread(scale).reshape(1, 1, channels, 1), "bias": spread(offset)}
    config = {"kernel_size": 1, "use_bias": True, "activation": "linear"}
    return [Part("DepthwiseConv2D", config, ("kernel", "bias"), trainable=False)], constants
