"""Walk a Keras 3 graph: every call of every layer, with the shapes it saw."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import keras

from tfopt.rebuild import Rebuild, View, check_names


def calls(model: keras.Model) -> Iterator[tuple[keras.Operation, tuple, tuple]]:
    """(operation, input shape, output shape) for each call, shared layers once for each call.

    Shapes are without the batch: (height, width, channels) or (features,). Nested models are
    entered, not listed. A layer with several inputs gives the shape of the first.
    """
    graph = model._functional if isinstance(model, keras.Sequential) else model
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            operation = node.operation
            if isinstance(operation, keras.layers.InputLayer):
                continue
            if isinstance(operation, keras.Model):
                yield from calls(operation)
                continue
            yield operation, tuple(node.input_tensors[0].shape[1:]), tuple(node.output_tensors[0].shape[1:])


def count_parameters(model: keras.Model) -> int:
    """All weights, batch norms' moving statistics included."""
    return int(model.count_params())


def count_macs(model: keras.Model) -> int:
    """Multiply-accumulates of one image through every kernel layer (convolutions, dense, multi-head attention)."""
    return sum(macs for _, macs in macs_of_calls(model))


def macs_of_calls(model: keras.Model) -> Iterator[tuple[keras.Operation, int]]:
    """(operation, multiply-accumulates of one image) for each call."""
    for operation, before, after in calls(model):
        yield operation, _macs(operation, before, after)


def _macs(layer, before: tuple, after: tuple) -> int:
    kinds = keras.layers
    if isinstance(layer, (kinds.SeparableConv1D, kinds.SeparableConv2D)):
        positions = _positions(after)
        depthwise, pointwise = layer.depthwise_kernel.shape, layer.pointwise_kernel.shape
        return positions * (math.prod(depthwise) + math.prod(pointwise))
    if isinstance(layer, (kinds.Conv1DTranspose, kinds.Conv2DTranspose, kinds.Conv3DTranspose)):
        return _positions(before) * math.prod(layer.kernel.shape)
    if isinstance(layer, (kinds.Conv1D, kinds.Conv2D, kinds.Conv3D, kinds.DepthwiseConv2D, kinds.DepthwiseConv1D)):
        # A kernel holds (…, channels in / groups, channels out): each weight is used once a position.
        return _positions(after) * math.prod(layer.kernel.shape)
    if isinstance(layer, kinds.MultiHeadAttention):
        places = _positions(before)  # of the query; keys and values are taken to be as many
        projections = (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense)
        products = places * layer.num_heads * (layer.key_dim + layer.value_dim)
        return places * (sum(math.prod(part.kernel.shape) for part in projections) + products)
    if isinstance(layer, kinds.EinsumDense) and None in after:  # it does not say what stays as it is
        return _positions(before) * math.prod(layer.kernel.shape)
    if isinstance(layer, (kinds.Dense, kinds.EinsumDense)):
        return math.prod(after[:-1]) * math.prod(layer.kernel.shape)
    return 0


def _positions(shape: tuple) -> int:
    return math.prod(int(n) for n in shape[:-1] if n is not None)


def flat_layers(model: keras.Model) -> list[keras.Layer]:
    """Every layer once, in order, nested models replaced by their layers."""
    found: dict[int, keras.Layer] = {}
    for operation, _, _ in calls(model):
        if isinstance(operation, keras.Layer):
            found.setdefault(id(operation), operation)
    return list(found.values())


def rewrite(model: keras.Model, replacements: dict[str, list[keras.Layer]] | None = None) -> keras.Model:
    """A copy of the model, weights included, in which each named layer is a chain of other layers.

    replacements: layer name -> the new layers, applied one after the other; their weights are theirs. Nested models
    stay nested, and are entered. Raises ModelRefused where two layers have one name.
    """
    view, replacements = View(model), replacements or {}
    check_names(view)

    def chain(links: list[keras.Layer]):
        def call(rebuild: Rebuild, node):
            value = rebuild.value(node.input_tensors[0])
            for link in links:
                value = link(value)
            return value

        return call

    changes = {
        id(node): chain(replacements[node.operation.name]) for node in view.nodes if node.operation.name in replacements
    }
    return Rebuild(view, changes).model()


def in_float32(model: keras.Model) -> keras.Model:
    """The same model computing in float32, where it was trained in mixed precision; its weights are float32 already.

    TFLite's converter has no half-precision kernels. Answers then differ by what float16 or bfloat16 rounds.
    """
    layers = [layer for layer in flat_layers(model) if layer.weights or layer.compute_dtype not in (None, "float32")]
    return model if all(layer.compute_dtype == "float32" for layer in layers) else in_dtype(model, "float32")


def in_dtype(model: keras.Model, dtype: str) -> keras.Model:
    """A copy of the model, weights included, whose layers compute in 'float32' or 'float64'."""

    def clone(layer):
        own = {"dtype": dtype} if isinstance(layer, keras.Layer) else {}  # an operation computes in its inputs' type
        return layer.__class__.from_config({**layer.get_config(), **own})

    with uncompiled(model):
        copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    copy.set_weights(model.get_weights())
    finish_normalizations(copy)
    return copy


def finish_normalizations(model: keras.Model) -> None:
    """After weights were set: a Normalization computes with numbers that it derives from its own only when told."""
    for layer in flat_layers(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


@contextmanager
def uncompiled(model: keras.Model) -> Iterator[None]:
    """For a while, the model without its training set-up, which Keras would copy and store with it.

    A loss is often a closure that no file can hold, and an optimizer's state triples the file.
    """
    compiled, optimizer = model.compiled, getattr(model, "optimizer", None)
    model.compiled, model.optimizer = False, None
    try:
        yield
    finally:
        model.compiled, model.optimizer = compiled, optimizer
