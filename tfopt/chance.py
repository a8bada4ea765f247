"""Is a model better than guessing? If not, its pixels are probably scaled in another way than it was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mobile_bench.inputs import SCALINGS
from mobile_bench.stats import wilson_interval
from tfopt import training
from tfopt.errors import ModelError
from tfopt.graph import flat_layers

if TYPE_CHECKING:
    from tfopt.data import Split
    from tfopt.models import LoadedModel

#: up to this part of the way from guessing to perfect counts as guessing.
NEAR = 0.05
#: images on which the other scalings are tried.
TRIAL_IMAGES = 300
#: by how much another scaling must be better, and on how many images, before an assumed one is refused.
CLEARLY, MANY_IMAGES = 0.1, 100


def check_not_by_chance(loaded: LoadedModel, split: Split) -> float:
    """The accuracy on `split` (validation) as a fraction; raises ModelError if the model seems to guess.

    Judged is the mean of the classes' accuracies, which is 1/classes for any model that guesses or
    names one class only, however uneven the classes are. It is near chance when it lies at most a
    twentieth of the way from there to 1 and the 99% interval (Wilson 1927) does not reach half of the
    way, so that four images or fewer never stop anything. The error names the scaling that does best on a few
    hundred of the images, and the flag to pass. A scaling that was only assumed is also refused when
    another one is right on a tenth of those images more.
    """
    graph = training.traced(loaded.model, loaded.spec)
    named = training.classify(training.predict(loaded.model, split, loaded.spec, graph=graph), loaded.spec)
    right = named == split.labels
    accuracy = float(right.mean())
    score, chance = _mean_of_classes(right, split.labels), 1 / loaded.classes
    _, upper = wilson_interval(round(score * len(split)), len(split), 0.99)
    guessing = _near(score, chance) and upper <= (1 + chance) / 2
    assumed = loaded.spec_from == "an assumption"
    if not guessing and not assumed:
        return accuracy
    _check_numbers(loaded)
    scores = _by_scaling(loaded, split.balanced(TRIAL_IMAGES), graph)
    best = max(scores, key=scores.get)
    here = f"{accuracy:.1%} right of {len(split)} images with scaling {loaded.spec.scaling} ({loaded.spec_from})"
    trials = min(TRIAL_IMAGES, len(split))
    low, _ = wilson_interval(round(scores[best] * trials), trials, 1 - 0.01 / len(scores))
    better = low > chance  # among few images the best of five scalings is better than guessing by luck
    advice = (
        f"The likely scaling is {best}, which gets {scores[best]:.1%} right on {trials} of them, "
        "averaged over the classes: "
        f"pass --input-spec scaling={best}"
    )
    if guessing:
        raise ModelError(
            "The model does no better than guessing on the validation images",
            received=f"{here}; guessing gets {chance:.1%}",
            next_step=(advice if better and not _near(scores[best], chance) else _other_order(named, split.labels))
            or "No other scaling helps: check that the model was trained for these classes, in this order",
        )
    if scores[best] >= scores.get(loaded.spec.scaling, 1) + CLEARLY and len(split) >= MANY_IMAGES:
        raise ModelError(
            "The model's scaling is unknown, and the assumed one is not the best", received=here, next_step=advice
        )
    return accuracy


def _check_numbers(loaded: LoadedModel) -> None:
    for layer in flat_layers(loaded.model):
        for weight in layer.get_weights():
            if not np.all(np.isfinite(weight)):
                raise ModelError(
                    f"Layer {layer.name} of the model has weights that are not finite numbers",
                    received=f"{int(np.sum(~np.isfinite(weight)))} of {weight.size}",
                    next_step="Train the model again with a lower learning rate, or load an earlier checkpoint",
                )


def _by_scaling(loaded: LoadedModel, split: Split, graph) -> dict[str, float]:
    scores = {}
    for name in SCALINGS:
        spec = loaded.spec.with_scaling(name)
        named = training.classify(training.predict(loaded.model, split, spec, graph=graph), spec)
        scores[name] = _mean_of_classes(named == split.labels, split.labels)
    return scores


def _other_order(named: np.ndarray, labels: np.ndarray) -> str | None:
    """A sentence if the outputs would be right with the classes in another order."""
    counts = np.zeros((int(named.max()) + 1, int(labels.max()) + 1), np.int64)
    np.add.at(counts, (named, labels), 1)
    classes = counts.argmax(1)[counts.sum(1) > 0]
    found = counts.max(1).sum() / len(labels)
    if len(set(classes)) < len(classes) or len(classes) < 2 or found <= 0.5:
        return None
    return (
        f"Its outputs follow the classes in another order: {found:.1%} would be right in that order. "
        "The data's classes are sorted by name; rename the class folders to the model's order"
    )


def _near(score: float, chance: float) -> bool:
    return score <= chance + NEAR * (1 - chance)


def _mean_of_classes(right: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
