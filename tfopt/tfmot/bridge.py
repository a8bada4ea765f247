"""Keras 3 -> neutral graph, and trained weights back into the user's own model.

`describe` walks the functional graph; nested models are entered, so the result is flat. A layer may
become a chain of simpler ones where tf_keras or TFMOT lacks it:

| Keras 3                               | becomes                                          |
|---------------------------------------|--------------------------------------------------|
| SeparableConv2D                       | DepthwiseConv2D, Conv2D                          |
| an activation that TFMOT cannot fuse  | a layer of its own                               |
| hard_sigmoid                          | + 3, ReLU6, x 1/6                                |
| Rescaling, Normalization              | a frozen 1x1 DepthwiseConv2D                     |
| x + 3.0, ops.multiply(x, 2.0), …      | Scalar                                           |
| RandomFlip, GaussianNoise, …          | nothing: they act in training only               |

Regularizers and constraints stay behind; the way back copies weights only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import keras
import numpy as np

from tfopt.errors import ModelRefused
from tfopt.graph import finish_normalizations, uncompiled
from tfopt.tfmot.neutral import Call, Graph, Node, Weights

#: class -> the settings that mean the same in tf_keras
_PLAIN = {
    "Conv2D": "filters kernel_size strides padding data_format dilation_rate groups use_bias",
    "Conv2DTranspose": "filters kernel_size strides padding output_padding data_format dilation_rate use_bias",
    "DepthwiseConv2D": "kernel_size strides padding depth_multiplier data_format dilation_rate use_bias",
    "Dense": "units use_bias",
    "BatchNormalization": "axis momentum epsilon center scale",
    "ReLU": "max_value negative_slope threshold",
    "ELU": "alpha",
    "PReLU": "shared_axes",
    "Softmax": "axis",
    "Add": "", "Subtract": "", "Multiply": "", "Average": "", "Maximum": "", "Minimum": "",
    "Concatenate": "axis",
    "MaxPooling2D": "pool_size strides padding data_format",
    "AveragePooling2D": "pool_size strides padding data_format",
    "GlobalAveragePooling2D": "data_format keepdims",
    "GlobalMaxPooling2D": "data_format keepdims",
    "Flatten": "data_format",
    "Reshape": "target_shape",
    "Permute": "dims",
    "ZeroPadding2D": "padding data_format",
    "Cropping2D": "cropping data_format",
    "UpSampling2D": "size data_format interpolation",
    "Dropout": "rate",
    "SpatialDropout2D": "rate data_format",
}  # fmt: skip
_SPECIAL = ("Activation", "LeakyReLU", "Normalization", "Rescaling", "SeparableConv2D")
_TRAINING_ONLY = ("Identity", "ActivityRegularization", "GaussianNoise", "GaussianDropout", "AlphaDropout")
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
_BINARY_OPS = {
    "Add": "Add", "Subtract": "Subtract", "Multiply": "Multiply", "Maximum": "Maximum", "Minimum": "Minimum",
    "TrueDivide": "Divide", "Divide": "Divide",
}  # fmt: skip
_FORM = "a functional or Sequential model with one image in and one row of scores out"


@dataclass(frozen=True)
class _Tensor:
    """Stands for a numbered tensor in the recorded arguments of a call."""

    number: int


@dataclass(frozen=True)
class _Part:
    kind: str
    config: dict
    weights: tuple[str, ...] = ()  # keys as in Node, without the layer's name
    trainable: bool = True


def describe(model: keras.Model) -> tuple[Graph, Weights]:
    """The model as plain data. Raises ModelRefused with the layer that cannot cross and what to do."""
    walk = _Walk()
    output = walk.model(model)
    return Graph(
        name=_safe(model.name),
        shape=tuple(int(n) for n in model.input_shape[1:]),
        nodes=tuple(walk.nodes),
        calls=tuple(walk.calls),
        output=output,
        dropped=tuple(walk.dropped),
    ), walk.weights


def with_weights(model: keras.Model, weights: Weights) -> keras.Model:
    """A clone of the model that carries `weights` (as `describe` names them) where they are given."""
    with uncompiled(model):
        clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for name, layer in named_layers(clone):
        old = layer.get_weights()
        if old:
            layer.set_weights([weights.get(f"{name}:{i}", array) for i, array in enumerate(old)])
    finish_normalizations(clone)
    return clone


def named_layers(model: keras.Model) -> Iterator[tuple[str, keras.Layer]]:
    """Every layer once with the name that `describe` gives it; nested models give their layers."""
    walk = _Walk()
    walk.model(model)
    return iter([(name, operation) for operation, name in walk.known.values() if isinstance(operation, keras.Layer)])


class _Walk:
    """One pass over the graph. `known` maps the id of an operation to it and its unique name."""

    def __init__(self):
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.dropped: list[str] = []
        self.weights: Weights = {}
        self.known: dict[int, tuple[keras.Operation, str]] = {}
        self._chains: dict[int, list[Node]] = {}
        self._names = {"image", "quantize_layer"}  # what the worker calls its own layers
        self._last = 0

    def model(self, model: keras.Model) -> int:
        graph = _functional(model)
        if len(graph.inputs) != 1 or len(graph.outputs) != 1 or len(graph.inputs[0].shape) != 4:
            raise ModelRefused("The model is not an image classifier", received=model.name, allowed=_FORM)
        return self._graph(graph, [0])[0]

    def _graph(self, graph, inputs: list[int]) -> list[int]:
        values = {id(tensor): _Tensor(number) for tensor, number in zip(graph.inputs, inputs)}
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                # A layer shared with another model carries that model's calls too.
                if node.is_input or any(id(tensor) not in values for tensor in node.input_tensors):
                    continue
                args, kwargs = node.arguments.fill_in(values)
                outputs = self._call(node.operation, args, kwargs)
                for tensor, number in zip(node.outputs, outputs):
                    values[id(tensor)] = _Tensor(number)
        return [values[id(tensor)].number for tensor in graph.outputs]

    def _call(self, operation, args, kwargs) -> list[int]:
        inputs = [leaf.number for leaf in keras.tree.flatten((args, kwargs)) if isinstance(leaf, _Tensor)]
        if isinstance(operation, keras.Model):
            return self._graph(_functional(operation), inputs)
        if id(operation) not in self._chains:
            self._chains[id(operation)] = self._add(operation, args, kwargs)
        for node in self._chains[id(operation)]:
            self._last += 1
            self.calls.append(Call(node.name, tuple(inputs), self._last))
            inputs = [self._last]
        return inputs

    def _add(self, operation, args, kwargs) -> list[Node]:
        name = self._unique(operation.name)
        self.known[id(operation)] = operation, name
        if isinstance(operation, keras.Layer):
            parts, constants = _parts(operation)
            arrays = dict(enumerate(operation.get_weights())) | constants
        else:
            parts, arrays = _operation_parts(operation, args, kwargs), {}
        if not parts:
            self.dropped.append(operation.name)
        nodes = []
        for number, part in enumerate(parts):
            own = name if number == 0 else self._unique(f"{operation.name}_{part.kind.lower()}")
            keys = tuple(f"{name}:{key}" for key in part.weights)
            nodes.append(Node(own, part.kind, part.config, keys, operation.name, part.trainable))
            self.weights.update((f"{name}:{key}", np.asarray(arrays[_index(key)])) for key in part.weights)
        self.nodes += nodes
        return nodes

    def _unique(self, name: str) -> str:
        safe = candidate = _safe(name)
        number = 1
        while candidate in self._names:
            number += 1
            candidate = f"{safe}_{number}"
        self._names.add(candidate)
        return candidate


def _parts(layer: keras.Layer) -> tuple[list[_Part], dict[str, np.ndarray]]:
    """The tf_keras layers that a layer becomes, and constants that are no weights of the user's."""
    kind = type(layer).__name__
    if not type(layer).__module__.startswith("keras."):
        raise _refused(layer, kind)
    if kind in _TRAINING_ONLY or kind.startswith("Random"):
        return [], {}
    if layer.compute_dtype != "float32":
        raise _refused(layer, f"{kind} that computes in {layer.compute_dtype}")
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        raise _refused(layer, f"{kind} with Keras's own quantization or LoRA")
    keys = tuple(str(i) for i in range(len(layer.get_weights())))
    config = layer.get_config()
    if kind == "Activation":
        return _activation(layer), {}
    if kind == "LeakyReLU":
        return [_Part("LeakyReLU", {"alpha": float(layer.negative_slope)})], {}
    if kind in ("Rescaling", "Normalization"):
        return _affine(layer)
    if kind == "SeparableConv2D":
        shared = {"data_format": config["data_format"]}
        own = ("kernel_size", "strides", "padding", "depth_multiplier", "dilation_rate")
        depthwise = {key: config[key] for key in own}
        first = _Part("DepthwiseConv2D", {**depthwise, **shared, "use_bias": False}, keys[:1], layer.trainable)
        pointwise = {"filters": config["filters"], "kernel_size": 1, "use_bias": config["use_bias"], **shared}
        fused, rest = _fused(layer)
        return [first, _Part("Conv2D", {**pointwise, "activation": fused}, keys[1:], layer.trainable), *rest], {}
    if kind not in _PLAIN:
        raise _refused(layer, kind)
    settings = {key: config[key] for key in _PLAIN[kind].split() if key in config}
    rest: list[_Part] = []
    if hasattr(layer, "activation"):
        settings["activation"], rest = _fused(layer)
    return [_Part(kind, settings, keys, layer.trainable), *rest], {}


