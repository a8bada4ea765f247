"""`mobile-bench sweep`: how a file scales with threads, batch, input size and streams."""

from __future__ import annotations

import uuid
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_bench.cli_support import INTERRUPTED
from mobile_bench.commands.shared import File, Json, Runtime, Spec, bar, ms, print_json, say
from mobile_bench.errors import InputError, Interrupted

_MOST_POINTS = 64


def sweep(
    file: File,
    threads: Annotated[str, typer.Option(help="Thread counts to try, such as 1,2,4")] = "1,2",
    batch: Annotated[str, typer.Option(help="Images per inference to try, such as 1,4,16")] = "1,4,16",
    size: Annotated[
        str,
        typer.Option(help="Input heights, equal to widths, to try, such as 96,128,160, where the file allows it"),
    ] = "",
    streams: Annotated[
        str, typer.Option(help="Processes that run the file at once to try, such as 1,2,4; threads are of each")
    ] = "",
    runs: Annotated[int, typer.Option(help="Timed inferences of each point, at least")] = 30,
    runtime: Runtime = "auto",
    input_spec: Spec = "",
    seed: Annotated[int, typer.Option(help="Seed of the random input")] = 0,
    as_json: Json = False,
) -> None:
    """Measure every combination of input size, batch and thread count, each in fresh processes.

    What is the highest throughput, and what does it cost in latency?

        mobile-bench sweep model.tflite --threads 1,2,4 --batch 1,8,32

    What does a larger picture cost?

        mobile-bench sweep model.tflite --size 96,128,160 --threads 1 --batch 1

    How many cameras can it serve at once, and what becomes of the slowest answers?

        mobile-bench sweep model.tflite --streams 1,2,4 --threads 1 --batch 1

    Exit code 0: all points measured; 1: one failed or was refused (it is shown with its reason); 2: all were
    refused, or the file or an option cannot be used; 130: interrupted, by Ctrl-C or SIGTERM: the points before are
    shown.
    """
    from mobile_bench import records, stats
    from mobile_bench.concurrency import MOST_STREAMS, measure_streams
    from mobile_bench.inputs import InputSpec, override
    from mobile_bench.interpreter import check_is_tflite
    from mobile_bench.measure import measure
    from mobile_bench.metadata import recorded_spec

    sizes = _counts("size", size, 65_536) if size.strip() else [None]
    stream_counts = _counts("streams", streams, MOST_STREAMS) if streams.strip() else [None]
    batches, thread_counts = _counts("batch", batch, 4096), _counts("threads", threads, 256)
    points = list(product(sizes, batches, thread_counts, stream_counts))
    if len(points) > _MOST_POINTS:
        raise InputError("The sweep has too many points", received=len(points), allowed=f"up to {_MOST_POINTS}")
    check_is_tflite(file)
    spec = recorded_spec(file)
    if input_spec.strip():
        spec = override(spec or InputSpec(1, 1, 3), input_spec)
    unsized = "" if sizes == [None] or _takes_pictures(file) else "The file takes no picture, so it has no input size"
    found, shared = [], []
    interrupted = False
    with bar("measuring") as progress:
        for number, (side, images, thread_count, count) in enumerate(points):
            progress(number, len(points))
            target = records.Target(threads=thread_count, runtime=runtime)
            if unsized:
                found.append(_refused(file, target, images, unsized))
                shared.append(None)
                continue
            sized = replace(spec or InputSpec(1, 1, 3), height=side, width=side) if side else spec
            options = {"batch": images, "runs": runs, "spec": sized, "seed": seed, "on_progress": _say_text}
            options["resize"] = bool(side)
            try:
                together = measure_streams(file, count, target, **options) if count else None
                found.append(together.measurement if count else measure(file, target, kind="sweep", **options))
                shared.append(together)
            except KeyboardInterrupt as interrupt:
                interrupted = True
                if isinstance(interrupt, Interrupted):
                    found.append(interrupt.kept)
                    shared.append(None)
                if not found:
                    raise
                break
    asked, points = len(points), points[: len(found)]
    summaries = [stats.summarize(measurement) for measurement in found]
    facts = _stream_facts(points, shared)
    if as_json:
        print_json(
            {
                "schema_version": records.SCHEMA_VERSION,
                **({"interrupted": True} if interrupted else {}),
                "points": [
                    {"measurement": records.to_dict(m), "summary": asdict(s) if s else None, **extra}
                    for m, s, extra in zip(found, summaries, facts)
                ],
            }
        )
    else:
        Console().print(_table(escape(str(file)), found, summaries, [point[0] for point in points], facts))
    for reason in dict.fromkeys(measurement.reason for measurement in found if measurement.reason):
        say(f"not measured: {reason}", style="red")
    for warning in dict.fromkeys(warning for measurement in found for warning in measurement.warnings):
        say(f"warning: {warning}", style="yellow")
    if interrupted:
        say(f"interrupted: {len(found)} of {asked} points", style="bold red")
        raise typer.Exit(INTERRUPTED)
    if None in summaries:
        raise typer.Exit(2 if {measurement.status for measurement in found} == {"refused"} else 1)


