"""Keras 3 -> neutral graph, and trained weights back into the user's own model.

`describe` walks the functional graph; nested models are entered, so the result is flat. What a layer becomes where
tf_keras or TFMOT lacks it, translate.py says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import keras
import numpy as np

from tfopt.errors import ModelRefused
from tfopt.graph import finish_normalizations, uncompiled
from tfopt.tfmot import translate
from tfopt.tfmot.neutral import Call, Graph, Node, Weights
from tfopt.tfmot.translate import Tensor

_FORM = "a functional or Sequential model"


def describe(model: keras.Model) -> tuple[Graph, Weights]:
    """The model as plain data. Raises ModelRefused with the layer that cannot cross and what to do."""
    walk = _Walk()
    outputs = walk.model(model)
    return Graph(
        name=_safe(model.name),
        shapes=tuple(tuple(None if n is None else int(n) for n in tensor.shape[1:]) for tensor in model.inputs),
        nodes=tuple(walk.nodes),
        calls=tuple(walk.calls),
        outputs=tuple(outputs),
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

    def model(self, model: keras.Model) -> list[int]:
        graph = _functional(model)
        self._last = len(graph.inputs) - 1
        return self._graph(graph, list(range(len(graph.inputs))))

    def _graph(self, graph, inputs: list[int]) -> list[int]:
        values = {id(tensor): Tensor(number) for tensor, number in zip(graph.inputs, inputs)}
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                # A layer shared with another model carries that model's calls too.
                if node.is_input or any(id(tensor) not in values for tensor in node.input_tensors):
                    continue
                args, kwargs = node.arguments.fill_in(values)
                outputs = self._call(node, args, kwargs)
                for tensor, number in zip(node.outputs, outputs):
                    values[id(tensor)] = Tensor(number)
        return [values[id(tensor)].number for tensor in graph.outputs]

    def _call(self, node, args, kwargs) -> list[int]:
        operation = node.operation
        inputs = [leaf.number for leaf in keras.tree.flatten((args, kwargs)) if isinstance(leaf, Tensor)]
        if isinstance(operation, keras.Model):
            return self._graph(_functional(operation), inputs)
        before = tuple(node.input_tensors[0].shape)
        pieces = None
        if not isinstance(operation, keras.Layer):
            axis = getattr(operation, "axis", 0)
            length = before[axis] if isinstance(axis, int) and -len(before) <= axis < len(before) else 0
            pieces = translate.pieces_of(operation, len(before), length)
        if pieces is not None:
            return self._pieces(operation, pieces, inputs, len(before))
        if len(node.outputs) != 1:
            raise translate.refused(operation, f"{type(operation).__name__} with {len(node.outputs)} outputs")
        if id(operation) not in self._chains:
            ranks = len(before), len(node.outputs[0].shape)
            self._chains[id(operation)] = self._add(operation, args, kwargs, tuple(node.outputs[0].shape), ranks)
        for link in self._chains[id(operation)]:
            self._last += 1
            self.calls.append(Call(link.name, tuple(inputs), self._last))
            inputs = [self._last]
        return inputs

    def _pieces(self, operation, pieces: list[translate.Part], inputs: list[int], rank: int) -> list[int]:
        numbers = []
        for part in pieces:
            self.nodes.append(Node(self._unique(operation.name), part.kind, part.config, (), operation.name, rank=rank))
            self._last += 1
            self.calls.append(Call(self.nodes[-1].name, tuple(inputs), self._last))
            numbers.append(self._last)
        return numbers

    def _add(self, operation, args, kwargs, shape: tuple, ranks: tuple[int, int]) -> list[Node]:
        name = self._unique(operation.name)
        self.known[id(operation)] = operation, name
        if isinstance(operation, keras.Layer):
            _check_call(operation, args, kwargs)
            parts, constants = translate.of_layer(operation)
            arrays = dict(enumerate(operation.get_weights())) | constants
        else:
            parts, arrays = translate.of_operation(operation, args, kwargs, shape)
        if not parts:
            self.dropped.append(operation.name)
        nodes = []
        for number, part in enumerate(parts):
            own = name if number == 0 else self._unique(f"{operation.name}_{part.kind.lower()}")
            keys = tuple(f"{name}:{key}" for key in part.weights)
            rank = ranks[0] if number == 0 else ranks[1]
            nodes.append(Node(own, part.kind, part.config, keys, operation.name, part.trainable, rank))
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


#: What a layer may be told beside its tensors, as far as it changes nothing.
_HARMLESS = {"training": (None, False), "mask": (None,), "initial_state": (None,), "use_causal_mask": (False,),
             "return_attention_scores": (False,), "attention_mask": (None,)}  # fmt: skip


def _check_call(layer: keras.Layer, args, kwargs) -> None:
    """Raise ModelRefused where a layer is called with more than tensors."""
    for name, value in kwargs.items():
        if name in _HARMLESS and not any(value is allowed for allowed in _HARMLESS[name]) and name != "training":
            raise translate.refused(layer, f"{type(layer).__name__} called with {name}")
    tensors = [leaf for leaf in keras.tree.flatten((args, kwargs)) if isinstance(leaf, Tensor)]
    if type(layer).__name__ == "MultiHeadAttention" and len(tensors) > 3:
        raise translate.refused(layer, "MultiHeadAttention with a mask")


def _functional(model: keras.Model):
    graph = model._functional if isinstance(model, keras.Sequential) else model
    if not hasattr(graph, "_nodes_by_depth"):
        raise ModelRefused(
            "A subclassed or unbuilt model cannot be walked", received=f"{model.name} ({type(model).__name__})",
            allowed=_FORM, next_step="Rebuild it with keras.Input and keras.Model(inputs, outputs)",
        )  # fmt: skip
    return graph


def _index(key: str) -> int | str:
    return int(key) if key.isdigit() else key


def _safe(name: str) -> str:
    """A name that TensorFlow takes as a scope."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return safe if re.match(r"[A-Za-z0-9.]", safe) else f"layer{safe}"
