"""Neutral graph -> tf_keras model. Runs in the worker only."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf
import tf_keras

from tfopt.errors import ModelRefused
from tfopt.tfmot.neutral import Graph, Node, Weights

MERGES = ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate")
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


_OWN = {"Scalar": Scalar, "HardSilu": HardSilu}


# Nothing here needs AutoGraph, and with it TFMOT's wrappers take five times as long to build.
@tf.autograph.experimental.do_not_convert
def build(
    graph: Graph, weights: Weights, wrap: Wrap | None = None, entry: Callable | None = None
) -> tuple[tf_keras.Model, dict[str, tf.Variable]]:
    """The model and its variables under the names of `weights`.

    wrap: puts something around a layer, once for each layer. entry: applied to the image first.
    """
    nodes = {node.name: node for node in graph.nodes}
    image = tf_keras.Input(graph.shape, name="image")
    values = {0: entry(image) if entry else image}
    layers: dict[str, tf_keras.layers.Layer] = {}
    variables: dict[str, tf.Variable] = {}
    for call in graph.calls:
        node = nodes[call.node]
        arguments = [values[number] for number in call.inputs]
        argument = arguments if node.kind in MERGES else arguments[0]
        if node.name not in layers:
            layer = _layer(node, tf.nest.map_structure(lambda tensor: tensor.shape, argument), weights)
            variables.update(zip(node.weights, layer.weights))
            layers[node.name] = wrap(node, layer) if wrap else layer
        values[call.output] = layers[node.name](argument)
    return tf_keras.Model(image, values[graph.output], name=graph.name), variables


def _layer(node: Node, shape, weights: Weights) -> tf_keras.layers.Layer:
    kind = _OWN.get(node.kind) or getattr(tf_keras.layers, node.kind)
    layer = kind(**node.config, name=node.name)
    with tf.name_scope(node.name):
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
