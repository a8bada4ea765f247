"""What stands behind the command line where it is more than one call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.markup import escape

from mobile_bench import stats, store
from mobile_bench.errors import InputError
from mobile_bench.files import check_writable, write_bytes
from mobile_bench.interpreter import check_is_tflite
from mobile_bench.metadata import find_spec
from tfopt import attest
from tfopt import calibration as calibrating
from tfopt import convert as conversion
from tfopt import data as data_sets
from tfopt.errors import ConversionError, DataError
from tfopt.schemes import parse

#: What may be nearer to Keras than a scheme is.
_NEARER = {
    "int8": "; other --calibration-ranges, int16x8 or tfopt rescue may be nearer",
    "int16x8": "; other --calibration-ranges may be nearer", "weight4": "; weight8 is nearer",
    "dynamic": "; weight8 or float16 is nearer", "weight8": "; float16 is nearer",
}  # fmt: skip


def convert_one(
    model: str, scheme: str, out: Path | None, data: str | None, input_spec: str | None, trust: bool, **options
) -> dict:
    """Export one scheme of one model; what `convert_all` says of its file."""
    (written,) = convert_all(model, [scheme], out, data, input_spec, trust, **options)
    return written


def convert_all(
    model: str, schemes: Sequence[str], out: Path | None, data: str | None, input_spec: str | None, trust: bool, *,
    calibration_images: int | str | None = "auto", ranges: str = "minmax", fix: str = "",
    on_line: Callable[[str], None] = lambda line: None,
) -> list[dict]:  # fmt: skip
    """Export schemes of one model: for each scheme, path, size_bytes, how far from Keras, or the reason of a failure.

    out: a .tflite for one scheme, or a folder; by default the current one. calibration_images and ranges: see
    tfopt.calibration. fix: names of tfopt.fixes with commas between them, or 'all'; on_line gets what they did.
    Raises ConversionError where no scheme at all can be exported.
    """
    conversion.check_schemes(schemes)
    if not schemes or len(set(schemes)) != len(schemes):
        raise ConversionError("There is no scheme or one twice", received=", ".join(schemes) or "nothing")
    calibrating.check_options(calibration_images, ranges)
    needed = [scheme for scheme in schemes if parse(scheme).needs_calibration]
    if needed and not data:
        what = "Full int8" if needed[0] == "int8" else needed[0]
        raise ConversionError(f"{what} needs images to calibrate on", next_step="Add --data NAME or --data FOLDER")
    if ranges != "minmax" and not needed:
        raise InputError(
            "Calibration ranges are for schemes that are calibrated", received=f"{ranges}, with {', '.join(schemes)}",
            allowed="int8 or int16x8 among the schemes", next_step="Leave --calibration-ranges out",
        )  # fmt: skip
    _check_out(out, schemes)
    conversion.refuse_tflite(model)
    from tfopt import models

    images = data_sets.load(data) if data else None
    loaded = models.load(model, input_spec=input_spec, trust=trust)
    if assumed := models.assumption(loaded):
        on_line(assumed)
    if fix:
        from tfopt import fixes

        loaded = fixes.fix_loaded(loaded, fix, on_line=on_line)
    single = out if out is not None and out.suffix == ".tflite" else None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        models.save(loaded.model, work / "model.keras", loaded.spec)
        done = conversion.convert(
            work / "model.keras", loaded.spec, schemes, work, work=work, trust=trust,
            calibration=images["calibration"] if images else None, calibration_images=calibration_images,
            ranges=ranges, validation=images["validation"] if images else None,
        )  # fmt: skip
        if not any(one.path for one in done):
            raise ConversionError(f"{model} cannot be exported as {', '.join(schemes)}", received=done[0].reason)
        return [_written(one, single or (out or Path()) / f"{loaded.name}-{one.scheme}.tflite") for one in done]


def _check_out(out: Path | None, schemes: Sequence[str]) -> None:
    check_writable(out / "x.tflite" if out is not None and out.is_dir() else out)
    if out is None or out.is_dir() or (out.suffix == "" and not out.exists()):
        return
    if out.suffix != ".tflite":
        raise InputError("The output is not a .tflite file", received=out, allowed="NAME.tflite, or a folder")
    if len(schemes) > 1:
        raise InputError(
            "Several schemes do not go into one file", received=f"--out {out} for {', '.join(schemes)}",
            next_step="Name a folder",
        )  # fmt: skip


def _written(one: conversion.Converted, path: Path) -> dict:
    scheme = parse(one.scheme)
    facts = {"path": None, "scheme": one.scheme, "size_bytes": None, "tool": scheme.tool, "reason": one.reason}
    if one.path is not None:
        content = one.path.read_bytes()
        write_bytes(path, content)
        facts.update(path=str(path), size_bytes=len(content))
    return {
        **facts, "difference": one.difference, "tolerance": scheme.tolerance, "within_tolerance": one.within_tolerance,
        "agreement": one.agreement, "compared_on": {"images": one.images, "random": one.random},
        "calibration": one.calibration, "notes": list(one.notes),
    }  # fmt: skip


def conversion_lines(written: dict) -> list[str]:
    """What `convert_all` says of one file, for a terminal: its line, and how it was calibrated."""
    if written["path"] is None:
        return [f"[red]{written['scheme']} failed[/]: {escape(written['reason'])}"]
    on = written["compared_on"]
    lines = [
        f"{escape(written['path'])}: {written['size_bytes'] / 1e3:.1f} kB, outputs within "
        f"{_percent(written['difference'])} of Keras's range (tolerance of {written['scheme']}: "
        f"{_percent(written['tolerance'])}), same class on {written['agreement']:.0%} of {on['images']} "
        f"{'random' if on['random'] else 'calibration'} images"
    ]
    if not written["within_tolerance"]:
        lines.append(
            f"[yellow]warning:[/] {written['scheme']} is further from Keras than its tolerance. Measure what it costs "
            f"with tfopt evaluate{_NEARER.get(parse(written['scheme']).base, '')}"
        )
    found = written["calibration"]
    if found:
        lines.append(
            f"  calibrated on {found['used']} of {found['offered']} images ({found['why']}), ranges: {found['ranges']}"
        )
        for way, score in found.get("candidates", {}).items():
            lines.append(
                f"    {way}: agrees with float32 on {score['agreement']:.2%} of {found['scored_on']} validation "
                f"images, mean squared error {score['mse']:.3g}"
            )
    return lines + [f"  {escape(note)}" for note in written["notes"]]


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def evaluate_one(
    file: Path,
    data: str,
    reference: Path | None,
    test_images: int | None,
    input_spec: str | None,
    trust: bool,
    progress=None,
) -> dict:
    """top1 with its interval, images, agreement (None without a Keras model at hand) of a .tflite or .keras file."""
    if not file.is_file():
        raise InputError("The file does not exist", received=file, allowed="a .tflite or .keras file")
    place, split_name = data_sets.parse(data)
    images = data_sets.load(place)
    if test_images is not None:
        images = images.limited(test=test_images)
    split = images[split_name]
    # A reference that cannot be used is refused like any other model, before the long work.
    other = _open(reference, images, None, trust) if reference else None
    if file.suffix == ".tflite":
        check_is_tflite(file)
        shape = conversion.input_shape(file.read_bytes())[1:]
        spec = find_spec(file, input_spec or "", shape=shape if len(shape) == 3 else None)
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            pixels = attest.save_split(split, spec, work)
            found = attest.answers(file, pixels, spec, work, progress=progress)
        predictions, runtime = found.predictions, found.runtime
        outputs = int(found.outputs[0].shape[-1])
        _check_classes(max(2, outputs), images)
    else:
        loaded = _open(file, images, input_spec, trust)
        spec = loaded.spec
        predictions = _named(loaded.model, split, spec)
        runtime = "keras"
    agreement = None
    if other is not None:
        known = spec if other.spec_from == "an assumption" else other.spec
        agreement = float(np.mean(predictions == _named(other.model, split, known)))
    elif reference is None and file.suffix == ".tflite" and _beside(file):
        from tfopt.steps import keras_classes

        quantized = next(iter(sorted(file.parent.glob("quantized*"))), None)
        agreement = float(np.mean(predictions == keras_classes(_beside(file), quantized, split, spec)))
    correct = int(np.sum(predictions == split.labels))
    low, high = stats.wilson_interval(correct, len(split))
    return {
        "file": str(file),
        "data": images.name,
        "split": split_name,
        "fingerprint": images.fingerprint,
        "images": len(split),
        "correct": correct,
        "top1": correct / len(split),
        "top1_95": [low, high],
        "agreement": agreement,
        "runtime": runtime,
        "note": images.note,
    }


def rows(study: store.Study) -> list[dict]:
    """One row a variant: what a script or a table wants of a study."""
    found = []
    for entry in study.entries:
        variant, quality = entry.variant, entry.quality()
        row = {
            "model": variant.model,
            "variant": variant.name,
            "recipe": variant.recipe,
            "scheme": variant.scheme,
            "status": variant.status,
            "reason": variant.reason,
            "path": str(entry.tflite),
            "size_bytes": variant.size_bytes,
            "gzip_bytes": variant.gzip_bytes,
            "parameters": variant.parameters,
            "macs": variant.macs,
        }
        if quality:
            low, high = stats.wilson_interval(quality.correct, quality.images)
            row.update(
                top1=quality.top1,
                top1_95=[low, high],
                images=quality.images,
                agreement=quality.agreement,
                baseline_agreement=quality.baseline_agreement,
            )
        measured = [m for m in entry.measurements if m.status == "ok" and m.sha256 == variant.sha256]
        if measured:
            summary = stats.summarize(measured[-1])
            row.update(
                median_ms=summary.median_ms,
                median_95_ms=[summary.median_low_ms, summary.median_high_ms],
                p90_ms=summary.p90_ms,
                p99_ms=summary.p99_ms,
                fps=summary.fps,
                threads=measured[-1].target.threads,
                load_ms=measured[-1].load_ms,
                peak_rss_bytes=measured[-1].peak_rss_bytes,
                meets_deadline=summary.meets(study.record.deadline_ms),
            )
        elif entry.measurements:
            row["measurement_reason"] = entry.measurements[-1].reason
        found.append(row)
    return found


def columns(wide: bool) -> list[str]:
    """Heads of the table that `cells` fills; a narrow one leaves out what is second."""
    names = ["model", "variant", "top-1 [95%]", "agrees", "size", "gzip", "median", "p99", "frames/s", "in time"]
    return names if wide else [name for name in names if name not in _SECOND]


_SECOND = ("agrees", "gzip", "p99")


def cells(row: dict, wide: bool) -> list[str]:
    """A row as the terminal shows it."""
    low, high = row.get("top1_95", (0, 0))
    timed = "median_ms" in row
    found = {
        "model": row["model"],
        "variant": row["variant"],
        "top-1 [95%]": f"{row['top1']:.2%} [{low:.2%}, {high:.2%}]" if "top1" in row else "-",
        "agrees": f"{row['agreement']:.2%}" if row.get("agreement") is not None else "-",
        "size": f"{row['size_bytes'] / 1e3:.1f} kB",
        "gzip": f"{row['gzip_bytes'] / 1e3:.1f} kB",
        "median": f"{row['median_ms']:.3f} ms" if timed else "-",
        "p99": f"{row['p99_ms']:.3f} ms" if timed else "-",
        "frames/s": f"{row['fps']:,.0f}" if timed else "-",
        "in time": ("[green]yes[/]" if row["meets_deadline"] else "[red]no[/]") if timed else "-",
    }
    return [found[name] for name in columns(wide)]


def _beside(file: Path) -> Path | None:
    candidate = file.parent / "model.keras"
    return candidate if candidate.is_file() else None


def _open(file: Path, images, input_spec: str | None, trust: bool):
    from tfopt import models

    loaded = models.load(file, input_spec=input_spec, trust=trust)
    models.check_classes(loaded, images.class_names)
    return loaded


def _named(model, split, spec) -> np.ndarray:
    from tfopt import training

    return training.classify(training.predict(model, split, spec), spec)


def _check_classes(outputs: int, images) -> None:
    if outputs != images.classes:
        raise DataError(
            "The file's output does not match the data's classes",
            received=f"{outputs} outputs for {images.classes} classes",
            next_step="Name the data set it was trained on",
        )
