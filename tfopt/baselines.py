"""Train a classifier from scratch, and the card that says what it is.

FOLDER/model.keras    the model, with its InputSpec inside
FOLDER/card.json      data, command, seed, accuracy of the exported file with its interval, size, date
"""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from mobile_bench import stats
from mobile_bench.files import write_json
from mobile_bench.inputs import InputSpec
from tfopt import attest, convert, steps
from tfopt.data import ImageData
from tfopt.errors import ConversionError, InputError
from tfopt.training import TrainConfig

CARD_VERSION = 1

#: what `tfopt train` does unless told otherwise: one cycle of SGD with the usual CIFAR augmentation.
DEFAULT_TRAINING = TrainConfig(
    epochs=20, batch_size=128, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, augmentation="crop_flip",
    validation_images=2000,
)  # fmt: skip


def train(
    architecture: str,
    data: ImageData,
    out: Path,
    *,
    width: float = 1.0,
    config: TrainConfig = DEFAULT_TRAINING,
    size: int | None = None,
    seed: int = 0,
    command: str = "",
    replace: bool = False,
    progress: Callable[[int, int, dict], None] | None = None,
) -> dict:
    """Train, save and attest a classifier; returns the card.

    architecture: a name of tfopt.builders, or 'keras:NAME' for one of keras.applications. size: image height and
    width, the data's own by default. A model that is there already is refused unless `replace`. The accuracy on the
    card is that of the exported float32 .tflite on the test split.
    """
    import keras

    from tfopt import builders, models, training
    from tfopt.api import check_seed

    check_seed(seed)
    check_place(out, replace=replace)

    height, width_px, channels = data.image_shape
    if size:
        height = width_px = size
    spec = InputSpec(height, width_px, channels, labels=data.class_names)
    keras.utils.set_random_seed(seed)
    if architecture.startswith("keras:"):
        if width != 1.0:
            raise InputError(
                "The models of keras.applications have a width of their own", received=f"{architecture}, width {width}",
                next_step="Leave --width out, or take one of tfopt's own architectures",
            )  # fmt: skip
        name = architecture.removeprefix("keras:")
        model, spec = models.untrained_application(name, spec.shape, data.class_names)
    else:
        model = builders.build(architecture, spec.shape, data.classes, width)
    data = data.decoded(spec)
    report = training.fit(
        model, data["train"], data["validation"], spec, config, keras=keras, seed=seed, progress=progress
    )
    out = Path(out)
    models.save(model, out / "model.keras", spec)
    return write_card(out, data, training_report=report.to_dict(), config=config, seed=seed, command=command)


def check_place(out: Path, *, replace: bool = False) -> None:
    """Raise InputError, before hours of training, where a model cannot or must not be put."""
    out = Path(out)
    taken = next((path for path in (out, *out.parents) if path.exists()), None)
    if taken is not None and not taken.is_dir():
        raise InputError("The model's place lies in a file", received=f"{out} ({taken} is a file)", allowed="a folder")
    if (out / "model.keras").exists() and not replace:
        raise InputError(
            "There is a model in the folder already",
            received=out / "model.keras",
            next_step="Choose another folder with --out, or say --force to replace it",
        )


def write_card(
    out: Path, data: ImageData, *, training_report: dict, config: TrainConfig, seed: int, command: str
) -> dict:
    """Export FOLDER/model.keras to float32, count its right answers on test, and write card.json."""
    from tfopt import models
    from tfopt.graph import count_macs, count_parameters

    loaded = models.load(out / "model.keras")
    spec, test = loaded.spec, data["test"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (converted,) = convert.convert(out / "model.keras", spec, ["float32"], work, work=work)
        if converted.path is None:
            raise ConversionError("The trained model cannot be exported", received=converted.reason)
        found = attest.answers(converted.path, attest.save_split(test, spec, work), spec, work)
        tflite_bytes = converted.path.stat().st_size
    correct = int((found.predictions == test.labels).sum())
    low, high = stats.wilson_interval(correct, len(test))
    card = {
        "card_version": CARD_VERSION,
        "name": out.name,
        "architecture": loaded.model.name,
        "image_shape": list(spec.shape),
        "data": {
            "name": data.name, "source": _public(data.source), "fingerprint": data.fingerprint, "note": data.note,
            "classes": list(data.class_names), "images": {name: len(split) for name, split in data.splits.items()},
        },
        "command": command,
        "seed": seed,
        "training": {k: getattr(config, k) for k in config.__dataclass_fields__},
        "steps": training_report["steps"],
        "seconds": training_report["seconds"],
        "validation_top1": training_report["accuracy_after"],
        "test_top1": correct / len(test),
        "test_top1_95": [low, high],
        "test_images": len(test),
        "measured_on": f"the float32 .tflite, {found.runtime}",
        "parameters": count_parameters(loaded.model),
        "macs": count_macs(loaded.model),
        "keras_bytes": (out / "model.keras").stat().st_size,
        "tflite_bytes": tflite_bytes,
        "tools": steps.tool_versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip
    write_json(out / "card.json", card)
    return card


def read_card(folder: Path) -> dict:
    try:
        card = json.loads((Path(folder) / "card.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError("A model card cannot be read", received=f"{folder}/card.json ({error})") from error
    if not isinstance(card, dict) or card.get("card_version") != CARD_VERSION:
        raise InputError("A model card has another version", received=folder, allowed=CARD_VERSION)
    return card


def for_classes(folder: Path, class_names: tuple[str, ...]) -> list[Path]:
    """The baselines below `folder` that tell exactly these classes apart, by name."""
    found = []
    for card_file in sorted(Path(folder).glob("*/card.json")):
        if tuple(read_card(card_file.parent)["data"]["classes"]) == tuple(class_names):
            found.append(card_file.parent / "model.keras")
    return found


def _public(source: str) -> str:
    """A source without the path of somebody's machine."""
    kind, _, rest = source.partition(" ")
    return f"{kind} {Path(rest).name}" if kind in ("folder", "file") else source