def _operation_parts(operation, args, kwargs) -> list[_Part]:
    kind = type(operation).__name__
    if not type(operation).__module__.startswith("keras."):
        raise _refused(operation, kind)
    if kind in _UNARY_OPS:
        return [_Part(*item) for item in _ACTIVATIONS[_UNARY_OPS[kind]]]
    operands = [*args, *kwargs.values()]
    if kind not in _BINARY_OPS or len(operands) != 2:
        raise _refused(operation, f"the operation {kind}")
    merge, (left, right) = _BINARY_OPS[kind], operands
    if isinstance(left, _Tensor) and isinstance(right, _Tensor):
        if merge == "Divide":
            raise _refused(operation, "a division of two tensors")
        return [_Part(merge, {})]
    value = np.asarray(keras.ops.convert_to_numpy(right if isinstance(left, _Tensor) else left))
    if value.size != 1:
        raise _refused(operation, f"{kind} with an array of shape {value.shape}")
    return [_Part("Scalar", _scalar(merge, float(value.reshape(())), tensor_first=isinstance(left, _Tensor)))]


def _scalar(merge: str, value: float, tensor_first: bool) -> dict:
    if merge in ("Subtract", "Divide") and not tensor_first:
        return {"operation": {"Subtract": "subtract_from", "Divide": "divide_into"}[merge], "value": value}
    if merge == "Subtract":
        return {"operation": "add", "value": -value}
    if merge == "Divide":
        return {"operation": "multiply", "value": 1 / value}
    return {"operation": merge.lower(), "value": value}


