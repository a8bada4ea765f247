"""`mobile-bench stream`: does a file keep up with frames that arrive by themselves?"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console, Group
from rich.table import Table

from mobile_bench.cli_support import INTERRUPTED
from mobile_bench.commands.shared import (
    File,
    Inventory,
    Json,
    OneTarget,
    Runtime,
    Spec,
    Threads,
    ms,
    place_for,
    print_json,
    say,
    say_stage,
    table,
)
from mobile_bench.errors import InputError

if TYPE_CHECKING:
    from mobile_bench.stream import Stream, StreamSummary

_RAW = ("number", "arrived_ms", "started_ms", "done_ms", "stages_ms", "skipped_ms", "classes")


def stream(
    file: File,
    source: Annotated[
        str,
        typer.Option(
            help="A folder or .zip of JPEG or PNG images, a video file, or camera:0; with --target also board:SOURCE",
            show_default=False,
        ),
    ],
    fps: Annotated[float, typer.Option(help="Frames that arrive in a second")] = 30.0,
    seconds: Annotated[float, typer.Option(help="How long they arrive")] = 10.0,
    threads: Threads = None,
    queue: Annotated[
        Optional[int],  # noqa: UP045 - Typer reads this form in every version
        typer.Option(help="Frames that may wait; the oldest is dropped for another [default: 1]", show_default=False),
    ] = None,
    drop: Annotated[bool, typer.Option("--drop/--no-drop", help="Drop frames, or let all of them wait")] = True,
    deadline_ms: Annotated[
        Optional[float],  # noqa: UP045 - Typer reads this form in every version
        typer.Option(help="From arrival to answer [default: the time between two frames]", show_default=False),
    ] = None,
    pipelined: Annotated[
        bool, typer.Option("--pipelined", help="Decode, resize and normalize in a second thread")
    ] = False,
    target: OneTarget = None,
    inventory: Inventory = None,
    input_spec: Spec = "",
    runtime: Runtime = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write everything here as JSON, with the times of every frame", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Feed a file frames at the pace of a camera, and see what is late, what is dropped and where the time goes.

    A frame's latency counts from the moment it arrives until its answer is there: waiting, decoding, resizing,
    normalizing, inference and reading the answer. Frames arrive by the clock, whether the last is done or not.

    Photos as if a camera took 30 of them a second:

        mobile-bench stream model.tflite --source photos/ --fps 30

    A video, its decoding included, with decoding and resizing in a thread of their own (videos and cameras need
    pip install 'tfopt[stream]'):

        mobile-bench stream model.tflite --source clip.mp4 --fps 25 --pipelined

    A camera for a minute, and the times of every frame in a file:

        mobile-bench stream model.tflite --source camera:0 --seconds 60 --out frames.json

    On a board: images and videos of here are sent there (up to 512 MiB and 1 GiB), board:SOURCE is there, its path
    counted from the home folder, and so is a camera:

        mobile-bench stream model.tflite --source camera:0 --target ssh://pi@raspberry.local
        mobile-bench stream model.tflite --source board:Pictures/ --target ssh://pi@raspberry.local

    Ctrl-C (or SIGTERM) keeps, shows and writes what came until then.

    Exit code 0: measured, in time or not; 1: the runtime crashed or the device cannot be reached; 2: the file, the
    source or an option cannot be used; 130: interrupted.
    """
    from mobile_bench.files import check_writable, write_json
    from mobile_bench.flatbuffer import read_model
    from mobile_bench.interpreter import check_is_tflite
    from mobile_bench.metadata import find_spec
    from mobile_bench.records import SCHEMA_VERSION
    from mobile_bench.stream import stream as run_stream
    from mobile_bench.stream import summarize_stream

    if queue is not None and not drop:
        raise InputError(
            "--no-drop lets any number of frames wait", received=f"--queue {queue}", next_step="Leave one out"
        )
    check_writable(out, file, source)
    check_is_tflite(file)
    graph = read_model(file).main
    shape = graph.tensors[graph.inputs[0]].shape[1:] if graph.inputs else ()
    spec = find_spec(file, input_spec, shape=shape if len(shape) == 3 else None)
    place = place_for(target, inventory, threads, runtime)
    found = run_stream(
        file, source, spec, fps=fps, seconds=seconds, target=place.target, connection=place.connection,
        queue=1 if queue is None else queue,
        drop=drop, deadline_ms=deadline_ms, pipelined=pipelined, on_progress=say_stage,
    )  # fmt: skip
    summary = summarize_stream(found)
    whole = {"schema_version": SCHEMA_VERSION, "stream": asdict(found), "summary": asdict(summary)}
    if as_json:
        brief = {name: value for name, value in whole["stream"].items() if name not in _RAW}
        print_json({**whole, "stream": brief})
    else:
        Console().print(_report(str(file), found, summary))
    for warning in found.warnings:
        say(f"warning: {warning}", style="yellow")
    if out:
        write_json(out, whole)
        say(f"every frame is in {out}")
    if found.interrupted:
        say(f"interrupted after {found.seconds:.1f} of {seconds:g} s", style="bold red")
        raise typer.Exit(INTERRUPTED)


