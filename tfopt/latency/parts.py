"""What of a network costs time, as a function of how many channels its groups keep.

A part is one call of a layer with a kernel: its family says everything but the numbers of channels (kind, kernel,
strides, size of the image), so layers that differ in these alone share measurements. Batch norms behind a convolution
and ReLUs are folded into it by the converter. All other operations (additions, poolings, other activations) are
counted by the values that they read and write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import keras
import numpy as np

from tfopt.channels.dependencies import Dependencies, analyze
from tfopt.latency.micro import LayerSpec
from tfopt.rebuild import View, graph_of

kinds = keras.layers
#: kind -> the settings that a kernel's time depends on, and the one that says how many channels come out ('' where
#: that follows from how many go in).
_SETTINGS = {
    kinds.Conv1D: (("kernel_size", "strides", "padding", "dilation_rate", "groups"), "filters"),
    kinds.Conv2D: (("kernel_size", "strides", "padding", "dilation_rate", "groups"), "filters"),
    kinds.Conv2DTranspose: (("kernel_size", "strides", "padding", "output_padding", "dilation_rate"), "filters"),
    kinds.DepthwiseConv2D: (("kernel_size", "strides", "padding", "dilation_rate", "depth_multiplier"), ""),
    kinds.SeparableConv2D: (("kernel_size", "strides", "padding", "dilation_rate", "depth_multiplier"), "filters"),
    kinds.Dense: ((), "units"),
}
#: Activations that run inside the kernel, and what leaves no operation of its own behind.
_FUSED = ("linear", "relu", "relu6")
_FREE = (
    kinds.BatchNormalization, kinds.Dropout, kinds.SpatialDropout2D, kinds.Flatten, kinds.Reshape, kinds.ReLU,
    kinds.InputLayer, kinds.Identity,
)  # fmt: skip


@dataclass(frozen=True)
class Count:
    """How many channels a tensor has: `fixed`, and for each of some groups so many a unit that stays."""

    fixed: float
    units: dict[int, float] = field(default_factory=dict)

    def of(self, counts) -> int:
        """The channels where group g keeps counts[g] units."""
        return round(self.fixed + sum(each * counts[group] for group, each in self.units.items()))


@dataclass(frozen=True)
class Part:
    """One call of a kernel. made is None for a kernel that hands on the channels it reads."""

    layer: str
    family: str
    read: Count
    made: Count | None


@dataclass(frozen=True)
class Other:
    """An operation without a kernel: so many values for each channel."""

    layer: str
    values: float
    channels: Count


@dataclass(frozen=True)
class Anatomy:
    """A model's parts and its other operations. groups: the sizes of its groups of channels."""

    parts: tuple[Part, ...]
    others: tuple[Other, ...]
    groups: tuple[int, ...]

    def values(self, counts) -> float:
        """What the other operations read and write, in values."""
        return sum(other.values * other.channels.of(counts) for other in self.others)


def anatomy(model: keras.Model | Dependencies) -> Anatomy:
    """Take a model, or what `analyze` found of it, apart. Raises ModelRefused for one that is no graph of layers."""
    found = model if isinstance(model, Dependencies) else analyze(model)
    group_of = {unit: number for number, group in enumerate(found.groups) for unit in group.units.tolist()}
    parts, others = [], []
    for node in View(found.model).nodes:
        operation = node.operation
        if graph_of(operation) is not None or not node.outputs:
            continue
        read, made = (_count(found, group_of, tensor) for tensor in (node.input_tensors[0], node.outputs[0]))
        family = family_of(operation, node.input_tensors[0].shape)
        if family is not None:
            parts.append(Part(operation.name, family, read, made if _SETTINGS[type(operation)][1] else None))
        apart = not _is_free(operation) if family is None else not _activation_is_fused(operation)
        if apart:
            tensors = [node.outputs[0]] if family else [*node.input_tensors, *node.outputs]
            others += [
                Other(operation.name, _positions(tensor.shape), _count(found, group_of, tensor)) for tensor in tensors
            ]
    return Anatomy(tuple(parts), tuple(others), tuple(len(group) for group in found.groups))


