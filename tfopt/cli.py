"""The command line: train, optimize, convert, evaluate, study, report, demo."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_bench.cli_support import run_app
from mobile_bench.records import SCHEMA_VERSION, Target
from tfopt import precheck_command, sensitivity_command, xray
from tfopt.cli_support import bar, console, kept_when_interrupted, load_data, note, training_changes, watching
from tfopt.latency import command as latency
from tfopt.quiet import native_chatter_to_log
from tfopt.rescue import command as rescue

app = typer.Typer(
    name="tfopt",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Make a Keras image classifier fast and small for a phone or board, and prove it on the exported file.

A first look:

    tfopt demo                                              the shipped baselines, every recipe

    tfopt study --model mine.keras --data photos/ --out saved_models/mine

    tfopt report saved_models/mine                          one HTML file to send around
""",
)

Data = Annotated[
    str, typer.Option(help="fashion_mnist, cifar10, cifar100, mnist, digits, a folder of class folders, or an .npz")
]
InputSpecOption = Annotated[
    str | None,
    typer.Option(
        help="How the model is fed where the file does not say: scaling=raw|unit|signed|torch|caffe, size=, "
        "resize=stretch|crop, order=rgb|bgr, head=softmax|logits|sigmoid, or a .json file"
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run code that the model file carries (Lambda layers, foreign classes, SavedModels)"),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, everything else on standard error")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random")]
Train = Annotated[
    list[str] | None,
    typer.Option("--train", help="Change training: steps=200, prune.learning_rate=1e-4, qat.epochs=2. Repeatable"),
]
RecipeOption = Annotated[
    list[str] | None, typer.Option("--recipe", "-r", help="A recipe's name or .yaml file. Repeatable")
]
TrainImages = Annotated[int | None, typer.Option(help="Use at most this many training images, class-balanced")]
StepMinutes = Annotated[
    float | None, typer.Option(help="End a step of prune, cluster or qat that takes longer; it becomes a failed record")
]
StepMemory = Annotated[
    float | None,
    typer.Option("--step-memory-gb", help="End such a step when its process holds more memory than this (Linux)"),
]
TestImages = Annotated[int | None, typer.Option(help="Show numbers on at most this many test images, class-balanced")]


@app.command()
def train(
    architecture: Annotated[
        str,
        typer.Argument(
            help="resnet8, resnet20, resnet32, resnet56, mobilenet, mobilenet_v2, mobilenet_v3_small, or keras:NAME"
        ),
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="A folder for model.keras and card.json")],
    width: Annotated[float, typer.Option(help="Channel multiplier")] = 1.0,
    size: Annotated[int | None, typer.Option(help="Image height and width; the data's own by default")] = None,
    training: Train = None,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that is in the folder")] = False,
    as_json: Json = False,
):
    """Train a classifier from scratch and write its model card.

    tfopt train resnet8 --data fashion_mnist --out saved_models/mine --train epochs=15
    """
    from tfopt import baselines
    from tfopt.training import TrainConfig

    baselines.check_place(out, replace=force)
    found = load_data(data)
    changes = training_changes(training).get("*", {})
    base = dataclasses.asdict(baselines.DEFAULT_TRAINING)
    if {"steps", "epochs"} & set(changes):
        base.update(steps=None, epochs=None)
    config = TrainConfig.from_dict({**base, **changes})
    with bar(f"training {architecture}") as progress:
        card = baselines.train(
            architecture,
            found,
            out,
            width=width,
            config=config,
            size=size,
            replace=force,
            seed=seed,
            command=_command(),
            progress=progress,
        )
    if as_json:
        _print_json({"schema_version": SCHEMA_VERSION, "model": str(out / "model.keras"), "card": card})
    low, high = card["test_top1_95"]
    console.print(
        f"{out}/model.keras: top-1 {card['test_top1']:.2%} [{low:.2%}, {high:.2%}] on {card['test_images']} test images"
    )


@app.command()
def optimize(
    model: Annotated[str, typer.Argument(help="A .keras or .h5 file, a SavedModel folder, or keras:NAME")],
    data: Data,
    recipe: RecipeOption = None,
    out: Annotated[Path, typer.Option(help="A study folder; what is there already is kept")] = Path(
        "saved_models/optimized"
    ),
    training: Train = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    step_minutes: StepMinutes = None,
    step_memory_gb: StepMemory = None,
    input_spec: InputSpecOption = None,
    trust: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
):
    """Apply recipes to one model and export the variants, without measuring their speed.

    tfopt optimize mine.keras --data photos/ --recipe prune --recipe distill_prune_qat
    """
    _study(
        [model],
        data,
        recipe or ["baseline"],
        out,
        training,
        input_spec,
        trust,
        seed,
        as_json,
        targets=(),
        train_images=train_images,
        test_images=test_images,
        step_minutes=step_minutes,
        step_memory_gb=step_memory_gb,
    )


