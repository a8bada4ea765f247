"""Which weights of a model a technique may work on, decided on the neutral graph before any worker starts.

A kernel is an array of multiplicands; scales, offsets, statistics and slopes are none. Settings are given by layer:
a key is a layer's name, a pattern of names ('stage1_*'), a type ('DepthwiseConv2D') or the name of a nested model.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from mobile_bench.records import Skip
from tfopt.errors import InputError, ModelRefused, unknown_name
from tfopt.graph import flat_layers
from tfopt.tfmot import bridge
from tfopt.tfmot.neutral import Graph, Node, Weights

#: layer type -> which of its weights are kernels
KERNELS = {
    **dict.fromkeys(
        ("Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose", "DepthwiseConv1D",
         "DepthwiseConv2D", "Dense", "EinsumDense", "Embedding", "LocallyConnected1D", "LocallyConnected2D"), (0,)
    ),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D", "LSTM", "GRU", "SimpleRNN"), (0, 1)),
}  # fmt: skip
DEPTHWISE = ("DepthwiseConv2D", "DepthwiseConv1D")
_GROUPABLE = ("Conv2D", "Conv2DTranspose", "DepthwiseConv2D", "Dense")


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel: its name in the neutral graph ('stem:0'), the user's layer, and what it may be called by."""

    key: str
    layer: str
    kind: str
    values: np.ndarray
    names: tuple[str, ...]
    config: dict

    @property
    def input_axis(self) -> int:
        """The length of the axis that TFLite stores innermost: inputs, or channels of a depthwise kernel."""
        shape = self.values.shape
        return shape[-1] if self.kind == "Conv2DTranspose" else shape[-2] if len(shape) > 1 else 1

    def fits(self, pattern: str) -> bool:
        return _fits(self.names, pattern)

    def setting(self, layers: Mapping[str, float], default):
        """What `layers` says of this kernel: by name before by pattern (the first that fits) before by type."""
        exact = [key for key in layers if key in self.names[:2]]
        fitting = [key for key in layers if any(fnmatch.fnmatchcase(name, key) for name in self.names[:2])]
        types = [key for key in layers if self.fits(key)]
        return layers[(exact or fitting or types)[0]] if types else default

    def groups_fit(self) -> bool:
        """Whether m of n zeros along the stored axis means anything for this kind and shape."""
        return self.kind in _GROUPABLE and (self.kind != "DepthwiseConv2D" or self.values.shape[-1] == 1)


def choose(
    model: keras.Model, exclude: Sequence[str] = (), named: Iterable[str] = ()
) -> tuple[list[Kernel], list[Skip]]:
    """The kernels of a model that may change, and the other layers that have weights, each with the reason.

    exclude: names, patterns or types to leave alone. named: other keys of the settings. Raises InputError for a key
    that fits no layer, ModelRefused where a weight is not a number or nothing is left.
    """
    graph, weights = bridge.describe(model)
    types = _types(model)
    check_names([*exclude, *named], graph, types)
    check_numbers(graph, weights)
    kernels, skipped = [], []
    for node in graph.nodes:
        if not node.weights:
            continue
        names = _names(node, types)
        own = [Kernel(node.weights[i], node.source, node.kind, weights[node.weights[i]], names, node.config)
               for i in KERNELS.get(node.kind, ())]  # fmt: skip
        if not node.weights[0].rpartition(":")[2].isdigit():  # a constant of the bridge, no weight of the user's
            skipped.append(Skip(node.source, "not a kernel layer", types.get(node.source, (node.kind,))[0]))
        elif not own:
            foreign = node.kind != "PReLU" and any(weights[key].ndim > 1 for key in node.weights)
            reason = "not supported by the technique" if foreign else "not a kernel layer"
            skipped.append(Skip(node.source, reason, node.kind))
        elif any(own[0].fits(pattern) for pattern in exclude):
            skipped.append(Skip(node.source, "excluded by the recipe"))
        elif not node.trainable:
            skipped.append(Skip(node.source, "not supported by the technique", "frozen"))
        else:
            kernels += own
    return kernels, skipped


