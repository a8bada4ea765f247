"""Which channels of a Keras graph hang together, and which have to stay.

The graph is walked once, call by call. Each tensor gets a Label; each kernel gives birth to channels; each operation
has a rule (tfopt.channels.rules) that hands them on, ties them, or fixes them. In the end:

    unit     channels that live or die together, through additions, shared layers, gates, groups of a convolution
    group    units that occur in exactly the same tensors: pruning takes so many of each group, so no tensor gets empty

conv(16) and conv(16) concatenated, then added to conv(32): 32 units in two groups of 16.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import keras
import numpy as np

from tfopt.channels import kernels, operations, shapes, values  # noqa: F401 - importing them fills the table of rules
from tfopt.channels.ids import EXCLUDED, FIRST_OR_LAST, SHAPE, UNSUPPORTED, Ids, Keep, Label, Reason
from tfopt.channels.rules import by_channel, find, opaque
from tfopt.errors import ModelRefused, unknown_name
from tfopt.rebuild import View, check_names, graph_of, nodes_of


@dataclass(frozen=True, eq=False)
class Use:
    """One axis of one weight that lies along channels.

    index: the weight's place in layer.get_weights(); None where only settings follow. role: 'out' makes the channels,
    'in' reads and mixes them, 'along' treats each by itself. kind: kernel, bias, scale (of a norm) or other.
    """

    layer: keras.Layer
    index: int | None
    axis: int
    ids: np.ndarray
    role: str
    kind: str


@dataclass(frozen=True, eq=False)
class Group:
    """Units that occur in the same tensors. layers: the kernels that make them. units: int (size,).

    positions: how many channels of a tensor one unit is at least, above 1 behind grouped convolutions.
    """

    layers: tuple[str, ...]
    units: np.ndarray
    positions: int = 1

    @property
    def name(self) -> str:
        return self.layers[0]

    def __len__(self) -> int:
        return len(self.units)


@dataclass(frozen=True, eq=False)
class Dependencies:
    """What `analyze` found. units: the unit of each id. fixed: unit -> why it stays. labels: id(tensor) -> Label.

    settings: id(layer) -> what of its settings follows a choice. edits: id(node) -> the call that takes its place.
    """

    model: keras.Model
    units: np.ndarray
    fixed: dict[int, Reason]
    groups: tuple[Group, ...]
    uses: tuple[Use, ...]
    labels: dict[int, Label]
    settings: dict[int, Callable[[Keep], dict]] = field(default_factory=dict)
    edits: dict[int, Callable] = field(default_factory=dict)

    def keep(self, removed: Iterable[int] = ()) -> Keep:
        return Keep(self.units, removed)

    def kernels(self) -> list[Use]:
        """The kernel of each layer along the channels that it makes; for a depthwise one those that it hands on."""
        return [use for use in self.uses if use.kind == "kernel" and use.role in ("out", "along")]

    def eligible(self) -> list[Use]:
        """Those of `kernels` of which at least one channel can go."""
        return [use for use in self.kernels() if self.free(use.ids)]

    def free(self, ids: np.ndarray) -> int:
        """How many of the channels can go."""
        return sum(unit not in self.fixed for unit in self.units[ids.ravel()].tolist())

    def stays(self) -> list[tuple[str, Reason]]:
        """(layer, reason) for each kernel of which no channel can go."""
        found = []
        for use in self.kernels():
            if not self.free(use.ids):
                reasons = [self.fixed[unit] for unit in self.units[use.ids.ravel()].tolist()]
                found.append((use.layer.name, min(reasons, key=lambda reason: reason.rank)))
        return found


def analyze(model: keras.Model, *, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> Dependencies:
    """Walk a functional or Sequential model.

    include: patterns of layer names or types; only their kernels lose channels (empty: all). exclude: whose channels
    stay; an excluded layer may be of a kind that nobody described. The name of a nested model means all layers in it.
    Raises ModelRefused for a model that cannot be
    walked and for a layer without a rule.
    """
    include, exclude = tuple(include), tuple(exclude)
    if not isinstance(model, keras.Model) or graph_of(model) is None or not model.built:
        raise ModelRefused(
            "The model is no graph of layers, so its channels cannot be followed",
            received=f"{getattr(model, 'name', model)} of class {type(model).__name__}",
            allowed="built functional and Sequential models",
            next_step="Rebuild it with keras.Input and keras.Model(inputs, outputs), then copy the weights",
        )
    view = View(model)
    check_names(view)
    for pattern in (*include, *exclude):
        if not any(matches(node.operation, (pattern,)) for node in view.nodes):
            names = [name for node in view.nodes for name in (node.operation.name, type(node.operation).__name__)]
            raise unknown_name("layer, type or pattern of layers", pattern, names)
    return Walk(include, exclude).run(model)


def matches(operation, patterns: Iterable[str]) -> bool:
    names = (operation.name, type(operation).__name__)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


class Walk:
    """One pass over a model; rules call its methods."""

    def __init__(self, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()):
        self._include, self._exclude = include, exclude
        self.all = Ids()
        self._labels: dict[int, Label | None] = {}
        self._born: dict[int, np.ndarray] = {}
        self._uses: dict[tuple, Use] = {}
        self._settings: dict[int, Callable] = {}
        self._edits: dict[int, Callable] = {}
        self._walked: set[int] = set()
        # Whether the nested model that is being walked was itself included or excluded.
        self._inside_included, self._inside_excluded = False, False

    def run(self, model: keras.Model) -> Dependencies:
        graph = graph_of(model)
        for tensor in graph.inputs:
            self._labels[id(tensor)] = self.fixed(tensor, "the model's input", FIRST_OR_LAST)
        self._graph(graph)
        for tensor in graph.outputs:
            label = self.label(tensor)
            if label is not None:
                self.all.fix(label.ids, Reason(FIRST_OR_LAST, "the model's output"))
        units = self.all.units()
        fixed = self.all.fixed(units)
        labels = {key: label for key, label in self._labels.items() if label is not None}
        uses = tuple(self._uses.values())
        groups = _groups(units, fixed, labels, uses)
        return Dependencies(model, units, fixed, groups, uses, labels, self._settings, self._edits)

    def _graph(self, graph) -> None:
        self._walked.add(id(graph))
        for node in nodes_of(graph):
            inner = graph_of(node.operation)
            made = self._nested(node, inner) if inner is not None else self._call(node)
            made = made if isinstance(made, list) else [made]
            self._labels.update((id(tensor), label) for tensor, label in zip(node.outputs, made, strict=True))

    def _nested(self, node, graph) -> list[Label | None]:
        """A model in the model: its input is what it is called on; what it is called on again is tied to that."""
        for inner, outer in zip(graph.inputs, node.input_tensors, strict=True):
            given = self.label(outer)
            if id(graph) not in self._walked:
                if given is not None and len(inner.shape) != len(outer.shape):
                    self.all.fix(given.ids, Reason(SHAPE, f"{node.operation.name} takes another number of axes"))
                    given = self.fixed(inner, "the input of a nested model")
                self._labels[id(inner)] = given
            elif (known := self._labels[id(inner)]) is not None:
                self.all.tie(known.ids, self.along(outer, known.axis))
            elif given is not None:
                self.all.fix(given.ids, Reason(SHAPE, f"{node.operation.name} is called in two ways"))
        if id(graph) not in self._walked:
            outside = self._inside_included, self._inside_excluded
            self._inside_included |= matches(node.operation, self._include)
            self._inside_excluded |= matches(node.operation, self._exclude)
            self._graph(graph)
            self._inside_included, self._inside_excluded = outside
        return [self._labels[id(tensor)] for tensor in graph.outputs]

    def _call(self, node):
        operation = node.operation
        rule = find(operation)
        excluded = self._excluded(operation)
        if rule is None and not excluded:
            raise ModelRefused(
                "Nobody has said how channels go through a layer, so nothing around it can be cut",
                received=f"{operation.name} of class {type(operation).__name__}",
                next_step=f"Exclude it (its channels then stay as they are): exclude: [{operation.name}]",
            )
        try:
            return (rule or opaque)(self, node)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ModelRefused(
                "The channels of a layer cannot be followed",
                received=f"{operation.name} of class {type(operation).__name__}: {error}",
                next_step=f"Exclude it (its channels then stay as they are): exclude: [{operation.name}]",
            ) from error

    def _excluded(self, operation) -> bool:
        return self._inside_excluded or matches(operation, self._exclude)

    # What rules see and say.

    def label(self, tensor) -> Label | None:
        return self._labels[id(tensor)]

    def fixed(self, tensor, why: str, kind: str = UNSUPPORTED) -> Label | None:
        """A label of channels that stay; None where the last axis is the batch or of unknown size."""
        if len(tensor.shape) < 2 or tensor.shape[-1] is None:
            return None
        ids = self.all.new(int(tensor.shape[-1]))
        self.all.fix(ids, Reason(kind, why))
        return Label(len(tensor.shape) - 1, ids)

    def ids(self, node, axis: int, which: int = 0) -> np.ndarray:
        """The channels of a call's input along that axis, (size,); see `along`."""
        tensor = node.input_tensors[which]
        return self.along(tensor, axis % len(tensor.shape), node.operation.name)

    def along(self, tensor, axis: int, reader: str = "an operation") -> np.ndarray:
        """The channels of a tensor along that axis. Where it has none there, those it has elsewhere stay."""
        label = self.label(tensor)
        if label is not None and label.axis == axis:
            return label.ids
        if label is not None:
            self.all.fix(label.ids, Reason(SHAPE, f"{reader} reads another axis than that of these channels"))
        if tensor.shape[axis] is None:
            raise ValueError(f"the size of axis {axis} is not known")
        ids = self.all.new(int(tensor.shape[axis]))
        self.all.fix(ids, Reason(SHAPE, f"{reader} reads another axis than that of its channels"))
        return ids

    def keep_inputs(self, node, why: str, kind: str = UNSUPPORTED) -> None:
        for tensor in node.input_tensors:
            label = self.label(tensor)
            if label is not None:
                self.all.fix(label.ids, Reason(kind, why))

    def born(self, layer: keras.Layer, count: int) -> np.ndarray:
        """The channels that a kernel makes, the same ones at each of its calls."""
        if id(layer) not in self._born:
            self._born[id(layer)] = ids = self.all.new(count)
            if self._include and not self._inside_included and not matches(layer, self._include):
                self.all.fix(ids, Reason(EXCLUDED, f"{layer.name} is left alone"))
            activation = getattr(layer, "activation", None)
            if activation is not None and not by_channel(activation):
                name = getattr(activation, "__name__", "its activation")
                self.all.fix(ids, Reason(UNSUPPORTED, f"{layer.name} ends in {name}, which mixes channels"))
        return self._born[id(layer)]

    def use(self, layer, variable, axis: int, ids: np.ndarray, role: str, kind: str = "other") -> None:
        """A weight lies along channels; variable None: only settings follow. At a second call both are tied."""
        if isinstance(variable, keras.Variable):
            index = next(i for i, weight in enumerate(layer.weights) if weight is variable)
            axis %= len(variable.shape)
            if variable.shape[axis] != ids.size:
                raise ValueError(f"a weight of {tuple(variable.shape)} does not lie along {ids.size} channels")
        else:
            index = None
        key = (id(layer), index, axis)
        if role != "in" and self._excluded(layer):
            self.all.fix(ids, Reason(EXCLUDED, f"{layer.name} is left alone"))
        if key in self._uses:
            self.all.tie(self._uses[key].ids, ids)
        else:
            self._uses[key] = Use(layer, index, axis, ids, role, kind)

    def settings(self, layer, follow: Callable[[Keep], dict]) -> None:
        """What of the layer's settings follows the number of channels that stay."""
        self._settings.setdefault(id(layer), follow)

    def edit(self, node, call: Callable) -> None:
        """The call that takes a node's place: call(keep, rebuild, node) -> the new output."""
        self._edits[id(node)] = call


