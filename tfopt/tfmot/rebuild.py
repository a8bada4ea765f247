"""Neutral graph -> tf_keras model. Runs in the worker only."""

from __future__ import annotations

import json
from collections.abc import Callable

import tensorflow as tf
import tf_keras

from tfopt.errors import ModelRefused
from tfopt.tfmot.neutral import Graph, Node, Weights

MERGES = (
    "Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate", "Dot", "Attention",
    "AdditiveAttention", "Merge",
)  # fmt: skip
#: (node, built layer with its weights) -> what is put into the model in its place
Wrap = Callable[[Node, tf_keras.layers.Layer], tf_keras.layers.Layer]


@tf_keras.utils.register_keras_serializable(package="tfopt")
class Scalar(tf_keras.layers.Layer):
    """Arithmetic of a tensor with one number; TFMOT cannot clone the lambda that tf_keras would make."""

    OPERATIONS = {  # noqa: RUF012 - never changed
        "add": lambda x, value: x + value,
        "multiply": lambda x, value: x * value,
        "maximum": tf.maximum,
        "minimum": tf.minimum,
        "subtract_from": lambda x, value: value - x,
        "divide_into": lambda x, value: value / x,
        "power": tf.pow,
    }

    def __init__(self, operation: str, value: float, **kwargs):
        super().__init__(**kwargs)
        self.operation, self.value = operation, value

    def call(self, inputs):
        return self.OPERATIONS[self.operation](inputs, self.value)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "operation": self.operation, "value": self.value}


@tf_keras.utils.register_keras_serializable(package="tfopt")
class HardSilu(tf_keras.layers.Layer):
    """x · relu6(x + 3) / 6 (Howard et al. 2019, arXiv:1905.02244, section 5.2), in the form that TFLite fuses."""

    def call(self, inputs):
        return inputs * tf.nn.relu6(inputs + 3.0) * (1.0 / 6.0)

    def compute_output_shape(self, input_shape):
        return input_shape


_REDUCTIONS = {
    "mean": tf.reduce_mean, "max": tf.reduce_max, "min": tf.reduce_min, "sum": tf.reduce_sum, "prod": tf.reduce_prod,
}  # fmt: skip
_FUNCTIONS = {
    **{name: getattr(tf.math, name) for name in ("square", "sqrt", "rsqrt", "abs", "exp", "log", "sign", "floor", "sin",
                                                 "cos", "erf")},
    "reduce": lambda x, how, axis, keepdims: _REDUCTIONS[how](x, axis=list(axis), keepdims=keepdims),
    "pad": lambda x, width, mode, value: tf.pad(x, [list(pair) for pair in width], mode.upper(), value),
    "slice": lambda x, key: x[tuple(part if isinstance(part, int) else slice(*part) for part in key)],
    "gelu": lambda x, approximate: tf.nn.gelu(x, approximate=approximate),
    "log_softmax": lambda x, axis: tf.nn.log_softmax(x, axis=axis),
    "divide": lambda pair: pair[0] / pair[1],
    "power": lambda pair: tf.pow(pair[0], pair[1]),
    "matmul": lambda pair: tf.matmul(pair[0], pair[1]),
    "stack": lambda tensors, axis: tf.stack(tensors, axis=axis),
}  # fmt: skip


@tf_keras.utils.register_keras_serializable(package="tfopt")
class Function(tf_keras.layers.Layer):
    """A function of TensorFlow, of one tensor or (Merge) of several, by its name in _FUNCTIONS."""

    def __init__(self, function: str, name: str | None = None, **settings):
        super().__init__(name=name)
        self.function, self.settings = function, settings

    def call(self, inputs):
        return _FUNCTIONS[self.function](inputs, **self.settings)

    def get_config(self):
        return {"name": self.name, "function": self.function, **self.settings}


@tf_keras.utils.register_keras_serializable(package="tfopt")
class Constant(tf_keras.layers.Layer):
    """Arithmetic with an array that is not trained."""

    def __init__(self, operation: str, shape=(), **kwargs):
        super().__init__(**kwargs)
        self.operation, self.shape = operation, tuple(shape)

    def build(self, input_shape):
        self.value = self.add_weight("value", self.shape, trainable=False)
        super().build(input_shape)

    def call(self, inputs):
        return inputs + self.value if self.operation == "add" else inputs * self.value

    def get_config(self):
        return {**super().get_config(), "operation": self.operation, "shape": self.shape}


