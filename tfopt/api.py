"""The Python face of tfopt, the same few nouns as on the command line.

import tfopt

data = tfopt.data.load("photos/")
variants = tfopt.optimize("mine.keras", data, "distill_prune_qat")
for entry in variants:
    print(entry.variant.name, entry.quality().top1, entry.tflite)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_bench.records import Target
from mobile_bench.store import Entry, Study

if TYPE_CHECKING:
    from tfopt.convert import Converted
    from tfopt.data import ImageData
    from tfopt.recipe import Recipe


def optimize(
    model,
    data: ImageData | str,
    recipe: Recipe | str | Sequence = "baseline",
    *,
    out: str | Path = "saved_models/optimized",
    training: dict[str, dict] | None = None,
    callbacks: Sequence = (),
    input_spec: str | None = None,
    trust: bool = False,
    seed: int = 0,
    on_event=None,
) -> tuple[Entry, ...]:
    """Apply one recipe or several to a model and export its variants, without measuring their speed.

    model: a keras.Model, a path or 'keras:NAME'. data: an ImageData, a name or a folder. recipe: a name,
    a .yaml file, a tfopt.recipe.Recipe, or a list of them. training: settings that replace those of the
    recipe, by technique or '*': {'prune': {'steps': 100}}. callbacks: Keras callbacks for the steps that
    train here (the steps that run in the TFMOT worker refuse them). Returns one entry a variant, failed
    ones included; raises a Problem when nothing can be done at all.
    """
    made = run_study(
        [model],
        data,
        recipe,
        out=out,
        training=training,
        callbacks=callbacks,
        input_spec=input_spec,
        trust=trust,
        seed=seed,
        on_event=on_event,
        targets=(),
    )
    return made.asked


def run_study(
    models: Sequence,
    data: ImageData | str,
    recipes: Recipe | str | Sequence = "baseline",
    *,
    out: str | Path,
    targets: Sequence[Target] = (Target(),),
    training: dict[str, dict] | None = None,
    callbacks: Sequence = (),
    input_spec: str | None = None,
    trust: bool = False,
    seed: int = 0,
    deadline_fps: float = 30.0,
    runs: int = 50,
    step_minutes: float | None = None,
    step_memory_gb: float | None = None,
    on_event=None,
) -> Study:
    """Recipes x models x targets: export, attest and measure, into the folder `out`; see tfopt.study.

    step_minutes, step_memory_gb: what a step in a process of its own may take; see tfopt.technique.Limits.
    """
    from tfopt import data as data_sets
    from tfopt import plan as plans
    from tfopt import recipe as recipe_files
    from tfopt import study as studies
    from tfopt.errors import InputError
    from tfopt.technique import Limits

    check_seed(seed)
    if not isinstance(out, (str, Path)):
        raise InputError("The study's place is not a path", received=repr(out), allowed="a folder's path")
    changes = _checked(training or {})
    if isinstance(data, (str, Path)):
        data = data_sets.load(data)
    if not isinstance(data, data_sets.ImageData):
        raise InputError(
            "The data is not an image data set",
            received=type(data).__name__,
            allowed="a name, a folder, or what tfopt.data gives",
            next_step="Wrap arrays with tfopt.data.from_arrays((images, labels))",
        )
    if isinstance(recipes, (str, Path, recipe_files.Recipe)):
        recipes = [recipes]
    chosen = tuple(recipe.with_training(changes) for recipe in recipe_files.load_all(recipes))
    if not models:
        raise InputError("No model was given", next_step="Name one: a .keras file, or keras:MobileNetV2")
    if not deadline_fps > 0:
        raise InputError("The deadline is not above 0 frames a second", received=deadline_fps)
    sources = tuple(_source(model, data, input_spec, trust) for model in models)
    plan = plans.Plan(
        out=Path(out),
        models=sources,
        data=data,
        recipes=chosen,
        targets=tuple(targets),
        seed=seed,
        deadline_ms=1000 / deadline_fps,
        runs=runs,
        trust=trust,
        callbacks=tuple(callbacks),
        limits=Limits(step_minutes, step_memory_gb),
    )
    return studies.run(plan, on_event)


def export(
    model,
    schemes: str | Sequence[str],
    out: str | Path,
    *,
    calibration=None,
    validation=None,
    calibration_images: int | str | None = "auto",
    ranges: str = "minmax",
    input_spec: str | None = None,
    trust: bool = False,
) -> list[Converted]:
    """OUT/SCHEME.tflite for each scheme of tfopt.schemes, quantized after training: what `tfopt convert` does.

    model: a keras.Model, a path or 'keras:NAME'. calibration, validation: an ImageData (its splits of these names), a
    split of one, or uint8 images (count, height, width, 1 or 3), RGB; the first is needed by int8 and int16x8, the
    second by ranges='best'. Returns one tfopt.convert.Converted a scheme, failed ones included with their reason.
    """
    import tempfile

    from tfopt import convert as conversion
    from tfopt import models as keras_models

    if isinstance(model, (str, Path)):
        conversion.refuse_tflite(model)
        model = keras_models.load(model, input_spec=input_spec, trust=trust)
    elif not isinstance(model, keras_models.LoadedModel):
        model = keras_models.from_keras(model, input_spec=input_spec)
    split = lambda given, name: given[name] if hasattr(given, "splits") else given
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.keras"
        keras_models.save(model.model, file, model.spec)
        return conversion.convert(
            file,
            model.spec,
            [schemes] if isinstance(schemes, str) else list(schemes),
            Path(out),
            calibration=split(calibration, "calibration"),
            validation=split(validation, "validation"),
            calibration_images=calibration_images,
            ranges=ranges,
            work=Path(folder),
            trust=trust,
        )


def check_seed(seed: int) -> None:
    """Raise InputError unless every library here takes this seed."""
    from tfopt.errors import InputError

    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise InputError("The seed is out of range", received=repr(seed), allowed="a whole number from 0 to 4294967295")


def _checked(training: dict) -> dict[str, dict]:
    from tfopt.errors import InputError, unknown_name
    from tfopt.technique import techniques

    known = ("*", *techniques())
    for name, settings in training.items() if isinstance(training, dict) else [("", training)]:
        if not isinstance(settings, dict):
            raise InputError(
                "Training settings are not given by technique",
                received=repr({name: settings} if name else settings),
                allowed="{'prune': {'steps': 100}}, or {'*': {'steps': 100}} for all",
            )
        if name not in known:
            raise unknown_name("technique", str(name), known)
    return training


def _source(model, data: ImageData, input_spec: str | None, trust: bool):
    from tfopt import plan as plans

    if isinstance(model, (str, Path)):
        return plans.file_source(model, input_spec=input_spec, trust=trust, class_names=data.class_names)
    from tfopt import models as keras_models

    loaded = (
        model if isinstance(model, keras_models.LoadedModel) else keras_models.from_keras(model, input_spec=input_spec)
    )
    return plans.model_source(loaded, data.class_names)
