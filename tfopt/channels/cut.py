"""The physically smaller model: kernels, batch norms and reshapes without the units that were chosen to go."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import keras
import numpy as np

from tfopt.channels.dependencies import CONVOLUTIONS, DEPTHWISE, SEPARABLE, TRANSPOSED, Dependencies, Use
from tfopt.errors import ModelRefused
from tfopt.fixes.rebuild import Rebuild, View, check_names


def cut(model: keras.Model, dependencies: Dependencies, removed: Collection[int]) -> keras.Model:
    """A copy of the model without some units: same names, same inputs and outputs, fewer channels between them.

    dependencies: what `dependencies.find` gave for this very model. removed: numbers of units. Raises ModelRefused
    where a layer would be left without a channel.
    """
    gone = set(removed)
    kept = {id(use.layer): _kept(dependencies, use, gone) for use in dependencies.uses.values()}
    view = View(model)
    check_names(view)
    changes: dict[int, object] = {}
    for node in view.nodes:
        use = dependencies.uses.get(id(node.operation))
        if use is not None and not all(mask.all() for mask in kept[id(use.layer)].values()):
            weights, settings = sliced(use, kept[id(use.layer)])
            changes[id(node)] = _replace(use.layer, weights, settings)
        elif id(node) in dependencies.reshapes:
            width = int(_mask(dependencies, dependencies.reshapes[id(node)][1], gone).sum())
            if width != node.outputs[0].shape[-1]:
                changes[id(node)] = _reshape(node, width)
    return Rebuild(view, changes).model()


def sliced(use: Use, kept: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], dict]:
    """A layer's weights without the channels that go, and the settings that follow. kept: masks by side of the Use."""
    layer, weights = use.layer, use.layer.get_weights()
    bias = getattr(layer, "use_bias", False)
    if isinstance(layer, DEPTHWISE):
        spread = np.repeat(kept["scales"], layer.depth_multiplier)
        return [weights[0][..., kept["scales"], :], *([weights[1][spread]] if bias else [])], {}
    if isinstance(layer, SEPARABLE):
        spread = np.repeat(kept["reads"], layer.depth_multiplier)
        point = weights[1][..., spread, :][..., kept["makes"]]
        own = [weights[0][..., kept["reads"], :], point, *([weights[2][kept["makes"]]] if bias else [])]
        return own, {"filters": int(kept["makes"].sum())}
    if use.makes is None:
        return [array[..., kept["scales"]] for array in weights], {}
    reads = kept["reads"]
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        reads = reads[: len(reads) // layer.groups]  # the same places in every group
    if isinstance(layer, TRANSPOSED):
        kernel = weights[0][..., kept["makes"], :][..., reads]
    else:
        kernel = weights[0][..., reads, :][..., kept["makes"]]
    size = "units" if isinstance(layer, keras.layers.Dense) else "filters"
    return [kernel, *([weights[1][kept["makes"]]] if bias else [])], {size: int(kept["makes"].sum())}


def _kept(dependencies: Dependencies, use: Use, gone: set[int]) -> dict[str, np.ndarray]:
    masks = {}
    for side in ("reads", "makes", "scales"):
        atoms = getattr(use, side)
        if atoms is not None:
            masks[side] = _mask(dependencies, atoms, gone)
            if not masks[side].any():
                raise ModelRefused(
                    f"Layer {use.layer.name} would be left without a channel",
                    received=f"{len(atoms)} of {len(atoms)} cut",
                    next_step="Cut less of it, or exclude it",
                )  # fmt: skip
    return masks


def _mask(dependencies: Dependencies, atoms: np.ndarray, gone: set[int]) -> np.ndarray:
    return ~np.isin(dependencies.unit(atoms), list(gone))


def _replace(layer, weights: list[np.ndarray], settings: dict):
    def change(rebuild: Rebuild, node):
        rebuild.keep(layer, weights, **settings)
        return rebuild.call(node)

    return change


def _reshape(node, width: int):
    shape = [-1 if n is None else int(n) for n in node.outputs[0].shape[1:-1]]

    def change(rebuild: Rebuild, node):
        if isinstance(node.operation, keras.Layer):
            rebuild.keep(node.operation, target_shape=(*shape, width))
            return rebuild.call(node)
        value = rebuild.value(node.input_tensors[0])
        return rebuild.op(keras.ops.reshape, value, (-1, *shape, width), name=node.operation.name)

    return change
