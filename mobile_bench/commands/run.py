"""`mobile-bench run`: how fast a file is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from mobile_bench.cli_support import INTERRUPTED
from mobile_bench.commands.shared import (
    Accelerator,
    DelegateOption,
    Fallback,
    File,
    Inventory,
    Json,
    Library,
    Reference,
    Runtime,
    Spec,
    Threads,
    delegate_of,
    ms,
    places_for,
    print_json,
    say,
    say_stage,
    table,
    variant_folder,
)
from mobile_bench.errors import InputError, Interrupted


def run(
    file: File,
    threads: Threads = None,
    runs: Annotated[
        int, typer.Option(help="Timed inferences, at least; a fast model gets up to 1,000 in a second")
    ] = 50,
    rounds: Annotated[int, typer.Option(help="Fresh processes, at least")] = 3,
    width: Annotated[
        float, typer.Option(help="Go on until the 95% interval of the median is narrower than this, in percent of it")
    ] = 2.0,
    seconds: Annotated[float, typer.Option(help="No further process begins after this time")] = 1.5,
    runtime: Runtime = None,
    target: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Where to measure: local, ssh://user@host, adb:SERIAL, or a name in targets.toml; may be given "
            "several times [default: local]",
            show_default=False,
        ),
    ] = None,
    inventory: Inventory = None,
    accelerator: Accelerator = None,
    library: Library = "",
    delegate_option: DelegateOption = None,
    allow_fallback: Fallback = False,
    reference: Reference = None,
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
    """Time a file's inference in fresh processes, until the interval of the median is narrow.

    Each process loads the file, runs it once, warms up until the times are steady, and then times single
    inferences: only the runtime's own work, the input already in place.

    Two threads, and whether it keeps up with 60 frames a second:

        mobile-bench run model.tflite --threads 2 --deadline-fps 60

    For a script:

        mobile-bench run model.tflite --json | jq .summary.median_ms

    Here, on a board and on a phone at once:

        mobile-bench run model.tflite --target local --target ssh://pi@raspberry.local --target phone

    On the Edge TPU of a Coral board, its answers first compared with those of the file it was compiled from:

        mobile-bench run model_edgetpu.tflite --target coral --accelerator edgetpu --reference model.tflite

    As narrow as 0.5%, if that can be had within two minutes:

        mobile-bench run model.tflite --width 0.5 --seconds 120

    Exit code 0: measured; 1: a worker crashed, took too long or could not be reached; 2: the file or an option
    cannot be used; 130: interrupted, by Ctrl-C or SIGTERM: what the processes before have measured is shown.
    """
    from mobile_bench import records, stats
    from mobile_bench.inputs import InputSpec, override
    from mobile_bench.measure import measure_on
    from mobile_bench.metadata import recorded_spec

    if not deadline_fps > 0:
        raise InputError("The deadline is not a positive number of frames per second", received=deadline_fps)
    for name in sorted({name for name in target or () if target.count(name) > 1}):
        say(f"{name} was asked for more than once: it is measured once", style="yellow")
    places = places_for(target or ["local"], inventory, threads, runtime, accelerator)
    folder = variant_folder(file, save)
    spec = recorded_spec(file)
    if input_spec.strip():
        spec = override(spec or InputSpec(1, 1, 3), input_spec)

    def relay(place, message: dict) -> None:
        say_stage(message, f"{place.name}: " if len(places) > 1 else "")

    interrupted = False
    try:
        measurements = measure_on(
            places, file, batch=batch, runs=runs, rounds=rounds, width=width / 100, seconds=seconds, spec=spec,
            seed=seed, delegate=delegate_of(library, delegate_option, allow_fallback, reference), on_progress=relay,
        )  # fmt: skip
    except Interrupted as interrupt:
        interrupted = True
        for place in (place for place, kept in zip(places, interrupt.kept) if not kept):
            say(f"{place.name}: nothing was measured yet", style="bold red")
        places = [place for place, kept in zip(places, interrupt.kept) if kept]
        measurements = [kept for kept in interrupt.kept if kept]
    if folder:
        from mobile_bench.store import write_measurement

        for measurement in measurements:
            say(f"stored in {write_measurement(folder, measurement)}")
    summaries = [stats.summarize(measurement) for measurement in measurements]
    if as_json:
        found = [
            {"measurement": records.to_dict(m), "summary": asdict(s) if s else None}
            for m, s in zip(measurements, summaries)
        ]
        answer = found[0] if len(found) == 1 else {"measurements": found}
        ended = {"interrupted": True} if interrupted else {}
        print_json({"schema_version": records.SCHEMA_VERSION, **ended, **answer})
    for place, measurement, summary in zip(places, measurements, summaries):
        prefix = f"{place.name}: " if len(places) > 1 else ""
        if not summary:
            label = "refused" if measurement.status == "refused" else "the measurement failed"
            say(f"{prefix}{label}: {measurement.reason}", style="bold red")
        elif not as_json:
            Console().print(_run_table(prefix, file, measurement, summary, deadline_fps))
        wide = summary and summary.rounds > 1 and summary.median_high_ms / summary.median_low_ms - 1
        if wide and wide > width / 100:
            say(
                f"{prefix}the interval is {wide:.1%} wide (above {width:g}%): for a narrower one give it more time, "
                f"such as --seconds {max(30, int(10 * seconds))}", style="yellow",
            )  # fmt: skip
        for warning in measurement.warnings:
            say(f"warning: {prefix}{warning}", style="yellow")
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    statuses = {measurement.status for measurement in measurements}
    if statuses != {"ok"}:
        raise typer.Exit(1 if "failed" in statuses else 2)


def _arena(file: Path, batch: int) -> str:
    from mobile_bench.arena import arena_of
    from mobile_bench.errors import Problem
    from mobile_bench.flatbuffer import read_model

    try:
        arena = arena_of(read_model(file), batch)
    except Problem:
        return "unknown"
    kib = lambda count: f"{count / 1024:,.0f} KiB"
    return f"{kib(arena.arena_bytes)} as TFLite plans it, {kib(arena.activation_bytes)} in use at once"


def _accelerator_rows(measurement) -> dict[str, str]:
    """What the accelerator took, and how its answers differ from the CPU's; nothing for the CPU."""
    if measurement.output_drift is None:
        return {}
    taken, left = len(measurement.delegated_ops), len(measurement.fallback_ops)
    return {
        "Delegated": f"{taken} of {taken + left} operations to {measurement.device.get('accelerator', 'the delegate')}",
        "Answers": f"differ from the CPU's by {measurement.output_drift:.2g} of the largest value",
    }


