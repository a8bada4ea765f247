"""The physically smaller model: every layer with fewer channels, every weight without the slices of those that went."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import keras
import numpy as np

from mobile_bench.records import Skip
from tfopt.channels.dependencies import Dependencies, Use
from tfopt.channels.ids import Keep
from tfopt.errors import InputError, ModelRefused
from tfopt.graph import count_macs, count_parameters, flat_layers
from tfopt.rebuild import Rebuild, View


@dataclass(frozen=True)
class CutReport:
    """What a cut did. layers: name -> (channels before, channels after), each kernel of which some channel could go.

    skipped: the kernels that kept all their channels because they have to, and why. MACs are those of one image.
    """

    layers: dict[str, tuple[int, int]]
    skipped: tuple[Skip, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int


def cut(found: Dependencies, removed: Iterable[int]) -> keras.Model:
    """A copy of the model without these units; inputs, outputs, and the names of layers stay as they are.

    Raises InputError for a unit that has to stay, and where a group would lose its last one; ModelRefused where Keras
    cannot build what is left.
    """
    removed = sorted({int(unit) for unit in removed})
    _check(found, removed)
    keep = found.keep(removed)
    edits = {key: functools.partial(_changed, call, keep) for key, call in found.edits.items()}
    rebuild = _Cutter(found, edits, keep)
    for layer, uses in by_layer(found.uses).items():
        if not all(keep.all(use.ids) for use in uses):
            follow = found.settings.get(id(layer))
            changes = {**_initializers(layer), **(follow(keep) if follow else {})}
            rebuild.keep(layer, sliced(layer, uses, keep), **changes)
    try:
        return rebuild.model()
    except Exception as error:
        raise ModelRefused(
            "Keras cannot build the model without these channels",
            received=f"{found.model.name}: {' '.join(str(error).split())[:300]}",
            next_step="Exclude the layer that the message names: exclude: [NAME]",
        ) from error


def _initializers(layer: keras.Layer) -> dict:
    """Others for those that would fill a weight with an array of the old shape; the weights are set all the same."""
    names = [name for name in layer.get_config() if name.endswith("_initializer")]
    values = {name: getattr(getattr(layer, name, None), "value", None) for name in names}
    return {name: "zeros" for name, value in values.items() if np.size(value) > 1}


def _check(found: Dependencies, removed: list[int]) -> None:
    for unit in removed:
        if unit in found.fixed:
            raise InputError(
                "A channel cannot be removed", received=f"unit {unit}: {found.fixed[unit].detail}",
                allowed="the units of Dependencies.groups",
            )  # fmt: skip
    gone = np.array(removed, dtype=np.int64)
    for group in found.groups:
        if np.isin(group.units, gone).all():
            raise InputError(
                f"Layer {group.name} would be left without a channel", received=f"all {len(group)} of its group",
                allowed=f"at most {len(group) - 1}",
            )  # fmt: skip


def _changed(call, keep: Keep, rebuild, node):
    return call(keep, rebuild, node)


class _Cutter(Rebuild):
    """A Rebuild in which the inputs of nested models get narrower too."""

    def __init__(self, found: Dependencies, changes: dict, keep: Keep):
        super().__init__(View(found.model), changes)
        self._labels, self._keep = found.labels, keep

    def input_shape(self, tensor) -> tuple:
        shape, label = list(tensor.shape), self._labels.get(id(tensor))
        if label is not None:
            shape[label.axis] = self._keep.count(label.ids)
        return tuple(shape[1:])


def by_layer(uses: Iterable[Use]) -> dict[keras.Layer, list[Use]]:
    """The uses of each layer, layers told apart by identity."""
    layers, found = {}, defaultdict(list)
    for use in uses:
        layers[id(use.layer)] = use.layer
        found[id(use.layer)].append(use)
    return {layer: found[key] for key, layer in layers.items()}


def sliced(layer: keras.Layer, uses: Iterable[Use], keep: Keep) -> list[np.ndarray]:
    """The layer's weights without the channels that go."""
    weights = layer.get_weights()
    for use in uses:
        if use.index is not None:
            weights[use.index] = np.compress(keep.mask(use.ids), weights[use.index], axis=use.axis)
    return weights


def report(found: Dependencies, smaller: keras.Model, removed: Iterable[int]) -> CutReport:
    """What became of the model: channels of each kernel, parameters, MACs, and what could not be cut."""
    keep = found.keep(removed)
    return _report(found, smaller, {use.layer.name: keep.count(use.ids) for use in found.eligible()})


def compare(found: Dependencies, smaller: keras.Model) -> CutReport:
    """The same after several cuts, by the names of the layers. found: of the model before the first."""
    layers = {layer.name: layer for layer in flat_layers(smaller)}
    after = {}
    for use in found.eligible():
        # Kernels keep their form, so what has become narrower is the same axis of the same weight.
        after[use.layer.name] = int(layers[use.layer.name].weights[use.index].shape[use.axis])
    return _report(found, smaller, after)


def _report(found: Dependencies, smaller: keras.Model, after: dict[str, int]) -> CutReport:
    return CutReport(
        layers={use.layer.name: (int(use.ids.size), after[use.layer.name]) for use in found.eligible()},
        skipped=tuple(Skip(name, reason.kind, reason.detail) for name, reason in found.stays()),
        parameters_before=count_parameters(found.model),
        parameters_after=count_parameters(smaller),
        macs_before=count_macs(found.model),
        macs_after=count_macs(smaller),
    )