def _counts(name: str, text: str, most: int) -> list[int]:
    """'1,2,4' to [1, 2, 4], each once, in the order given."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= most for part in parts):
        raise InputError(
            f"--{name} is not a list of counts", received=repr(text), allowed=f"whole numbers from 1 to {most}: 1,2,4"
        )
    return list(dict.fromkeys(int(part) for part in parts))


def _say_text(message: dict) -> None:
    if message.get("text"):
        say(message["text"], style="dim")


def _stream_facts(points: list[tuple], shared: list) -> list[dict]:
    """What each point's record has besides the measurement: 'streams' where they were asked for.

    efficiency is None where one stream alone was not measured at that size, batch and thread count.
    """
    alone = {point[:3]: found.fps for point, found in zip(points, shared) if found and found.streams == 1}
    facts = []
    for point, found in zip(points, shared):
        if point[3] is None:
            facts.append({})
            continue
        single = alone.get(point[:3])
        efficiency = found.efficiency(single) if found and found.fps and single else None
        streams = {"streams": point[3], "fps": found.fps if found else 0.0, "efficiency": efficiency}
        facts.append({"streams": {**streams, "per_stream": found.per_stream() if found else []}})
    return facts


def _takes_pictures(file: Path) -> bool:
    from mobile_bench.flatbuffer import read_model

    graph = read_model(file).main
    return any(len(graph.tensors[index].shape) == 4 for index in graph.inputs)


def _refused(file: Path, target, batch: int, reason: str):
    """The record of a point that need not be tried."""
    from mobile_bench.files import sha256_of
    from mobile_bench.records import Measurement

    return Measurement(
        uuid.uuid4().hex[:8], "sweep", sha256_of(file), target, "refused", reason, batch,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _table(title: str, found, summaries, sizes: list[int | None], facts: list[dict]) -> Table:
    table = Table(title=title, title_justify="left")
    sized, together = any(sizes), any(facts)
    names = ["Batch", "Threads", *(["Streams"] if together else []), "Median", "p99" if together else "p90", "Images/s"]
    # With streams or sizes there is no room for the memory, which --json has.
    last = ["Efficiency"] if together else ["Speed-up", *([] if sized else ["Peak memory"])]
    for name in (*(["Size"] if sized else []), *names, *last):
        table.add_column(name, justify="right", no_wrap=True)
    rates = [extra["streams"]["fps"] if extra else s.fps if s else 0.0 for s, extra in zip(summaries, facts)]
    best, first = max(rates), next((rate for rate in rates if rate), 0.0)
    for measurement, summary, side, extra, rate in zip(found, summaries, sizes, facts, rates):
        head = [f"{side}x{side}"] if sized else []
        head += [str(measurement.batch), str(measurement.target.threads)]
        head += [str(extra["streams"]["streams"])] if together else []
        if summary is None:
            table.add_row(*head, f"[red]{measurement.status}[/]")
            continue
        peak = "" if measurement.peak_rss_bytes is None else f"{measurement.peak_rss_bytes / 2**20:.1f} MiB"
        gain = f"{rate / first:.2f}x"
        if together:
            efficiency = extra["streams"]["efficiency"]
            gain = "" if efficiency is None else f"{efficiency:.0%}"
        slow_ms = summary.p99_ms if together else summary.p90_ms
        table.add_row(
            *head, ms(summary.median_ms), ms(slow_ms), f"{rate:,.0f}", gain, *([] if together or sized else [peak]),
            style="bold green" if rate == best else "",
        )  # fmt: skip
    device = next((measurement.device for measurement in found if measurement.device), {})
    table.caption = (
        f"{device.get('cpu', 'unknown CPU')}, {device.get('cores', '?')} core(s); green: most images a second"
    )
    if together:
        table.caption += "; Efficiency: images a second over those of as many single streams (ask for 1, too)"
    table.caption_justify = "left"
    return table
