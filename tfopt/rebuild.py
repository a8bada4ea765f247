"""See a Keras 3 graph call by call, and build it anew with some calls replaced.

Nested models stay nested, each rebuilt once; a layer that is kept keeps its name, its settings and its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import keras
import numpy as np

from tfopt.errors import ModelRefused

KERNELS = (
    keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D, keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D, keras.layers.SeparableConv1D, keras.layers.SeparableConv2D,
    keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose, keras.layers.Dense,
    keras.layers.EinsumDense,
)  # fmt: skip


def graph_of(model):
    """The functional graph of a functional or Sequential model, None for any other layer."""
    graph = getattr(model, "_functional", None) if isinstance(model, keras.Sequential) else model
    return graph if hasattr(graph, "_nodes_by_depth") else None


class View:
    """Every call of a model and of the models inside it, and who reads each tensor.

    nodes: Keras's own nodes, in an order in which they can run; those of a nested model come where it is first called.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self.nodes: list = []
        self._producer: dict[int, object] = {}
        self._readers: dict[int, list] = {}
        self._outputs: set[int] = set()
        self._calls: Counter = Counter()
        self._visit(graph_of(model))

    def _visit(self, graph) -> None:
        self._outputs |= {id(tensor) for tensor in graph.outputs}
        for node in nodes_of(graph):
            inner = graph_of(node.operation)
            first = not self._calls[id(node.operation)]
            self._calls[id(node.operation)] += 1
            for tensor in node.input_tensors:
                self._readers.setdefault(id(tensor), []).append(node)
            self._producer.update((id(tensor), node) for tensor in node.outputs)
            self.nodes.append(node)
            if inner is not None and first:
                self._visit(inner)

    def producer(self, tensor):
        """The call that made a tensor; None for an input."""
        return self._producer.get(id(tensor))

    def reader(self, tensor):
        """The one call that reads a tensor; None where there are several, or it is also a model's output."""
        readers = self._readers.get(id(tensor), [])
        return readers[0] if len(readers) == 1 and id(tensor) not in self._outputs else None

    def calls(self, operation) -> int:
        return self._calls[id(operation)]

    def names(self) -> set[str]:
        return {node.operation.name for node in self.nodes}

    def entries(self) -> Iterator:
        """The tensors that are the image itself: the model's input, and that of a nested model which alone reads it."""
        tensor = self.model.inputs[0]
        while tensor is not None:
            yield tensor
            node = self.reader(tensor)
            inner = graph_of(node.operation) if node else None
            alone = inner is not None and self.calls(node.operation) == 1 and len(inner.inputs) == 1
            tensor = inner.inputs[0] if alone else None


def nodes_of(graph) -> list:
    """The calls of one graph, inputs left out, in an order in which they can run."""
    known, found = {id(tensor) for tensor in graph.inputs}, []
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            # A layer shared with another model carries that model's calls too.
            if not node.is_input and all(id(tensor) in known for tensor in node.input_tensors):
                found.append(node)
                known |= {id(tensor) for tensor in node.outputs}
    return found


#: What takes the place of a call: gets the Rebuild and the old node, returns the new output tensor.
Change = Callable[["Rebuild", object], object]


