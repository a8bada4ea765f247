"""Rescue: bring back what full int8 quantization lost, without labels and without training the network.

`rescue` climbs a ladder of ever dearer repairs and stops at the first file that is good enough.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobile_bench.files import write_bytes
from tfopt.errors import ConversionError, DataError, InputError, Problem

if TYPE_CHECKING:
    from tfopt.data import ImageData, Split
    from tfopt.models import LoadedModel

TIMEOUT_S = 6 * 3600
CALIBRATION_IMAGES, CHOICE_IMAGES, TEST_IMAGES = 100, 300, 1000
#: With fewer, neither the choice of repairs nor the goal means anything.
FEWEST = {"calibration": 8, "choice": 30, "test": 1}
SPENDINGS = ("bytes", "ms", "both")


@dataclass(frozen=True)
class Rescued:
    """content: the .tflite. report: what was tried and gained, as `tfopt rescue --json` prints it."""

    content: bytes
    report: dict


def rescue(
    loaded: LoadedModel, data: ImageData, *, max_drop: float = 0.005, min_agreement: float = 0.98, mixed: bool = True,
    max_size: float = 1.25, spend: str = "both", keep: dict[str, str] | None = None,
    calibration_images: int = CALIBRATION_IMAGES, choice_images: int = CHOICE_IMAGES, test_images: int = TEST_IMAGES,
    qat_steps: int = 0, trust: bool = False, on_progress: Callable[[dict], None] | None = None,
) -> Rescued:  # fmt: skip
    """Full int8 of a Keras model, repaired until it is good enough on images of the validation split.

    Layers are fitted to the calibration split, without its labels; the validation split decides which repairs stay;
    the test split is looked at once, at the end. max_drop: share of validation images that may be lost in top-1.
    min_agreement: share that must keep the float file's class. mixed: whether some layers may compute in float, up to
    max_size times the int8 file, the price of a layer being bytes, ms (measured here) or both. keep: layers that
    compute in float in any case, name -> 'weight8' (int8 weights, expanded when the file is loaded) or 'float16'.
    qat_steps: where all that is not enough, train for int8 on the train split, with its labels, for so many batches;
    0 never does. Raises InputError for a value out of range, ConversionError where the model has no full int8 form.
    """
    if keep and not mixed:
        raise InputError(
            "Full int8 has no layers in float", received=f"keep {', '.join(keep)}, without mixed",
            allowed="one of them", next_step="Leave out --keep, or --full-int8",
        )  # fmt: skip
    _check(max_drop, min_agreement, max_size, spend, qat_steps, calibration_images, choice_images, test_images)
    _check_data(data, train=bool(qat_steps))
    from tfopt import convert as conversion
    from tfopt import models
    from tfopt.calibration import choose

    say = on_progress or (lambda message: None)
    spec = loaded.spec
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        models.save(loaded.model, work / "model.keras", spec)
        say({"what": "converting to float32 and int8"})
        images = choose(data["calibration"], spec, calibration_images)
        for one in conversion.convert(
            work / "model.keras", spec, ["float32", "int8"], work, calibration=images, calibration_images=None,
            work=work, trust=trust,
        ):  # fmt: skip
            if one.path is None:
                raise ConversionError(f"The model cannot be exported as {one.scheme}", received=one.reason)
        choices, test = data["validation"].balanced(choice_images), data["test"].balanced(test_images)
        job = {
            "operation": "climb",
            "float32": str(work / "float32.tflite"), "int8": str(work / "int8.tflite"), "out": str(work / "out.tflite"),
            "spec": spec.to_dict(), "images": _saved(images, work / "images.npy"),
            **_labelled(choices, spec, work, "choices", "choice_labels"),
            **_labelled(test, spec, work, "test", "test_labels"),
            "goal": {
                "max_drop": max_drop, "min_agreement": min_agreement, "mixed": mixed, "max_size": max_size,
                "spend": spend, "keep": keep or {},
            },
            "extra_ms": _extra_ms(work, say) if mixed and spend != "bytes" else {},
        }  # fmt: skip
        from mobile_bench.jobs import run_job

        found = run_job("tfopt.rescue.ladder", job, work, on_progress=say, timeout_s=TIMEOUT_S)
        if qat_steps and not found["reached"]:
            from tfopt.rescue.training import train_and_judge

            found = train_and_judge(loaded, data, work, job, found, qat_steps, timeout_s=TIMEOUT_S, say=say)
        content = (work / "out.tflite").read_bytes()
        sizes = {name: (work / f"{name}.tflite").stat().st_size for name in ("float32", "int8")}
    facts = {
        "goal": job["goal"], "images": {"calibration": len(images), "choices": len(choices), "test": len(test)},
        "data": data.name, "fingerprint": data.fingerprint, "size_bytes": len(content),
        "float32_bytes": sizes["float32"], "int8_bytes": sizes["int8"],
    }  # fmt: skip
    return Rescued(content, {**facts, **found})


def rescue_file(
    model: str, data: str, out: Path, *, input_spec: str | None = None, trust: bool = False,
    on_progress: Callable[[dict], None] | None = None, **options,
) -> dict:  # fmt: skip
    """`rescue` from a model's and a data set's name into a file; the report, with `path`."""
    from tfopt import data as data_sets
    from tfopt import models
    from tfopt.convert import refuse_tflite

    if out.suffix != ".tflite":
        raise InputError("The output is not a .tflite file", received=out, allowed="NAME.tflite")
    refuse_tflite(model)
    images = data_sets.load(data)
    loaded = models.load(model, input_spec=input_spec, trust=trust)
    if (assumed := models.assumption(loaded)) and on_progress:
        on_progress({"warning": assumed})
    models.check_classes(loaded, images.class_names)
    rescued = rescue(
        models.with_labels(loaded, images.class_names), images, trust=trust, on_progress=on_progress, **options
    )
    write_bytes(out, rescued.content)
    return {"path": str(out), "model": model, **rescued.report}


def _check(max_drop, min_agreement, max_size, spend, qat_steps, *counts) -> None:
    for name, value, low, high in (
        ("max_drop", max_drop, 0, 1), ("min_agreement", min_agreement, 0, 1), ("max_size", max_size, 1, 4),
    ):  # fmt: skip
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise InputError(f"{name} is out of range", received=value, allowed=f"{low} to {high}")
    if spend not in SPENDINGS:
        from tfopt.errors import unknown_name

        raise unknown_name("price of a layer", str(spend), SPENDINGS)
    if not isinstance(qat_steps, int) or not 0 <= qat_steps <= 1_000_000:
        raise InputError("The number of training steps is out of range", received=qat_steps, allowed="0 to 1000000")
    for (name, fewest), count in zip(FEWEST.items(), counts):
        if not isinstance(count, int) or not fewest <= count <= 100_000:
            raise InputError(
                f"The number of {name} images is out of range", received=count, allowed=f"{fewest} to 100000"
            )


def _check_data(data: ImageData, train: bool) -> None:
    if train and not len(data.splits.get("train", ())):
        raise DataError(
            "Training for int8 needs images to train on", received="no train split",
            next_step="Name a data set that has one, or leave out --qat",
        )  # fmt: skip
    for (name, fewest), split in zip(FEWEST.items(), ("calibration", "validation", "test")):
        if len(data[split]) < fewest:
            raise DataError(
                f"The data has too few images for the {name} set", received=f"{len(data[split])} in its {split} split",
                allowed=f"{fewest} and above", next_step="Take more images: a tenth of a folder becomes each split",
            )  # fmt: skip


def _saved(values: np.ndarray, path: Path) -> str:
    np.save(path, values)
    return str(path)


def _labelled(split: Split, spec, work: Path, images: str, labels: str) -> dict:
    return {
        images: _saved(split.pixels(spec), work / f"{images}.npy"), labels: _saved(split.labels, work / f"{labels}.npy")
    }  # fmt: skip


def _extra_ms(work: Path, say: Callable[[dict], None]) -> dict[str, float]:
    """How much longer each layer takes in float than in int8 here; {} where the runtime cannot be asked."""
    from mobile_bench.profile import profile

    times = {}
    for name in ("float32", "int8"):
        say({"what": f"timing the layers of {name}"})
        try:
            times[name] = {group.name: group.avg_ms for group in profile(work / f"{name}.tflite", runs=20).by_layer}
        except Problem:
            return {}
    whole = times["int8"]
    return {layer: max(0.0, ms - whole[layer]) for layer, ms in times["float32"].items() if layer and layer in whole}