@app.command()
def study(
    model: Annotated[
        list[str],
        typer.Option("--model", "-m", help="A .keras or .h5 file, a SavedModel folder, or keras:NAME. Repeatable"),
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="The study's folder; run again to take up where it stopped")],
    recipe: RecipeOption = None,
    threads: Annotated[int, typer.Option(help="Threads for measuring on this machine's CPU")] = 1,
    runs: Annotated[int, typer.Option(help="Timed inferences per file, at least", min=50)] = 50,
    deadline_fps: Annotated[float, typer.Option(help="Frames a second to meet")] = 30.0,
    training: Train = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    step_minutes: StepMinutes = None,
    step_memory_gb: StepMemory = None,
    input_spec: InputSpecOption = None,
    trust: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
):
    """Models x recipes: optimize, export, attest and measure. All named recipes unless --recipe says otherwise.

    tfopt study -m resnet.keras -m keras:MobileNetV2 --data photos/ --out saved_models/photos
    """
    from tfopt.recipe import named_recipes

    _study(
        model,
        data,
        recipe or list(named_recipes()),
        out,
        training,
        input_spec,
        trust,
        seed,
        as_json,
        targets=(Target(threads=threads),),
        deadline_fps=deadline_fps,
        runs=runs,
        train_images=train_images,
        test_images=test_images,
        step_minutes=step_minutes,
        step_memory_gb=step_memory_gb,
    )


@app.command()
def demo(
    data: Annotated[
        str, typer.Option(help="Where to run it: a data set's name, or a folder of class folders")
    ] = "fashion_mnist",
    out: Annotated[Path | None, typer.Option(help="The study's folder; saved_models/demo-DATA by default")] = None,
    as_json: Json = False,
):
    """The demo study: shipped baselines of a ResNet and a MobileNet, every recipe, real images, minutes."""
    from tfopt import demo as demo_study
    from tfopt.api import run_study

    images, models = demo_study.prepare(data, progress=note)
    out = out or Path("saved_models") / f"demo-{images.name}"
    with watching() as on_event:
        made = run_study(models, images, demo_study.RECIPES, out=out, training=demo_study.TRAINING, on_event=on_event)
    _show(made, as_json)
    if not as_json:
        console.print(f"\nThe study is {out}. Look at it: make dashboard, or tfopt report {out}", highlight=False)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A .keras or .h5 file, a SavedModel folder, or keras:NAME")],
    scheme: Annotated[
        list[str],
        typer.Option(
            help="float32, float16, dynamic, weight8, weight4, int8 or int16x8; with _tensor, _sparse, _uint8 or "
            "_floatio behind it where that exists, as int8_uint8. Repeatable"
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The .tflite to write, or a folder for MODEL-SCHEME.tflite; here by default")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Images to calibrate on; see tfopt study --help")] = None,
    calibration_images: Annotated[
        str, typer.Option(help="How many images, class-balanced; auto: until the ranges settle, at most 512")
    ] = "auto",
    calibration_ranges: Annotated[
        str,
        typer.Option(help="Ranges of int8: minmax, percentile, mse, entropy, or best: of these on validation images"),
    ] = "minmax",
    fix: Annotated[str, typer.Option("--fix", help="Rewrites for delegates: names with commas between, or all")] = "",
    input_spec: InputSpecOption = None,
    trust: Trust = False,
    as_json: Json = False,
):
    """Export .tflite files, quantized after training, each run and compared with the Keras model.

    tfopt convert mine.keras --scheme int8 --data photos/

    tfopt convert mine.keras --scheme weight8 --scheme int8_uint8 --data photos/ --calibration-ranges best --out files/
    """
    from tfopt import commands

    count = int(calibration_images) if calibration_images.isdecimal() else calibration_images
    written = commands.convert_all(
        model, scheme, out, data, input_spec, trust, calibration_images=count, ranges=calibration_ranges, fix=fix,
        on_line=note,
    )  # fmt: skip
    if as_json:
        # The first file's facts stand at the top as well: one scheme is the common case.
        _print_json({"schema_version": SCHEMA_VERSION, **written[0], "files": written})
    for one in written:
        for line in commands.conversion_lines(one):
            console.print(line, highlight=False, soft_wrap=True)
    if any(one["reason"] for one in written):
        raise typer.Exit(1)