def family_of(layer, shape) -> str | None:
    """What a layer's time depends on beside its numbers of channels, as JSON; None for what is no such kernel."""
    if type(layer) not in _SETTINGS or getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    spatial = [*shape[1:-1]]
    if None in spatial or getattr(layer, "quantization_mode", None):
        return None
    names, _ = _SETTINGS[type(layer)]
    settings = {name: getattr(layer, name, None) for name in names}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items() if v is not None}
    return json.dumps({"kind": type(layer).__name__, "size": spatial, **plain}, sort_keys=True)


def spec_of(family: str, read: int, made: int | None) -> LayerSpec:
    """The layer of a family with so many channels."""
    settings = json.loads(family)
    kind, size = settings.pop("kind"), settings.pop("size")
    config = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    out = _SETTINGS[getattr(kinds, kind)][1]
    return LayerSpec(kind, (*size, read), {**config, **({out: made} if out else {})})


def macs_of(family: str, read: int, made: int | None) -> float:
    """Multiply-accumulates of such a layer for one image; of a separable one only those of its second kernel."""
    settings = json.loads(family)
    size, kernel = settings["size"], settings.get("kernel_size", [])
    if settings["kind"].startswith("Separable"):
        kernel, positions = [], _outputs(settings)
    elif settings["kind"].endswith("Transpose"):
        positions = math.prod(size)
    else:
        positions = _outputs(settings) if kernel else math.prod(size)
    channels = read * settings.get("depth_multiplier", 1) * (made or 1)
    return positions * math.prod(kernel) * channels / settings.get("groups", 1)


def _outputs(settings: dict) -> int:
    """The positions of a convolution's output."""
    same, dilations = settings["padding"] == "same", settings.get("dilation_rate", [1] * len(settings["size"]))
    reach = [0 if same else dilation * (k - 1) for dilation, k in zip(dilations, settings["kernel_size"])]
    return math.prod(-(-(n - less) // stride) for n, less, stride in zip(settings["size"], reach, settings["strides"]))


def in_words(family: str) -> str:
    """'Conv2D 3x3 / 2 on 32x32', for progress and tables."""
    settings = json.loads(family)
    text = settings["kind"]
    if kernel := settings.get("kernel_size"):
        text += " " + "x".join(map(str, kernel))
    if math.prod(settings.get("strides", [1])) > 1:
        text += f" / {settings['strides'][0]}"
    if settings.get("groups", 1) > 1:
        text += f" in {settings['groups']} groups"
    return text + (f" on {'x'.join(map(str, settings['size']))}" if settings["size"] else "")


def ranges(parts: tuple[Part, ...], groups: tuple[int, ...]) -> Mapping[str, tuple]:
    """family -> (channels read, channels made or None), each (what can get fewer, what cannot) in the whole model."""
    found: dict[str, list] = {}
    for part in parts:
        rows = found.setdefault(part.family, [(set(), set()), (set(), set()) if part.made else None])
        for row, count in zip(rows, (part.read, part.made)):
            if count is not None:
                row[0 if count.units else 1].add(count.of(groups))
    return {family: tuple(rows) for family, rows in found.items()}


def _count(found: Dependencies, group_of: dict[int, int], tensor) -> Count:
    label = found.labels.get(id(tensor))
    if label is None or label.axis != len(tensor.shape) - 1:
        return Count(float(tensor.shape[-1] or 1))
    units, times = np.unique(found.units[label.ids.ravel()], return_counts=True)
    fixed, of_group = 0.0, {}
    for unit, count in zip(units.tolist(), times.tolist()):
        if unit in group_of:
            of_group[group_of[unit]] = of_group.get(group_of[unit], 0) + count
        else:
            fixed += count
    return Count(fixed, {group: total / len(found.groups[group]) for group, total in of_group.items()})


def _positions(shape) -> float:
    return float(math.prod(int(n or 1) for n in shape[1:-1]))


def _is_free(operation) -> bool:
    if isinstance(operation, kinds.Activation):
        return _activation_is_fused(operation)
    return isinstance(operation, _FREE)


def _activation_is_fused(layer) -> bool:
    activation = getattr(layer, "activation", None)
    return activation is None or getattr(activation, "__name__", "") in _FUSED