class Rebuild:
    """One copy of a model in the making. changes: id(node) -> what to build in its place."""

    def __init__(self, view: View, changes: dict[int, Change] | None = None, batch: int | None = None):
        self._changes, self._batch = changes or {}, batch
        self._names = view.names()
        self._values: dict[int, object] = {}
        self._kept: dict[tuple, keras.Layer] = {}
        self._made: dict[str, keras.Layer] = {}
        self._models: dict[int, keras.Model] = {}
        self._weights: list[tuple[keras.Layer, list[np.ndarray]]] = []
        stays = {node.operation.name for node in view.nodes if id(node) not in self._changes}
        self._replaced = {node.operation.name for node in view.nodes} - stays
        self._model = view.model

    def model(self) -> keras.Model:
        """The copy. Raises what Keras raises where a layer cannot be copied."""
        built = self._graph(self._model)
        for layer, arrays in self._weights:
            layer.set_weights(arrays)
            if isinstance(layer, keras.layers.Normalization):
                layer.finalize_state()
        return built

    def _graph(self, model) -> keras.Model:
        if id(model) in self._models:
            return self._models[id(model)]
        graph = graph_of(model)
        for tensor in graph.inputs:
            shape = (self._batch or tensor.shape[0], *self.input_shape(tensor))
            name = tensor._keras_history.operation.name
            self._values[id(tensor)] = keras.Input(batch_shape=shape, dtype=tensor.dtype, name=name)
        for node in nodes_of(graph):
            change = self._changes.get(id(node))
            made = change(self, node) if change else self.call(node)
            for old, new in zip(node.outputs, keras.tree.flatten(made)):
                self._values[id(old)] = new
        ends = [keras.tree.map_structure(self.value, part) for part in (graph._inputs_struct, graph._outputs_struct)]
        self._models[id(model)] = built = keras.Model(*ends, name=model.name)
        return built

    def input_shape(self, tensor) -> tuple:
        """What the new model, or one inside it, takes in place of that input; without the batch."""
        return tuple(tensor.shape[1:])

    def value(self, tensor):
        """The new tensor for an old one."""
        return self._values[id(tensor)]

    def call(self, node, **settings):
        """The call as it was, on the new tensors; settings: what changes in the layer's own."""
        operation = node.operation
        if graph_of(operation) is not None:
            operation = self._graph(operation)
        elif isinstance(operation, keras.Layer):
            operation = self.keep(operation, **settings)
        args, kwargs = node.arguments.fill_in(self._values)
        return operation(*args, **kwargs)

    def apply(self, operation, args: tuple, kwargs: dict):
        """Call an operation with arguments as an old call had them, on the new tensors."""
        new = lambda value: self.value(value) if isinstance(value, keras.KerasTensor) else value
        args, kwargs = keras.tree.map_structure(new, (tuple(args), dict(kwargs)))
        return operation(*args, **kwargs)

    def keep(self, layer: keras.Layer, weights: list[np.ndarray] | None = None, **settings) -> keras.Layer:
        """The layer's copy, one for all its calls. weights: other values than its own."""
        key = id(layer)
        if key not in self._kept:
            config = {**layer.get_config(), **settings}
            self._kept[key] = layer.__class__.from_config(config)
            self._weights.append((self._kept[key], layer.get_weights() if weights is None else weights))
        return self._kept[key]

    def layer(self, name: str, make: Callable[[str], keras.Layer], value, weights: list[np.ndarray] | None = None):
        """Call a new layer on a new tensor. A layer of the same name that was made before is used again."""
        if name not in self._made:
            self._made[name] = make(self._unique(name))
            if weights is not None:
                self._weights.append((self._made[name], weights))
        return self._made[name](value)

    def op(self, function: Callable, *args, name: str, **kwargs):
        """Call a function of keras.ops, and give the operation a name that no other has."""
        made = function(*args, **kwargs)
        keras.tree.flatten(made)[0]._keras_history.operation.name = self._unique(name)
        return made

    def _unique(self, name: str) -> str:
        # The first heir of a layer that goes may have its name.
        if name in self._replaced:
            self._replaced.discard(name)
            return name
        candidate, number = name, 1
        while candidate in self._names:
            number += 1
            candidate = f"{name}_{number}"
        self._names.add(candidate)
        return candidate


def check_names(view: View) -> None:
    """Raise ModelRefused where two layers have one name: what is said of it would be said of both."""
    seen: dict[str, int] = {}
    for node in view.nodes:
        if seen.setdefault(node.operation.name, id(node.operation)) != id(node.operation):
            raise ModelRefused(
                "Two layers of the model have the same name, so they cannot be told apart",
                received=node.operation.name, next_step="Give the layers of nested models names of their own",
            )  # fmt: skip
