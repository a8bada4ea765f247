"""Which channels of a network can only be removed together.

Every channel of every tensor carries the number of an atom. A kernel makes new atoms for what it gives; whatever works
channel by channel hands them on; an addition unites those of its inputs, one by one. What is united in the end is a
unit: the least that can be cut, in all layers that make it, scale it or read it (DepGraph, Fang et al. 2023,
arXiv:2301.12900, which finds the same groups by matching layer by layer). A flattened image has each atom once for
each position, a grouped convolution unites the same place of its groups, a gate of squeeze-and-excite unites with what
it gates.

Atoms that cannot go are frozen with the reason: the model's ends, layers that normalize or sort across channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import keras
import numpy as np

from tfopt.errors import ModelRefused
from tfopt.fixes.rebuild import graph_of, nodes_of

K = keras.layers
#: Layers that make channels of their own, and the axes of inputs and outputs in their kernel.
CONVOLUTIONS = (K.Conv1D, K.Conv2D, K.Conv3D)
TRANSPOSED = (K.Conv1DTranspose, K.Conv2DTranspose, K.Conv3DTranspose)
DEPTHWISE = (K.DepthwiseConv1D, K.DepthwiseConv2D)
SEPARABLE = (K.SeparableConv1D, K.SeparableConv2D)
_MERGES = (K.Add, K.Subtract, K.Multiply, K.Average, K.Maximum, K.Minimum)
_MERGE_OPS = ("Add", "Subtract", "Multiply", "Maximum", "Minimum", "Divide", "TrueDivide")
#: Channel by channel, without weights.
_PASSING = (
    "Activation", "ReLU", "LeakyReLU", "ELU", "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D",
    "AlphaDropout", "GaussianNoise", "GaussianDropout", "Identity", "ActivityRegularization",
    *(f"{kind}Pooling{n}D" for kind in ("Max", "Average", "GlobalMax", "GlobalAverage") for n in (1, 2, 3)),
    *(f"{kind}{n}D" for kind in ("ZeroPadding", "Cropping", "UpSampling") for n in (1, 2, 3)), "Resizing", "CenterCrop",
)  # fmt: skip
_PASSING_OPS = (
    "Relu", "Relu6", "Sigmoid", "Tanh", "Silu", "HardSigmoid", "HardSilu", "Elu", "Selu", "Softplus", "Softsign",
    "LeakyRelu", "Gelu", "Square", "Sqrt", "Rsqrt", "Absolute", "Abs", "Exp", "Log", "Clip", "Negative", "Power",
    "Cast", "AveragePool", "MaxPool", "Resize", "Erf", "Sign",
)  # fmt: skip
_ACROSS = {
    "LayerNormalization": "normalizes across channels", "RMSNormalization": "normalizes across channels",
    "GroupNormalization": "normalizes groups of channels", "UnitNormalization": "normalizes across channels",
    "Softmax": "is a softmax across channels", "MultiHeadAttention": "attends across channels",
    "Attention": "attends across channels", "AdditiveAttention": "attends across channels",
    "GroupQueryAttention": "attends across channels", "Dot": "multiplies across channels",
    "EinsumDense": "names its axes in an equation", "LSTM": "is recurrent", "GRU": "is recurrent",
    "SimpleRNN": "is recurrent", "ConvLSTM2D": "is recurrent", "Permute": "moves the channels",
    "RepeatVector": "turns channels into rows", "Normalization": "has fixed statistics of its channels",
    "Rescaling": "has a scale for each channel", "LayerScale": "",
}  # fmt: skip
_ACROSS_OPS = ("Softmax", "LogSoftmax", "Matmul", "Einsum", "Transpose", "Swapaxes", "Moveaxis", "Stack", "Normalize")


@dataclass
class Use:
    """One layer and the atoms it works on: `reads` along its kernel's inputs, `makes` along its outputs, `scales`
    where it has weights for each channel (batch norms, PReLU, depthwise kernels). None where it has no such side."""

    layer: keras.Layer
    reads: np.ndarray | None = None
    makes: np.ndarray | None = None
    scales: np.ndarray | None = None


@dataclass
class Dependencies:
    """What was found. uses: by layer, in the order of their first calls. reshapes: calls whose target names channels,
    id of the node -> (node, atoms of its output)."""

    uses: dict[int, Use] = field(default_factory=dict)
    reshapes: dict[int, tuple] = field(default_factory=dict)
    _parents: list[int] = field(default_factory=list)
    _reasons: dict[int, str] = field(default_factory=dict)

    def unit(self, atoms: np.ndarray) -> np.ndarray:
        """The unit of each atom: the same number for what can only go together."""
        return np.array([self._root(int(atom)) for atom in np.ravel(atoms)], np.int64).reshape(np.shape(atoms))

    def frozen(self) -> dict[int, str]:
        """Unit -> why it cannot go."""
        found: dict[int, str] = {}
        for atom, reason in self._reasons.items():
            found.setdefault(self._root(atom), reason)
        return found

    def groups(self) -> list[Group]:
        """The units that may go, those of the same layers together."""
        frozen, makers = self.frozen(), {}
        for use in self.uses.values():
            if use.makes is None:
                continue
            for unit in dict.fromkeys(self.unit(use.makes).tolist()):
                makers.setdefault(unit, []).append(use.layer.name)
        by_layers: dict[tuple, list[int]] = {}
        for unit, names in makers.items():
            if unit not in frozen:
                by_layers.setdefault(tuple(dict.fromkeys(names)), []).append(unit)
        return [Group(names, tuple(units)) for names, units in by_layers.items()]

    def fixed_layers(self) -> dict[str, str]:
        """Layers that make channels of which none can go -> why."""
        frozen, found = self.frozen(), {}
        for use in self.uses.values():
            if use.makes is not None:
                units = self.unit(use.makes).tolist()
                if all(unit in frozen for unit in units):
                    found[use.layer.name] = frozen[units[0]]
        return found

    # The walk's own ---------------------------------------------------------

    def fresh(self, count: int) -> np.ndarray:
        start = len(self._parents)
        self._parents += range(start, start + count)
        return np.arange(start, start + count, dtype=np.int64)

    def unite(self, one: np.ndarray, other: np.ndarray) -> None:
        for a, b in zip(one.tolist(), other.tolist()):
            a, b = self._root(a), self._root(b)
            if a != b:
                self._parents[max(a, b)] = min(a, b)

    def freeze(self, atoms: np.ndarray, reason: str) -> None:
        for atom in atoms.tolist():
            self._reasons.setdefault(atom, reason)

    def _root(self, atom: int) -> int:
        while self._parents[atom] != atom:
            self._parents[atom] = self._parents[self._parents[atom]]
            atom = self._parents[atom]
        return atom


@dataclass(frozen=True)
class Group:
    """Units that the same layers make. layers: their names; units: their numbers, in order."""

    layers: tuple[str, ...]
    units: tuple[int, ...]


def find(model: keras.Model) -> Dependencies:
    """Walk a functional or Sequential model, nested ones and shared layers too.

    Raises ModelRefused for a layer or operation that the walk does not know, by its name.
    """
    graph = graph_of(model)
    if graph is None:
        raise ModelRefused(
            "A subclassed or unbuilt model cannot be walked", received=f"{model.name} ({type(model).__name__})",
            allowed="a functional or Sequential model",
            next_step="Rebuild it with keras.Input and keras.Model(inputs, outputs)",
        )  # fmt: skip
    walk = _Walk()
    inputs = []
    for tensor in graph.inputs:
        atoms = walk.found.fresh(int(tensor.shape[-1]))
        walk.found.freeze(atoms, "is the model's input")
        inputs.append(atoms)
    for atoms in walk.graph(graph, inputs):
        walk.found.freeze(atoms, "is the model's output")
    return walk.found


class _Walk:
    def __init__(self):
        self.found = Dependencies()
        self._answers: dict[
            int, list[np.ndarray]
        ] = {}  # of layers with weights and of nested models: one for all calls
        self._heard: dict[int, list[np.ndarray]] = {}

    def graph(self, graph, inputs: list[np.ndarray]) -> list[np.ndarray]:
        values = {id(tensor): atoms for tensor, atoms in zip(graph.inputs, inputs)}
        for node in nodes_of(graph):
            given = [values[id(tensor)] for tensor in node.input_tensors]
            for tensor, atoms in zip(node.outputs, self._call(node, given)):
                values[id(tensor)] = atoms
        return [values[id(tensor)] for tensor in graph.outputs]

    def _call(self, node, given: list[np.ndarray]) -> list[np.ndarray]:
        operation = node.operation
        inner = graph_of(operation)
        if inner is None and not (isinstance(operation, keras.Layer) and operation.weights):
            return self._stateless(node, operation, given)
        key = id(operation)
        if key in self._answers:  # called again: what it reads now must go with what it read before
            for before, now in zip(self._heard[key], given):
                self.found.unite(before, now)
            return self._answers[key]
        self._heard[key] = given
        self._answers[key] = self.graph(inner, given) if inner is not None else [self._weighted(operation, given)]
        return self._answers[key]

    def _weighted(self, layer, given: list[np.ndarray]) -> np.ndarray:
        found, atoms = self.found, given[0]
        kind = type(layer).__name__
        if getattr(layer, "data_format", "channels_last") == "channels_first":
            raise _unknown(layer, f"{kind} with channels first")
        if isinstance(layer, DEPTHWISE):
            made = np.repeat(atoms, layer.depth_multiplier)
            found.uses[id(layer)] = Use(layer, scales=atoms)
        elif isinstance(layer, SEPARABLE):
            made = found.fresh(layer.filters)
            found.uses[id(layer)] = Use(layer, reads=atoms, makes=made)
        elif isinstance(layer, CONVOLUTIONS + TRANSPOSED):
            made = found.fresh(layer.filters)
            found.uses[id(layer)] = Use(layer, reads=atoms, makes=made)
            groups = getattr(layer, "groups", 1)
            for part in (atoms, made) if groups > 1 else ():
                width = len(part) // groups
                for group in range(1, groups):
                    found.unite(part[:width], part[group * width : (group + 1) * width])
        elif isinstance(layer, K.Dense):
            made = found.fresh(layer.units)
            found.uses[id(layer)] = Use(layer, reads=atoms, makes=made)
        elif isinstance(layer, K.BatchNormalization):
            axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
            if axis not in (-1, len(layer.input.shape) - 1):
                raise _unknown(layer, f"{kind} over axis {axis}")
            made = atoms
            found.uses[id(layer)] = Use(layer, scales=atoms)
        elif isinstance(layer, K.PReLU):
            made = atoms
            if layer.alpha.shape[-1] == len(atoms):
                found.uses[id(layer)] = Use(layer, scales=atoms)
        elif kind in _ACROSS:
            for part in given:
                found.freeze(part, f"is read by {layer.name}, which {_ACROSS[kind] or 'scales a frozen channel'}")
            made = found.fresh(int(layer.output.shape[-1]))
            found.freeze(made, f"is made by {layer.name}, which {_ACROSS[kind] or 'scales a frozen channel'}")
        else:
            raise _unknown(layer, kind)
        if getattr(getattr(layer, "activation", None), "__name__", "") == "softmax":
            found.freeze(made, f"goes through the softmax of {layer.name}")
        return made

    def _stateless(self, node, operation, given: list[np.ndarray]) -> list[np.ndarray]:
        kind, shape = type(operation).__name__, tuple(node.outputs[0].shape)
        if not type(operation).__module__.startswith("keras."):
            raise _unknown(operation, kind)
        if kind == "Activation" and getattr(operation.activation, "__name__", "") == "softmax":
            return self._stop(operation, given, node, "is a softmax across channels")
        if kind in _PASSING or kind in _PASSING_OPS or kind.startswith("Random"):
            return [given[0]]
        if isinstance(operation, _MERGES) or kind in _MERGE_OPS:
            return [self._merged(operation, given, len(shape), node)]
        if kind == "Concatenate":
            axis = operation.axis % len(shape)
            if axis == len(shape) - 1:
                return [np.concatenate(given)]
            for other in given[1:]:
                self.found.unite(given[0], other)
            return [given[0]]
        if kind == "Rescaling" and np.size(operation.scale) == 1 and np.size(operation.offset) == 1:
            return [given[0]]
        if kind in ("Flatten", "Reshape", "Squeeze", "ExpandDims", "Ravel"):
            return self._reshaped(node, operation, given, shape)
        if kind in ("Mean", "Max", "Min", "Sum", "Amax", "Amin"):
            axis = np.atleast_1d(operation.axis if operation.axis is not None else -1)
            rank = len(node.input_tensors[0].shape)
            if operation.axis is not None and rank - 1 not in [int(a) % rank for a in axis]:
                return [given[0]]
            return self._stop(operation, given, node, "reduces the channels")
        if kind == "Pad":
            if tuple(np.atleast_1d(operation.pad_width[-1])) in ((0, 0), (0,)):
                return [given[0]]
            return self._stop(operation, given, node, "pads the channels")
        if kind == "GetItem":
            return self._sliced(operation, given, node)
        if kind in _ACROSS or kind in _ACROSS_OPS or kind == "Split":
            return self._stop(operation, given, node, _ACROSS.get(kind) or "works across channels")
        raise _unknown(operation, kind)

    def _merged(self, operation, given: list[np.ndarray], rank: int, node) -> np.ndarray:
        tensors = [tensor for tensor in node.input_tensors]
        widest = max(range(len(given)), key=lambda n: len(given[n]))
        for number, atoms in enumerate(given):
            if number == widest:
                continue
            if len(atoms) == len(given[widest]):
                self.found.unite(given[widest], atoms)
            else:  # one channel that is broadcast over all
                self.found.freeze(atoms, f"is spread over all channels by {operation.name}")
        arguments = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
        arrays = [one for one in arguments if not hasattr(one, "_keras_history") and np.size(one) > 1]
        if arrays and len(tensors) == 1:
            self.found.freeze(given[0], f"is combined with an array in {operation.name}")
        return given[widest]

    def _reshaped(self, node, operation, given, shape: tuple) -> list[np.ndarray]:
        atoms, before = given[0], tuple(node.input_tensors[0].shape)
        width = int(shape[-1]) if shape[-1] is not None else 0
        if width == len(atoms):
            made = atoms
        elif None not in before[1:] and len(shape) == 2 and width == int(np.prod(before[1:])):
            made = np.tile(atoms, width // len(atoms))  # rows, columns, channels: the channel runs fastest
        else:
            return self._stop(operation, given, node, "regroups the channels")
        if type(operation).__name__ == "Reshape":
            self.found.reshapes[id(node)] = (node, made)
        return [made]

    def _sliced(self, operation, given, node) -> list[np.ndarray]:
        key = node.arguments.args[1]
        key = key if isinstance(key, tuple) else (key,)
        rank = len(node.input_tensors[0].shape)
        plain = all(isinstance(part, (slice, int)) for part in key)
        if plain and (len(key) < rank or key[rank - 1] == slice(None)):
            return [given[0]]
        return self._stop(operation, given, node, "picks channels by their place")

    def _stop(self, operation, given, node, why: str) -> list[np.ndarray]:
        """Nothing that is read here can go, and nothing that comes out of it."""
        for atoms in given:
            self.found.freeze(atoms, f"is read by {operation.name}, which {why}")
        made = []
        for tensor in node.outputs:
            made.append(self.found.fresh(int(tensor.shape[-1] or 1)))
            self.found.freeze(made[-1], f"is made by {operation.name}, which {why}")
        return made


def _unknown(operation, kind: str) -> ModelRefused:
    return ModelRefused(
        f"The channels of layer {operation.name} cannot be followed", received=kind,
        allowed="layers and operations of Keras whose effect on channels is known",
        next_step="Exclude channel pruning from the recipe, or replace the layer",
    )  # fmt: skip