def _groups(units: np.ndarray, fixed: dict, labels: dict[int, Label], uses: tuple[Use, ...]) -> tuple[Group, ...]:
    count = int(units.max()) + 1 if len(units) else 0
    chance = np.random.default_rng(0)
    # Two random sums stand for the set of tensors: equal sets have equal sums, others differ but for 1 in 2^120.
    marks = np.zeros((count, 2), np.uint64)
    arrays = [label.ids for label in labels.values()] + [use.ids for use in uses]
    for ids in {id(array): array for array in arrays}.values():
        marks[np.unique(units[ids])] += chance.integers(0, 2**63, 2, dtype=np.uint64)
    free = np.array([unit for unit in range(count) if unit not in fixed], dtype=np.int64)
    if not len(free):
        return ()
    kinds, kind_of = np.unique(marks[free], axis=0, return_inverse=True)
    kind_of = kind_of.reshape(-1)
    group_of = np.full(count, -1)
    group_of[free] = kind_of
    layers: list[dict[str, None]] = [{} for _ in kinds]
    positions = np.full(len(kinds), np.iinfo(np.int64).max)
    for use in uses:
        found = group_of[units[use.ids.ravel()]]
        members = units[use.ids.ravel()][found >= 0]
        if not len(members):
            continue
        each, times = np.unique(members, return_counts=True)
        if use.kind == "kernel":
            # The kernel of a grouped convolution lies along the channels of one group.
            whole = getattr(use.layer, "groups", 1) if use.role == "in" else 1
            np.minimum.at(positions, group_of[each], times * whole)
        if use.role == "out" and use.kind == "kernel":
            for number in np.unique(group_of[each]).tolist():
                layers[number].setdefault(use.layer.name)
    made = []
    for number in range(len(kinds)):
        names = tuple(layers[number])
        if names:
            made.append((free[kind_of == number], names, int(positions[number])))
    made.sort(key=lambda item: int(item[0][0]))
    return tuple(Group(names, members, step) for members, names, step in made)
