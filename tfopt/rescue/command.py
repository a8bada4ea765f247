"""`tfopt rescue`: full int8 that lost too much accuracy, repaired."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_bench.commands.shared import Json, Spec, print_json
from mobile_bench.errors import InputError
from mobile_bench.records import SCHEMA_VERSION

_SHOWN_LAYERS = 5
QAT_STEPS = 300


def command(
    model: Annotated[str, typer.Argument(help="A .keras or .h5 file, a SavedModel folder, or keras:NAME")],
    data: Annotated[str, typer.Option(help="Images: a folder of class folders or a name; see tfopt study --help")],
    out: Annotated[Path | None, typer.Option(help="The .tflite to write [default: MODEL-rescued.tflite]")] = None,
    max_drop: Annotated[float, typer.Option(help="Points of top-1 that may be lost on the validation images")] = 0.5,
    min_agreement: Annotated[float, typer.Option(help="Percent of them that must keep the float model's class")] = 98,
    mixed: Annotated[bool, typer.Option("--mixed/--full-int8", help="May some layers compute in float?")] = True,
    max_size: Annotated[float, typer.Option(help="With --mixed: how large the file may get, in int8 files")] = 1.25,
    spend: Annotated[str, typer.Option(help="With --mixed: a layer's price: bytes, ms (here) or both")] = "both",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="LAYER or LAYER=float16|weight8: it computes in float in any case; weight8 keeps int8 weights and is "
            "what LAYER alone means. Repeatable",
            show_default=False,
        ),
    ] = None,
    qat: Annotated[
        bool, typer.Option("--qat", help="Where all that is not enough, train for int8: needs labels, and takes longer")
    ] = False,
    qat_steps: Annotated[
        int | None, typer.Option(help="With --qat: how many batches [default: 300]", show_default=False)
    ] = None,
    calibration_images: Annotated[int, typer.Option(help="Images that layers are fitted to, without labels")] = 100,
    choice_images: Annotated[int, typer.Option(help="Validation images that decide which repairs stay")] = 300,
    test_images: Annotated[int, typer.Option(help="Test images, looked at once at the end")] = 1000,
    input_spec: Spec = "",
    trust: Annotated[bool, typer.Option("--trust", help="Run code that the model file carries")] = False,
    as_json: Json = False,
) -> None:
    """Quantize to full int8 and repair it, step by step, until it is good enough. No training, unless --qat.

    The steps: the converter's int8; equalization of channels between layers; bias correction; rounding of each layer's
    weights by what it does to the layer's answer; some layers in float; with --qat, training for int8. A step stays
    only if it brings the file nearer to the float model on validation images, or reaches the goal. The report lies
    beside the file as NAME.rescue.json.

    tfopt rescue mine.keras --data photos/ --max-drop 0.5

    Exit code 0: good enough; 1: the file was written, but the goal was not reached; 2: bad input.
    """
    from mobile_bench.files import check_writable, write_json
    from tfopt.rescue import rescue_file

    _check_percent("--max-drop", max_drop, 0, "points of top-1")
    _check_percent("--min-agreement", min_agreement, 50, "percent of the images")
    if qat_steps is not None and (not qat or qat_steps < 1):
        raise InputError(
            "Steps of training are for --qat",
            received=f"--qat-steps {qat_steps}{'' if qat else ' without --qat'}",
            allowed="1 and above, with --qat",
        )  # fmt: skip
    out = out or Path(f"{Path(model.removeprefix('keras:')).stem}-rescued.tflite")
    check_writable(out)
    console = Console(stderr=True)
    with console.status("starting") as status:
        report = rescue_file(
            model, data, out, input_spec=input_spec or None, trust=trust, max_drop=max_drop / 100,
            min_agreement=min_agreement / 100, mixed=mixed, max_size=max_size, spend=spend,
            keep={name: kind or "weight8" for name, _, kind in (one.partition("=") for one in keep or [])},
            qat_steps=(qat_steps or QAT_STEPS) if qat else 0, calibration_images=calibration_images,
            choice_images=choice_images,
            test_images=test_images,
            on_progress=lambda message: _progress(console, status, message),
        )  # fmt: skip
    report = {"schema_version": SCHEMA_VERSION, **report}
    write_json(out.with_suffix(".rescue.json"), report)
    if as_json:
        print_json(report)
    else:
        show(report)
    if not report["reached"]:
        raise typer.Exit(1)


def _check_percent(option: str, value: float, least: float, unit: str) -> None:
    if not least <= value <= 100:
        raise InputError(f"{option} is out of range", received=f"{value:g}", allowed=f"{least:g} to 100 {unit}")


def _progress(console: Console, status, message: dict) -> None:
    if rung := message.get("rung"):
        score = rung["score"]
        console.print(
            f"{rung['name']}: agreement {score['agreement']:.1%}{'' if rung['kept'] else ', not kept'}", style="dim",
            highlight=False,
        )  # fmt: skip
    elif message.get("warning"):
        console.print(message["warning"], style="yellow", highlight=False, markup=False, soft_wrap=True)
    elif message.get("total"):
        status.update(f"{message['what']}: {message['done']} of {message['total']}")
    elif message.get("what"):
        status.update(message["what"])


def show(report: dict) -> None:
    """The ladder as a table, then the layers that limit it, then the test images."""
    console = Console()
    table = Table(title=escape(report["path"]), title_justify="left")
    for name in ("Step", "Agreement", "Top-1", "Divergence", "Size"):
        table.add_column(name, justify="left" if name == "Step" else "right", no_wrap=True)
    rows = [("float32", report["float"], report["float32_bytes"], "")]
    for rung in report["rungs"]:
        notes = [rung["note"], "" if rung["kept"] else "not kept"]
        rows.append((rung["name"], rung["score"], rung["size_bytes"], ", ".join(filter(None, notes))))
    for name, score, size, note in rows:
        top1 = "" if score["top1"] is None else f"{score['top1']:.1%}"
        table.add_row(
            f"{name}\n[dim]{note}[/]" if note else name, f"{score['agreement']:.1%}", top1,
            f"{score['divergence']:.5f}", f"{size / 1e3:,.1f} kB",
        )  # fmt: skip
    console.print(table)
    seconds = sum(rung["seconds"] for rung in report["rungs"])
    console.print(f"The ladder took {seconds:.0f} s", highlight=False)
    for line in summary(report):
        console.print(line, markup=False, highlight=False)


def summary(report: dict) -> list[str]:
    """What is said below the table, a sentence a line."""
    from mobile_bench.stats import wilson_interval

    counts, lines = report["images"], []
    lines.append(f"Judged on {counts['choices']} validation images; layers fitted to {counts['calibration']} others")
    worst = sorted(report["layers"], key=lambda one: one["sqnr_db"])[:_SHOWN_LAYERS]
    lines.append("Noisiest layers in int8: " + ", ".join(f"{one['layer']} {one['sqnr_db']:.1f} dB" for one in worst))
    if report.get("training_refused"):
        lines.append(f"This model could not be trained for int8: {report['training_refused']}")
    if report["lifted"]:
        lines.append("In float: " + ", ".join(f"{one['layer']} ({one['kind']})" for one in report["lifted"]))
    test = report["test"]
    low, high = wilson_interval(test["agree"], test["images"])
    before = report["test_as_converted"]["agree"] / test["images"]
    lines.append(
        f"Test, {test['images']} images: agreement {test['agree'] / test['images']:.2%} "
        f"(95% {low:.2%} to {high:.2%}), as converted {before:.2%}"
    )
    lost = (test["float_correct"] - test["correct"]) / test["images"]
    lines.append(
        f"Test top-1: {test['correct'] / test['images']:.2%}, float {test['float_correct'] / test['images']:.2%}: "
        f"{abs(lost) * 100:.2f} points {'lost' if lost > 0 else 'won' if lost < 0 else 'of difference'}"
    )
    if report["reached"]:
        lines.append("The goal was reached on the validation images")
    else:
        lines.append(
            "The goal was not reached: allow a larger file with --max-size, or let it train for int8 with --qat and "
            "more --qat-steps"
        )
    return lines