def _run_table(prefix: str, file: Path, measurement, summary, deadline_fps: float) -> Table:
    deadline_ms = 1000 / deadline_fps
    verdict = "yes" if summary.meets(deadline_ms) else "NO"
    mib = lambda count: "unknown" if count is None else f"{count / 2**20:.1f} MiB"
    target, device = measurement.target, measurement.device
    between = f"95% interval {ms(summary.median_low_ms)} to {ms(summary.median_high_ms)}"
    if summary.rounds == 1 and target.transport != "adb":  # by adb each sample is a process
        between = "one process, so nothing is known of the next: take --rounds 3"
    rows = {
        "Median": f"{ms(summary.median_ms)} ({between})",
        "p90, p95, p99": f"{ms(summary.p90_ms)}, {ms(summary.p95_ms)}, {ms(summary.p99_ms)}",
        "Spread": f"{summary.spread:.1%} of the median between the quartiles, {summary.outliers} of "
        f"{summary.samples} runs far above",
        "Load": "unknown" if measurement.load_ms is None else ms(measurement.load_ms),
        "First inference": "unknown" if measurement.first_inference_ms is None else ms(measurement.first_inference_ms),
        "Peak memory": f"{mib(measurement.peak_rss_bytes)} ({mib(measurement.base_rss_bytes)} before loading the file)",
        "Tensor arena": _arena(file, measurement.batch),
        "Frames per second": f"{summary.fps:,.1f}",
        f"Meets {deadline_fps:g} fps": f"{verdict}: p90 {ms(summary.p90_ms)}, deadline {ms(deadline_ms)}",
        **_accelerator_rows(measurement),
        "Measured": f"{summary.samples} runs of {measurement.batch} image(s) in {summary.rounds} process(es), "
        f"{target.threads} thread(s), "
        f"{device.get('runtime')} {device.get('runtime_version')} on {device.get('cpu', 'an unknown CPU')}",
    }
    return table(f"{prefix}{file}", rows)