@tf_keras.utils.register_keras_serializable(package="tfopt")
class Foreign(tf_keras.layers.Layer):
    """A layer of Keras 3 itself: its own code, on weights that tf_keras keeps."""

    def __init__(self, layer: dict, module: str = "", path=(), **kwargs):
        super().__init__(**kwargs)
        # As text: tf_keras would put wrappers that follow changes into a dictionary, which is the graph's own.
        self._settings = json.dumps({"layer": layer, "module": module, "path": list(path)})
        self.inner = _foreign(json.loads(self._settings))

    def build(self, input_shape):
        if not self.inner.built:
            with tf.init_scope():
                self.inner.build(tuple(input_shape))
        self._own = [
            self.add_weight(variable.path.replace("/", "_"), variable.shape, trainable=variable.trainable)
            for variable in self.inner.weights
        ]
        super().build(input_shape)

    def call(self, inputs):
        state = dict(zip(map(id, self.inner.weights), self._own))
        pick = lambda variables: [tf.convert_to_tensor(state[id(variable)]) for variable in variables]
        outputs, _ = self.inner.stateless_call(
            pick(self.inner.trainable_variables), pick(self.inner.non_trainable_variables), inputs
        )
        return outputs

    def get_config(self):
        return {**super().get_config(), **json.loads(self._settings)}


def _foreign(config: dict):
    """The Keras 3 layer, its class imported from where the user's program has it."""
    import importlib
    import sys

    import keras

    sys.path += [place for place in config["path"] if place not in sys.path]
    try:
        importlib.import_module(config["module"])
        return keras.saving.deserialize_keras_object(config["layer"])
    except Exception as error:  # whatever a user's module does
        raise ModelRefused(
            "The class of a layer cannot be loaded in another process", received=f"{config['module']} ({error})",
            next_step="Put it into a module that can be imported by itself",
        ) from error  # fmt: skip


_OWN = {
    "Scalar": Scalar, "HardSilu": HardSilu, "Function": Function, "Merge": Function, "Constant": Constant,
    "Foreign": Foreign,
}  # fmt: skip


# Nothing here needs AutoGraph, and with it TFMOT's wrappers take five times as long to build.
@tf.autograph.experimental.do_not_convert
def build(
    graph: Graph, weights: Weights, wrap: Wrap | None = None, entry: Callable | None = None
) -> tuple[tf_keras.Model, dict[str, tf.Variable]]:
    """The model and its variables under the names of `weights`.

    wrap: puts something around a layer, once for each layer. entry: applied to the image first.
    """
    nodes = {node.name: node for node in graph.nodes}
    names = [f"image_{number}" if number else "image" for number in range(len(graph.shapes))]
    images = [tf_keras.Input(shape, name=name) for shape, name in zip(graph.shapes, names)]
    values = {number: entry(image) if entry and not number else image for number, image in enumerate(images)}
    layers: dict[str, tf_keras.layers.Layer] = {}
    variables: dict[str, tf.Variable] = {}
    for call in graph.calls:
        node = nodes[call.node]
        arguments = [values[number] for number in call.inputs]
        argument = arguments if node.kind in MERGES or len(arguments) > 1 else arguments[0]
        if node.name not in layers:
            layer = _layer(node, tf.nest.map_structure(lambda tensor: tensor.shape, argument), weights)
            variables.update(zip(node.weights, layer.weights))
            layers[node.name] = wrap(node, layer) if wrap else layer
        spread = arguments if node.kind == "MultiHeadAttention" else [argument]
        values[call.output] = layers[node.name](*spread)
    outputs = [values[number] for number in graph.outputs]
    single = lambda tensors: tensors[0] if len(tensors) == 1 else tensors
    return tf_keras.Model(single(images), single(outputs), name=graph.name), variables


def exactly(graph: Graph, weights: Weights) -> tf_keras.Model:
    """The model, computing in float64."""
    before = tf_keras.backend.floatx()
    tf_keras.backend.set_floatx("float64")
    try:
        return build(graph, weights)[0]
    finally:
        tf_keras.backend.set_floatx(before)


def _layer(node: Node, shape, weights: Weights) -> tf_keras.layers.Layer:
    kind = _OWN.get(node.kind) or getattr(tf_keras.layers, node.kind)
    own = {"shape": weights[node.weights[0]].shape} if node.kind == "Constant" else {}
    layer = kind(**node.config, **own, name=node.name)
    with tf.name_scope(node.name):
        if node.kind == "MultiHeadAttention":
            layer(*(tf_keras.Input(one[1:]) for one in shape))  # its parts are made only where it is called
        else:
            layer.build(shape)
    layer.trainable = node.trainable
    try:
        layer.set_weights([weights[key] for key in node.weights])
    except ValueError as error:
        line = str(error).splitlines()[0]
        raise ModelRefused(f"The weights of layer {node.source} do not fit", received=line) from error
    return layer


def values(variables: dict[str, tf.Variable]) -> Weights:
    """The variables' present values."""
    return {name: variable.numpy() for name, variable in variables.items()}
