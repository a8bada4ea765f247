"""`mobile-bench`: how fast a .tflite is on this machine, and what it answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from mobile_bench.cli_support import run_app
from mobile_bench.errors import InputError

app = typer.Typer(
    name="mobile-bench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Measure .tflite files on the machine in hand: latency, memory and accuracy. No TensorFlow needed.

How fast is it, and does it keep up with a camera of 30 frames a second?

    mobile-bench run model.tflite

Does it answer as well here as where it was made? (`tfopt` writes such samples.)

    mobile-bench evaluate model.tflite --sample sample.npz
""",
)

File = Annotated[Path, typer.Argument(help="A .tflite file", metavar="FILE.tflite", show_default=False)]
Runtime = Annotated[str, typer.Option(help="auto, ai-edge-litert or tflite-runtime")]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output, everything else on standard error")
]
Spec = Annotated[
    str,
    typer.Option(
        help="How the model is fed where the file does not say: scaling=raw|unit|signed|torch|caffe, size=, "
        "resize=stretch|crop, order=rgb|bgr, head=softmax|logits|sigmoid, or a .json file",
        show_default=False,
    ),
]


@app.callback()
def _callback() -> None:
    """Each command has its own --help."""


@app.command()
def run(
    file: File,
    threads: Annotated[int, typer.Option(help="Threads the runtime may use")] = 1,
    runs: Annotated[
        int, typer.Option(help="Timed inferences, at least; a fast model gets up to 1,000 in a second")
    ] = 50,
    runtime: Runtime = "auto",
    target: Annotated[str, typer.Option(help="Where to measure; this version knows 'local'")] = "local",
    batch: Annotated[int, typer.Option(help="Images per inference")] = 1,
    deadline_fps: Annotated[float, typer.Option(help="Frames per second to keep up with")] = 30.0,
    input_spec: Spec = "",
    seed: Annotated[int, typer.Option(help="Seed of the random input")] = 0,
    save: Annotated[
        Optional[bool],  # noqa: UP045 - Typer reads this form in every version
        typer.Option("--save/--no-save", help="Store the record in the study variant's bench/ [default: if it is one]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a file's inference in a fresh process.

    It loads the file, runs it once, warms up until the times are steady, and then times single
    inferences: only the runtime's own work, the input already in place.

    Two threads, and whether it keeps up with 60 frames a second:

        mobile-bench run model.tflite --threads 2 --deadline-fps 60

    For a script:

        mobile-bench run model.tflite --json | jq .summary.median_ms

    Exit code 0: measured; 1: the worker crashed or took too long; 2: the file or an option cannot be used.
    """
    from mobile_bench import records, stats
    from mobile_bench.inputs import InputSpec, override
    from mobile_bench.measure import measure
    from mobile_bench.metadata import recorded_spec

    if not deadline_fps > 0:
        raise InputError("The deadline is not a positive number of frames per second", received=deadline_fps)
    if target != "local":
        raise InputError("This version measures on this machine only", received=f"--target {target}", allowed="local")
    folder = _variant_folder(file, save)
    spec = recorded_spec(file)
    if input_spec.strip():
        spec = override(spec or InputSpec(1, 1, 3), input_spec)
    measurement = measure(
        file, records.Target(threads=threads, runtime=runtime), batch=batch, runs=runs, spec=spec, seed=seed,
        on_progress=_say_stage,
    )  # fmt: skip
    if folder:
        from mobile_bench.store import write_measurement

        _say(f"stored in {write_measurement(folder, measurement)}")
    summary = stats.summarize(measurement)
    if as_json:
        _print_json(
            {
                "schema_version": records.SCHEMA_VERSION,
                "measurement": records.to_dict(measurement),
                "summary": asdict(summary) if summary else None,
            }
        )
    if measurement.status != "ok":
        label = "refused" if measurement.status == "refused" else "the measurement failed"
        _say(f"{label}: {measurement.reason}", style="bold red")
        raise typer.Exit(2 if measurement.status == "refused" else 1)
    if not as_json:
        Console().print(_run_table(file, measurement, summary, deadline_fps))
    for warning in measurement.warnings:
        _say(f"warning: {warning}", style="yellow")


@app.command()
def evaluate(
    file: File,
    sample: Annotated[
        Path, typer.Option(help="An .npz of images (uint8, NHWC, RGB) and labels (int32)", show_default=False)
    ],
    input_spec: Spec = "",
    workers: Annotated[
        Optional[int],  # noqa: UP045 - Typer reads this form in every version
        typer.Option(
            help="Interpreters at work at once [default: chosen by timing the first images]", show_default=False
        ),
    ] = None,
    runtime: Runtime = "auto",
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a file on a sample of labelled images.

    The same code runs here and on a board, so the two numbers can be compared:

        mobile-bench evaluate model.tflite --sample sample.npz

    A file from elsewhere does not say how it wants its pixels:

        mobile-bench evaluate other.tflite --sample sample.npz --input-spec scaling=signed,head=logits
    """
    from mobile_bench.evaluate import evaluate_apart, read_sample
    from mobile_bench.files import sha256_of
    from mobile_bench.interpreter import check_is_tflite
    from mobile_bench.metadata import find_spec
    from mobile_bench.records import SCHEMA_VERSION
    from mobile_bench.stats import wilson_interval

    check_is_tflite(file)
    images, _ = read_sample(sample)
    spec = find_spec(file, input_spec, shape=images.shape[1:])
    with _bar(f"evaluating {file.name}") as progress:
        found = evaluate_apart(file, sample, spec, workers=workers, runtime=runtime, progress=progress)
    low, high = wilson_interval(found.correct, found.images)
    if as_json:
        facts = {name: getattr(found, name) for name in ("top1", "images", "correct", "runtime", "workers", "seconds")}
        _print_json(
            {
                "schema_version": SCHEMA_VERSION, **facts, "top1_low": low, "top1_high": high,
                "images_per_second": found.images_per_second, "sha256": sha256_of(file),
                "predictions": found.predictions.tolist(),
            }
        )  # fmt: skip
        return
    rows = {
        "Top-1": f"{found.top1:.2%} (95% interval {low:.2%} to {high:.2%})",
        "Images": f"{found.correct:,} of {found.images:,} right",
        "Speed": f"{found.images_per_second:,.0f} images/s with {found.workers} worker(s), loading included",
        "Runtime": found.runtime,
    }
    Console().print(_table(str(file), rows))


def _run_table(file: Path, measurement, summary, deadline_fps: float) -> Table:
    deadline_ms = 1000 / deadline_fps
    verdict = "yes" if summary.meets(deadline_ms) else "NO"
    mib = lambda count: "unknown" if count is None else f"{count / 2**20:.1f} MiB"
    target, device = measurement.target, measurement.device
    rows = {
        "Median": f"{_ms(summary.median_ms)} (95% interval {_ms(summary.median_low_ms)} to "
        f"{_ms(summary.median_high_ms)})",
        "p90": _ms(summary.p90_ms),
        "p99": _ms(summary.p99_ms),
        "Load": _ms(measurement.load_ms),
        "First inference": _ms(measurement.first_inference_ms),
        "Peak memory": f"{mib(measurement.peak_rss_bytes)} ({mib(measurement.base_rss_bytes)} before loading the file)",
        "Frames per second": f"{summary.fps:,.1f}",
        f"Meets {deadline_fps:g} fps": f"{verdict}: p90 {_ms(summary.p90_ms)}, deadline {_ms(deadline_ms)}",
        "Measured": f"{summary.samples} runs of {measurement.batch} image(s), {target.threads} thread(s), "
        f"{device.get('runtime')} {device.get('runtime_version')} on {device.get('cpu', 'an unknown CPU')}",
    }
    return _table(str(file), rows)


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _ms(value: float) -> str:
    """Milliseconds to four digits: '0.2849 ms', '12.53 ms', '1042 ms'."""
    if value >= 1000:
        return f"{value:.0f} ms"
    return f"{value:.{3 if value >= 1 else 4}g} ms" if value < 10 else f"{value:.4g} ms"


def _variant_folder(file: Path, save: bool | None) -> Path | None:
    """Where the record goes: the folder of the study variant that this very file is, or None."""
    from mobile_bench.errors import Problem
    from mobile_bench.files import sha256_of
    from mobile_bench.store import read_entry

    if save is False:
        return None
    folder = file.resolve().parent
    if not (folder / "variant.json").is_file():
        if save:
            raise InputError(
                "There is no study variant to store the record with",
                received=file,
                allowed="a file beside its variant.json",
            )
        return None
    try:
        same = read_entry(folder).variant.sha256 == sha256_of(file)
    except Problem:
        same = False
    if not same and save:
        raise InputError("variant.json beside the file speaks of another file", received=file)
    if not same:
        _say("not stored: variant.json beside the file speaks of another file", style="yellow")
    return folder if same else None


def _say_stage(message: dict) -> None:
    """One line a stage and no live display: redrawing would take time from a core that is being measured."""
    texts = {"load": "loading", "warm-up": "warming up", "timing": "timing {runs} runs"}
    text = message.get("text") or texts.get(message.get("stage", ""), "").format(**message)
    if text:
        _say(text, style="dim")


def _say(text: str, style: str = "") -> None:
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _bar(label: str):
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bar():
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as progress:
            task = progress.add_task(label, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bar()


def _print_json(value: dict) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def main() -> None:
    run_app(app)


if __name__ == "__main__":
    main()
