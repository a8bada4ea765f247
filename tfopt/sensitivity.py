"""How much each layer can lose: one kernel at a time is pruned, nothing is trained, validation images are answered.

Li et al. 2017 (arXiv:1608.08710), section 3.2, for single weights in the place of filters. What one layer loses alone
comes back with training, and what several lose together adds up: the figures set sparsities, they predict no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mobile_bench.inputs import InputSpec
from tfopt.errors import InputError

if TYPE_CHECKING:
    import keras

    from tfopt.data.splits import Split

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
IMAGES = 1000


@dataclass(frozen=True)
class LayerSensitivity:
    """One kernel. key: its name in the neutral graph. accuracies: those of LEVELS or of the levels asked for."""

    key: str
    layer: str
    kind: str
    weights: int
    levels: tuple[float, ...]
    accuracies: tuple[float, ...]

    def drops(self, accuracy: float) -> dict[str, float]:
        """Sparsity as text -> what it costs of `accuracy`; below 0 where it gains."""
        return {f"{level:g}": round(accuracy - found, 6) for level, found in zip(self.levels, self.accuracies)}

    def most(self, accuracy: float, max_drop: float) -> float:
        """The highest level at which, and below which, no more than `max_drop` is lost; 0 where there is none."""
        allowed = 0.0
        for level, found in zip(self.levels, self.accuracies):
            if accuracy - found > max_drop + 1e-9:
                break
            allowed = level
        return allowed


@dataclass(frozen=True)
class Sensitivity:
    """accuracy: of the model as it is, on `images` images."""

    accuracy: float
    images: int
    levels: tuple[float, ...]
    layers: tuple[LayerSensitivity, ...]

    def sparsities(self, max_drop: float) -> dict[str, float]:
        """For each kernel, by its key, the most that it alone can lose for at most `max_drop` of accuracy."""
        return {row.key: row.most(self.accuracy, max_drop) for row in self.layers}

    def to_dict(self, max_drop: float | None = None) -> dict:
        rows = [
            {"layer": row.layer, "kind": row.kind, "weights": row.weights, "drops": row.drops(self.accuracy)}
            | ({} if max_drop is None else {"sparsity": row.most(self.accuracy, max_drop)})
            for row in self.layers
        ]
        return {"accuracy": self.accuracy, "images": self.images, "levels": list(self.levels), "layers": rows}


def analyze(
    model: keras.Model,
    split: Split,
    spec: InputSpec,
    *,
    levels: Sequence[float] = LEVELS,
    images: int | None = IMAGES,
    exclude: Sequence[str] = (),
    only: Collection[str] | None = None,
    progress: Callable[[int, int, dict], None] | None = None,
) -> Sensitivity:
    """Accuracy with each kernel alone pruned by magnitude to each level; the model itself stays as it is.

    images: at most so many of the split, as many of each class; None for all. exclude: layers by name, pattern or
    type. only: the kernels' keys that matter, None for all. Raises InputError for levels outside (0, 1) and images of
    one class.
    """
    from tfopt import training
    from tfopt.data.splits import Split
    from tfopt.tfmot import bridge, kernels

    levels = tuple(sorted(set(levels)))
    if not levels or not all(isinstance(level, (int, float)) and 0 < level < 1 for level in levels):
        raise InputError("The levels are not sparsities", received=levels, allowed="above 0 to below 1")
    classes = max(2, int(model.output_shape[-1]))
    if int(split.labels.max()) >= classes:
        raise InputError(
            "A label has no output in the model", received=f"label {split.labels.max()}", allowed=f"0 to {classes - 1}"
        )
    if len(np.unique(split.labels)) < 2:
        raise InputError(
            "The images are all of one class: a model that always names it would lose nothing",
            received=f"{len(split)} images of class {split.labels[0]}",
            allowed="images of two classes at least",
        )
    chosen, _ = kernels.choose(model, exclude)
    kernels.check_any(chosen, model, exclude, "pruned")
    chosen = [kernel for kernel in chosen if only is None or kernel.key in only]
    split = split.balanced(images) if images else split
    # Decoded once: each image is answered once for every layer and level.
    split = Split(split.labels, split.hashes, images=split.pixels(spec))
    copy = bridge.with_weights(model, {})
    variables = {f"{name}:{i}": v for name, layer in bridge.named_layers(copy) for i, v in enumerate(layer.weights)}
    graph = training.traced(copy, spec)
    before = training.accuracy(copy, split, spec, graph=graph)
    rows = []
    for number, kernel in enumerate(chosen):
        variable, original = variables[kernel.key], kernel.values
        order = np.argsort(np.abs(original), axis=None, kind="stable")
        accuracies = []
        for level in levels:
            pruned = original.ravel().copy()
            pruned[order[: int(level * original.size)]] = 0
            variable.assign(pruned.reshape(original.shape))
            accuracies.append(training.accuracy(copy, split, spec, graph=graph))
            if progress:
                done = number * len(levels) + len(accuracies)
                progress(done, len(chosen) * len(levels), {"what": f"sensitivity of {kernel.layer}"})
        variable.assign(original)
        rows.append(LayerSensitivity(kernel.key, kernel.layer, kernel.kind, original.size, levels, tuple(accuracies)))
    return Sensitivity(before, len(split), levels, tuple(rows))