def _fused(layer) -> tuple[str, list[_Part]]:
    """The activation to leave inside a kernel layer, and the layers to put behind it instead."""
    name = _activation_name(layer)
    return (name, []) if name in _FUSED else ("linear", _activation(layer))


def _activation(layer) -> list[_Part]:
    name = _activation_name(layer)
    if name not in _ACTIVATIONS:
        raise _refused(layer, f"the activation {name}")
    # A linear one still needs a layer of its own, so that the name is there.
    return [_Part(*item) for item in _ACTIVATIONS[name]] or [_Part("Activation", {"activation": "linear"})]


def _activation_name(layer) -> str:
    name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
    own = name in _ACTIVATIONS and keras.activations.get(name) is layer.activation
    return name if own else f"{name} (not Keras's own)" if name in _ACTIVATIONS else name


def _affine(layer) -> tuple[list[_Part], dict[str, np.ndarray]]:
    """x * scale + offset by channel, as a frozen 1x1 depthwise convolution: one op that int8 can do."""
    if type(layer).__name__ == "Rescaling":
        scale, offset = np.asarray(layer.scale, np.float64), np.asarray(layer.offset, np.float64)
    else:
        mean, variance = (np.asarray(keras.ops.convert_to_numpy(v), np.float64) for v in (layer.mean, layer.variance))
        deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
        scale, offset = (deviation, mean) if layer.invert else (1 / deviation, -mean / deviation)
    channels = int(layer.output.shape[-1])
    if len(layer.output.shape) != 4 or any(part.size not in (1, channels) for part in (scale, offset)):
        raise _refused(layer, f"{type(layer).__name__} that is not per channel")
    spread = lambda part: np.broadcast_to(part.reshape(-1), (channels,)).astype(np.float32)
    constants = {"kernel": spread(scale).reshape(1, 1, channels, 1), "bias": spread(offset)}
    config = {"kernel_size": 1, "use_bias": True, "activation": "linear"}
    return [_Part("DepthwiseConv2D", config, ("kernel", "bias"), trainable=False)], constants


def _functional(model: keras.Model):
    graph = model._functional if isinstance(model, keras.Sequential) else model
    if not hasattr(graph, "_nodes_by_depth"):
        raise ModelRefused(
            "A subclassed or unbuilt model cannot be walked", received=f"{model.name} ({type(model).__name__})",
            allowed=_FORM, next_step="Rebuild it with keras.Input and keras.Model(inputs, outputs)",
        )  # fmt: skip
    return graph


def _refused(operation, kind: str) -> ModelRefused:
    return ModelRefused(
        f"Layer {operation.name} cannot be rebuilt for TFMOT, which pruning and quantization-aware training need",
        received=kind,
        allowed=", ".join([*_PLAIN, *_SPECIAL]),
        next_step="Use recipes without prune and qat (post-training int8 works), or make the layer of the allowed ones",
    )


def _index(key: str) -> int | str:
    return int(key) if key.isdigit() else key


def _safe(name: str) -> str:
    """A name that TensorFlow takes as a scope."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return safe if re.match(r"[A-Za-z0-9.]", safe) else f"layer{safe}"