def left_out(model: keras.Model, exclude: Sequence[str]) -> tuple[str, ...]:
    """The nodes with kernels that fit one of the names, patterns or types.

    Raises InputError for one that none fits, ModelRefused where no kernel is left.
    """
    graph, _ = bridge.describe(model)
    types = _types(model)
    check_names(exclude, graph, types)
    found: dict[str, str] = {}
    for pattern in exclude:
        own = [node for node in graph.nodes if node.kind in KERNELS and _fits(_names(node, types), pattern)]
        if not own and pattern in KERNELS:
            continue  # a type of layers with kernels of which the model has none, as a recipe for many models names
        if not own:
            raise InputError(
                "Only layers with a kernel can be left out: the others compute as these do", received=pattern,
                allowed=", ".join(node.source for node in graph.nodes if node.kind in KERNELS),
            )  # fmt: skip
        found.update((node.name, node.source) for node in own)
    if len(found) == sum(node.kind in KERNELS for node in graph.nodes):
        raise ModelRefused(
            "Every layer with a kernel is left out of training for int8", received=", ".join(exclude),
            next_step="Name fewer, or leave qat out of the recipe",
        )  # fmt: skip
    return tuple(found)


def check_any(kernels: Sequence[Kernel], model: keras.Model, exclude: Sequence[str], verb: str) -> None:
    """Raise ModelRefused where nothing is left to work on."""
    if not kernels:
        frozen = [layer.name for layer in flat_layers(model) if layer.weights and not layer.trainable]
        raise ModelRefused(
            f"No layer of the model can be {verb}",
            received=f"{model.name}, exclude {', '.join(exclude) or 'nothing'}",
            allowed="layers with a dense or convolution kernel that may be trained",
            next_step=f"Set trainable = True on {frozen[0]}" + (f" and {len(frozen) - 1} more" if frozen[1:] else "")
            if frozen else None,
        )  # fmt: skip


def check_names(keys: Iterable[str], graph: Graph, types: Mapping[str, tuple[str, ...]]) -> None:
    """Raise InputError for a key that is no layer's name, fits none as a pattern and is no type of layer."""
    known = {name for node in graph.nodes for name in _names(node, types)} | set(KERNELS)
    for key in keys:
        if not any(fnmatch.fnmatchcase(name, key) for name in known):
            raise unknown_name("layer of the model", key, sorted({node.source for node in graph.nodes if node.weights}))


def check_numbers(graph: Graph, weights: Weights) -> None:
    """Raise ModelRefused for the first layer with a weight that is infinite or not a number."""
    for node in graph.nodes:
        for key in node.weights:
            if not np.all(np.isfinite(weights[key])):
                raise ModelRefused(
                    f"Layer {node.source} of the model has weights that are not finite numbers",
                    received=f"{int(np.sum(~np.isfinite(weights[key])))} of {weights[key].size}",
                    next_step="Train the model again with a lower learning rate, or load an earlier checkpoint",
                )


def _fits(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _types(model: keras.Model) -> dict[str, tuple[str, ...]]:
    """The name that `bridge.describe` gives a layer -> its type and the nested models that it lies in."""
    inside: dict[int, tuple[str, ...]] = {}
    waiting = [(model, ())]
    while waiting:
        outer, names = waiting.pop()
        for layer in outer.layers:
            if hasattr(layer, "layers"):
                waiting.append((layer, (*names, layer.name)))
            inside.setdefault(id(layer), names)
    return {name: (type(layer).__name__, *inside.get(id(layer), ())) for name, layer in bridge.named_layers(model)}


def _names(node: Node, types: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The user's name, the unique one, the type in the worker, the user's own type and the nested models around it."""
    own = types.get(node.weights[0].rpartition(":")[0], ()) if node.weights else ()
    return (node.source, node.name, node.kind, *own)
