"""`tfopt xray`: what of a model will run on a phone's or board's accelerator, before or after it is trained.

A .tflite is looked at as it is. A Keras model is first converted, in a child process and for nothing but the look:
what runs where depends on the operations and their types, not on what the weights are.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mobile_bench.commands.shared import Json, Spec, print_json, say
from mobile_bench.commands.xray import Ask, Backend, DelegateName, Save, show
from mobile_bench.records import SCHEMA_VERSION
from tfopt.errors import ConversionError, InputError, unknown_name

if TYPE_CHECKING:
    from mobile_bench.inputs import InputSpec
    from mobile_bench.xray import XrayReport
    from tfopt.data.splits import Split

#: How a Keras model is converted where nothing is said: the Edge TPU takes nothing but whole numbers.
DEFAULT_SCHEMES = {"cpu": "float32", "gpu": "float32", "edgetpu": "int8"}
#: Random images for the ranges of int8: enough for a range to exist, and no more.
RANDOM_IMAGES = 8


def command(
    model: Annotated[
        str,
        typer.Argument(help="A .tflite; or a .keras or .h5 file, a SavedModel folder or keras:NAME, trained or not"),
    ],
    delegate: DelegateName,
    backend: Backend = "",
    scheme: Annotated[
        str,
        typer.Option(
            help="How a Keras model is converted for the look [default: int8 for edgetpu, float32 otherwise]",
            show_default=False,
        ),
    ] = "",
    ask: Ask = False,
    save: Save = False,
    fix: Annotated[str, typer.Option("--fix", help="Rewrites for delegates: names with commas between, or all")] = "",
    input_spec: Spec = "",
    trust: Annotated[bool, typer.Option("--trust", help="Run code that the model file carries")] = False,
    as_json: Json = False,
) -> None:
    """Show where each operation would run, why not on the delegate, and what would change that. Before any training.

    A Keras model is converted first, with random images where int8 needs ranges; the file is thrown away.

    tfopt xray keras:MobileNetV3Small --delegate edgetpu

    tfopt xray saved_models/mine/resnet/qat-int8/model.tflite --delegate cpu --save
    """
    if save and not model.endswith(".tflite"):
        raise InputError(
            "There is no file to store the report with", received=model, allowed="--save with a .tflite",
            next_step="Write one with tfopt convert, then look at that",
        )  # fmt: skip
    report, converted = xray_model(
        model, delegate, backend=backend, scheme=scheme, ask=ask, input_spec=input_spec, trust=trust, fix=fix,
        on_stage=lambda text: say(text, style="dim"),
    )  # fmt: skip
    saved = None
    if save:
        from mobile_bench.xray.record import write_record

        saved = str(write_record(model, report))
        say(f"stored: {saved}", style="dim")
    if as_json:
        facts = {"schema_version": SCHEMA_VERSION, "model": model, "scheme": converted}
        print_json({**facts, **report.to_dict(), "saved": saved})
    else:
        show(report, f"{model} as {converted}" if converted else model)


def xray_model(
    model: str, delegate: str, *, backend: str = "", scheme: str = "", ask: bool = False, input_spec: str = "",
    trust: bool = False, fix: str = "", on_stage=lambda text: None,
) -> tuple[XrayReport, str]:  # fmt: skip
    """The report on a .tflite or a Keras model, and the scheme that the latter was converted with ('' for a .tflite).

    fix: rewrites of tfopt.fixes for a Keras model, names with commas between them or 'all'; on_stage hears of them.
    Raises Problem: InputError for a name or an option that does not exist, ModelError and ConversionError where the
    model cannot be loaded or converted, and what mobile_bench.xray raises.
    """
    from mobile_bench.xray import BACKENDS, DELEGATES
    from mobile_bench.xray import xray as look

    # Before the long work: mobile_bench would refuse it after the conversion.
    if delegate not in DELEGATES:
        raise unknown_name("delegate", delegate, DELEGATES)
    if backend and backend not in BACKENDS[delegate]:
        raise unknown_name(f"backend of {delegate}", backend, BACKENDS[delegate])
    if model.endswith(".tflite"):
        if scheme:
            raise InputError("A .tflite is already converted", received=f"--scheme {scheme}")
        if fix:
            raise InputError(
                "Fixes are made on the Keras model", received=f"--fix {fix} for {model}",
                next_step="Give the model that the .tflite was made from",
            )  # fmt: skip
        return look(model, delegate, backend=backend, ask=ask), ""
    from tfopt import convert as conversion

    scheme = scheme or DEFAULT_SCHEMES[delegate]
    conversion.check_schemes([scheme])
    with tempfile.TemporaryDirectory() as folder:
        on_stage(f"converting {model} as {scheme}")
        path, note = _convert(model, scheme, Path(folder), input_spec, trust, fix, on_stage)
        report = look(path, delegate, backend=backend, ask=ask)
    return replace(report, notes=(note, *report.notes)), scheme


def _convert(
    model: str, scheme: str, work: Path, input_spec: str, trust: bool, fix: str = "", on_stage=lambda text: None
) -> tuple[Path, str]:
    from tfopt import convert as conversion
    from tfopt import models
    from tfopt.schemes import parse

    # What the weights are makes no difference here, so none are downloaded.
    source = f"{model}:random" if model.startswith("keras:") and model.count(":") == 1 else model
    loaded = models.load(source, input_spec=input_spec or None, trust=trust)
    if fix:
        from tfopt import fixes

        loaded = fixes.fix_loaded(loaded, fix, on_line=on_stage)
    models.save(loaded.model, work / "model.keras", loaded.spec)
    (converted,) = conversion.convert(
        work / "model.keras", loaded.spec, [scheme], work, calibration=random_images(loaded.spec), work=work,
        trust=trust, hybrid=True,
    )  # fmt: skip
    if converted.path is None:
        raise ConversionError(f"{model} cannot be exported as {scheme}", received=converted.reason)
    note = f"Converted as {scheme} for this look alone"
    if parse(scheme).needs_calibration:
        note += ", calibrated on random images: its scales and its answers mean nothing, where its operations run does"
    return converted.path, note


def random_images(spec: InputSpec, count: int = RANDOM_IMAGES, seed: int = 0) -> Split:
    """Noise over the whole range of pixels, uint8 (count, height, width, channels), in the place of photographs."""
    import numpy as np

    from tfopt.data.splits import Split

    images = np.random.default_rng(seed).integers(0, 256, (count, *spec.shape), np.uint8)
    return Split(np.zeros(count, np.int32), np.arange(count, dtype=np.uint64), images)
