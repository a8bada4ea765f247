"""`mobile-bench sweep`: how a file scales with threads and batch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mobile_bench.commands.shared import File, Json, Runtime, Spec, bar, ms, print_json, say
from mobile_bench.errors import InputError

_MOST_POINTS = 64


def sweep(
    file: File,
    threads: Annotated[str, typer.Option(help="Thread counts to try, such as 1,2,4")] = "1,2",
    batch: Annotated[str, typer.Option(help="Images per inference to try, such as 1,4,16")] = "1,4,16",
    runs: Annotated[int, typer.Option(help="Timed inferences of each point, at least")] = 30,
    runtime: Runtime = "auto",
    input_spec: Spec = "",
    seed: Annotated[int, typer.Option(help="Seed of the random input")] = 0,
    as_json: Json = False,
) -> None:
    """Measure every combination of thread count and batch, each in a fresh process.

    What is the highest throughput, and what does it cost in latency?

        mobile-bench sweep model.tflite --threads 1,2,4 --batch 1,8,32

    Exit code 0: all points measured; 1: one failed or was refused (it is shown with its reason); 2: the file or
    an option cannot be used.
    """
    from mobile_bench import records, stats
    from mobile_bench.inputs import InputSpec, override
    from mobile_bench.interpreter import check_is_tflite
    from mobile_bench.measure import measure
    from mobile_bench.metadata import recorded_spec

    points = [(t, b) for b in _counts("batch", batch, 4096) for t in _counts("threads", threads, 256)]
    if len(points) > _MOST_POINTS:
        raise InputError("The sweep has too many points", received=len(points), allowed=f"up to {_MOST_POINTS}")
    check_is_tflite(file)
    spec = recorded_spec(file)
    if input_spec.strip():
        spec = override(spec or InputSpec(1, 1, 3), input_spec)
    found = []
    with bar("measuring") as progress:
        for number, (thread_count, images) in enumerate(points):
            progress(number, len(points))
            target = records.Target(threads=thread_count, runtime=runtime)
            found.append(
                measure(
                    file, target, batch=images, runs=runs, spec=spec, seed=seed, kind="sweep",
                    on_progress=lambda message: say(message["text"], style="dim") if message.get("text") else None,
                )
            )  # fmt: skip
    summaries = [stats.summarize(measurement) for measurement in found]
    if as_json:
        print_json(
            {
                "schema_version": records.SCHEMA_VERSION,
                "points": [
                    {"measurement": records.to_dict(m), "summary": asdict(s) if s else None}
                    for m, s in zip(found, summaries)
                ],
            }
        )
    else:
        Console().print(_table(str(file), found, summaries))
    for warning in dict.fromkeys(warning for measurement in found for warning in measurement.warnings):
        say(f"warning: {warning}", style="yellow")
    if None in summaries:
        raise typer.Exit(1)


def _counts(name: str, text: str, most: int) -> list[int]:
    """'1,2,4' to [1, 2, 4], each once, in the order given."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= most for part in parts):
        raise InputError(
            f"--{name} is not a list of counts", received=repr(text), allowed=f"whole numbers from 1 to {most}: 1,2,4"
        )
    return list(dict.fromkeys(int(part) for part in parts))


def _table(title: str, found, summaries) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("Batch", "Threads", "Median", "p90", "Images/s", "Speed-up", "Peak memory"):
        table.add_column(name, justify="right", no_wrap=True)
    best = max((s.fps for s in summaries if s), default=0.0)
    first = next((s.fps for s in summaries if s), 0.0)
    for measurement, summary in zip(found, summaries):
        head = (str(measurement.batch), str(measurement.target.threads))
        if summary is None:
            table.add_row(*head, f"[red]{measurement.status}[/]", measurement.reason.partition(". ")[0])
            continue
        peak = "" if measurement.peak_rss_bytes is None else f"{measurement.peak_rss_bytes / 2**20:.1f} MiB"
        table.add_row(
            *head, ms(summary.median_ms), ms(summary.p90_ms), f"{summary.fps:,.0f}", f"{summary.fps / first:.2f}x",
            peak, style="bold green" if summary.fps == best else "",
        )  # fmt: skip
    device = found[0].device
    table.caption = (
        f"{device.get('cpu', 'unknown CPU')}, {device.get('cores', '?')} core(s); green: most images a second"
    )
    table.caption_justify = "left"
    return table