app.command("xray")(xray.command)
app.command("rescue")(rescue.command)
app.command("sensitivity")(sensitivity_command.command)
app.command("precheck")(precheck_command.command)
app.command("latency")(latency.command)


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="A .tflite, or a .keras file")],
    data: Annotated[str, typer.Option(help="NAME|PATH[:SPLIT], split test by default: fashion_mnist:validation")],
    reference: Annotated[
        Path | None,
        typer.Option(help="The Keras model to agree with. By default that beside FILE, in simulated int8 after qat"),
    ] = None,
    test_images: TestImages = None,
    input_spec: InputSpecOption = None,
    trust: Trust = False,
    as_json: Json = False,
):
    """Top-1 accuracy of a file by the file itself, with its 95% interval, and its agreement with its Keras model.

    tfopt evaluate saved_models/demo-fashion_mnist/resnet8-fashion/qat-int8/model.tflite --data fashion_mnist
    """
    from tfopt import commands

    with bar("evaluating") as progress:
        found = commands.evaluate_one(file, data, reference, test_images, input_spec, trust, progress=progress)
    if as_json:
        _print_json({"schema_version": SCHEMA_VERSION, **found})
    low, high = found["top1_95"]
    agreement = "" if found["agreement"] is None else f", agrees with its Keras model on {found['agreement']:.2%}"
    console.print(
        f"top-1 {found['top1']:.2%} [{low:.2%}, {high:.2%}] on {found['images']} images{agreement}", highlight=False
    )


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="A study folder")],
    out: Annotated[Path | None, typer.Option(help="The .html to write; STUDY/report.html by default")] = None,
    as_json: Json = False,
):
    """One standalone HTML file of a study: table, trade-offs, every variant's story.

    tfopt report saved_models/demo-fashion_mnist
    """
    from dashboard.report import write_report
    from mobile_bench.store import read_study

    path = write_report(study, out)
    for problem in read_study(study).damage:
        console.print(f"[yellow]warning:[/] {escape(problem)}", highlight=False)
    if as_json:
        _print_json({"schema_version": SCHEMA_VERSION, "report": str(path), "size_bytes": path.stat().st_size})
    console.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, opens without a network", highlight=False)


@app.command()
def recipes(as_json: Json = False):
    """The recipes that come with tfopt."""
    from tfopt.recipe import load, named_recipes

    names = named_recipes()
    if as_json:
        _print_json({"schema_version": SCHEMA_VERSION, "recipes": [load(name).to_dict() for name in names]})
        return
    table = Table("recipe", "exports", "what it does", box=None)
    for name, description in names.items():
        table.add_row(name, ", ".join(load(name).schemes), description)
    Console().print(table)


def _study(
    models,
    data,
    recipes,
    out,
    training,
    input_spec,
    trust,
    seed,
    as_json,
    *,
    targets,
    deadline_fps=30.0,
    runs=50,
    train_images=None,
    test_images=None,
    **limits,
):
    from tfopt.api import run_study

    changes = training_changes(training)
    images = load_data(data)
    if train_images is not None or test_images is not None:
        images = images.limited(train=train_images, test=test_images)
    with kept_when_interrupted(out), watching() as on_event:
        made = run_study(
            models,
            images,
            recipes,
            out=out,
            targets=targets,
            training=changes,
            input_spec=input_spec,
            trust=trust,
            seed=seed,
            deadline_fps=deadline_fps,
            runs=runs,
            on_event=on_event,
            **limits,
        )
    _show(made, as_json)
    if any(entry.variant.status != "ok" for entry in made.asked):
        raise typer.Exit(1)


def _show(made, as_json: bool) -> None:
    from tfopt import commands

    rows = commands.rows(made)
    if as_json:
        _print_json({"schema_version": SCHEMA_VERSION, "study": str(made.folder), "variants": rows})
        return
    page = Console() if sys.stdout.isatty() else Console(width=150)
    wide = page.width >= 125
    table = Table(box=None, header_style="bold")
    for index, column in enumerate(commands.columns(wide)):
        table.add_column(column, justify="left" if index < 3 else "right", no_wrap=page.width >= 90)
    for row in rows:
        if row["status"] != "ok":
            table.add_row(row["model"], row["variant"], f"[red]{row['status']}[/]")
            continue
        table.add_row(*commands.cells(row, wide))
    page.print(table)
    failed = {(entry.variant.model, entry.variant.name) for entry in made.asked if entry.variant.status != "ok"}
    for row in rows:
        if (row["model"], row["variant"]) in failed:
            page.print(f"[red]{row['model']}/{row['variant']}[/]: {escape(row['reason'])}", highlight=False)
    if made.record.data.get("note"):
        page.print(made.record.data["note"], highlight=False)


def _command() -> str:
    return " ".join(["tfopt", *sys.argv[1:]])


def _print_json(value: dict) -> None:
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def main() -> None:
    native_chatter_to_log()
    run_app(app)


if __name__ == "__main__":
    main()