def _report(title: str, found: Stream, summary: StreamSummary) -> Group:
    share = lambda count: f"{count:,} ({count / found.arrived:.1%})" if found.arrived else f"{count:,}"
    period = 1000 / found.fps
    rate = lambda value: f"{value / 1e6:,.3g} MB/s"
    jitter = "unknown: one frame"
    if summary.jitter_std_ms is not None:
        jitter = (
            f"{ms(summary.jitter_std_ms)} standard deviation, p99 {ms(summary.jitter_p99_ms)}, "
            f"of the times between answers against {ms(period)}"
        )
    data = "decode, resize and normalize take longer than inference" if summary.bound_by == "data" else "the model"
    rows = {
        "Frames": f"{found.arrived:,} arrived, {summary.processed:,} processed, {share(summary.dropped)} dropped, "
        f"{summary.waiting:,} waiting at the end",
        "Missed": f"{share(summary.missed)}: {summary.late:,} done later than {ms(found.deadline_ms)} after arrival, "
        f"{summary.missed - summary.late:,} not done",
        "From arrival to answer": f"median {ms(summary.median_ms)}, p90 {ms(summary.p90_ms)}, p99 "
        f"{ms(summary.p99_ms)}, worst {ms(summary.max_ms)}",
        "Of that, waiting": f"median {ms(max(0.0, summary.wait_ms))}",
        "Jitter": jitter,
        "Bottleneck": f"{summary.bottleneck}; bound by {summary.bound_by} ({data})",
        "Sustainable": f"{summary.sustainable_fps:,.1f} frames a second; {summary.achieved_fps:,.1f} of "
        f"{found.fps:g} achieved",
        "Data": f"{rate(summary.encoded_rate)} encoded in, {rate(summary.decoded_rate)} of pixels decoded, "
        f"{rate(summary.input_rate)} into the model",
        "Most often": _most_often(found),
        "Measured": f"{found.about}, {found.seconds:g} s at {found.fps:g} frames a second, queue of "
        f"{found.queue or 'any length'}, {'two threads' if found.pipelined else 'one thread'} for the frames, "
        f"{found.target.threads} for the model, {found.device.get('runtime')} {found.device.get('runtime_version')}",
    }
    stages = Table(title="A frame's time", title_justify="left")
    stages.add_column("Stage")
    for name in ("Median", "p99", "Share"):
        stages.add_column(name, justify="right", no_wrap=True)
    for stage in summary.stages:
        cells = (ms(stage.median_ms), ms(stage.p99_ms), f"{stage.share:.1%}")
        stages.add_row(stage.name, *cells, style="bold" if stage.name == summary.bottleneck else "")
    return Group(table(title, rows), stages)


def _most_often(found: Stream) -> str:
    answer, count = Counter(found.classes).most_common(1)[0]
    if answer < 0:
        return "the file is no classifier: its outputs were read and dequantized only"
    name = found.labels[answer] if answer < len(found.labels) else f"class {answer}"
    return f"{name} ({count:,} of {len(found.classes):,} frames)"
