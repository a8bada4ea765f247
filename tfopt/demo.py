"""The demo study: the shipped baselines, every named recipe, a few hundred steps each.

It never trains a baseline. On data with other classes than any shipped baseline, the ones nearest in
form get a new head first, which is said plainly in the study.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tfopt.errors import InputError

if TYPE_CHECKING:
    from tfopt.data import ImageData

BASELINES = Path("saved_models/baselines")
RECIPES = ("baseline", "prune", "qat", "lowrank", "distill", "distill_prune_qat")

#: short enough that the whole study ends in minutes on two cores; the recipes' own settings are longer.
TRAINING = {
    "prune": {"steps": 120},
    "qat": {"steps": 80},
    "factorize": {"steps": 160, "learning_rate": 2e-3},
    "distill": {"steps": 320, "batch_size": 128},
    "*": {"evaluations": 1, "validation_images": 2000},
}

#: how a shipped baseline is fitted to classes it has never seen.
ADAPTATION = {
    "steps": 400,
    "batch_size": 128,
    "learning_rate": 3e-3,
    "augmentation": "crop_flip",
    "validation_images": 2000,
}


def baselines_folder() -> Path:
    """saved_models/baselines of the current folder, or of the checkout this package lies in."""
    for folder in (BASELINES, Path(__file__).resolve().parents[1] / BASELINES):
        if folder.is_dir():
            return folder
    raise InputError(
        "The shipped baselines are not here",
        received=BASELINES.resolve(),
        next_step="Run the demo from a clone of the repository",
    )


def prepare(place: str, *, progress: Callable[[str], None]) -> tuple[ImageData, list[Path]]:
    """The data and the two baselines of the demo: as shipped, or with a new head for other classes.

    `place` 'fashion_mnist' falls back to digits where no source answers; the data's note says so.
    """
    from tfopt import baselines, data

    images = data.load_first(["fashion_mnist", "digits"]) if place == "fashion_mnist" else data.load(place)
    progress(f"data: {images.name} from {images.source}. {images.note}".rstrip())
    models = baselines.for_classes(baselines_folder(), images.class_names)
    if models:
        return images, models
    return images, _adapted(images, progress)


def _adapted(images: ImageData, progress: Callable[[str], None]) -> list[Path]:
    """The shipped baselines with the most alike images, given a head for these classes and fine-tuned."""
    import dataclasses

    import keras

    from tfopt import baselines, models, training
    from tfopt.data import cache_folder
    from tfopt.steps import content_key

    cards = [(baselines.read_card(path.parent), path.parent) for path in sorted(baselines_folder().glob("*/card.json"))]
    channels = images.image_shape[2]
    alike = [folder for card, folder in cards if card["image_shape"][2] == channels] or [folder for _, folder in cards]
    adapted = []
    for folder in alike[:2]:
        key = content_key(folder.name, images.fingerprint, ADAPTATION)
        place = cache_folder() / "adapted" / key / f"{folder.name.split('-')[0]}-{images.name}" / "model.keras"
        adapted.append(place)
        if place.exists():
            continue
        loaded = models.adapt(models.load(folder / "model.keras"), images.class_names)
        ready = images.decoded(loaded.spec)
        report = training.fit(
            loaded.model,
            ready["train"],
            ready["validation"],
            loaded.spec,
            training.TrainConfig(**ADAPTATION),
            keras=keras,
        )
        models.save(loaded.model, place, dataclasses.replace(loaded.spec, labels=images.class_names))
        progress(
            f"{folder.name}: no shipped baseline knows these classes, so it got a new head and {report.steps} steps: "
            f"validation {report.accuracy_after:.1%}. Train a real one with tfopt train"
        )
    return adapted
