"""`mobile-bench roofline`: how near files come to what the machine can do, and where time is lost."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_bench.commands.shared import Inventory, Json, OneTarget, Spec, ms, place_for, print_json, say
from mobile_bench.errors import InputError, Problem

#: Fresh processes that time each file: a share of a roof needs no narrower interval.
_ROUNDS = 3
#: Columns from which on the table of operations has room for all of its own.
_ROOMY = 100
_SHORTEST, _LAYER_END = 16, 6


def roofline(
    files: Annotated[list[Path], typer.Argument(help="One or more .tflite files", metavar="FILE.tflite...")],
    threads: Annotated[
        Optional[int],  # noqa: UP045 - Typer reads this form in every version
        typer.Option(help="Threads the runtime may use [default: the inventory's, or 1]", show_default=False),
    ] = None,
    runs: Annotated[int, typer.Option(help="Timed inferences of each file, at least")] = 50,
    ops: Annotated[bool, typer.Option("--ops", help="One file operation by operation, the dearest first")] = False,
    top: Annotated[int, typer.Option(min=0, help="Operations to show with --ops; 0 for all")] = 15,
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw it as an SVG into this file", metavar="FILE.svg", show_default=False),
    ] = None,
    target: OneTarget = None,
    inventory: Inventory = None,
    runtime: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="auto, ai-edge-litert or tflite-runtime [default: the inventory's, or auto]"),
    ] = None,
    input_spec: Spec = "",
    seed: Annotated[int, typer.Option(help="Seed of the random input")] = 0,
    as_json: Json = False,
) -> None:
    """Measure what the machine can do at most, and set each file beside it: the roofline model.

    The roofs: arithmetic a second by the runtime itself (float32 and int8), and bytes a second by STREAM, to memory
    and within the cache. A file bound by compute gets faster with less arithmetic or smaller numbers, one bound by
    memory with smaller tensors; one far below its roof loses its time elsewhere, and --ops shows where.

        mobile-bench roofline float32.tflite int8.tflite --threads 2

    Which operations could be won most from?

        mobile-bench roofline model.tflite --ops --picture roofline.svg

    Exit code 0: measured; 1: a process crashed, took too long or could not be reached; 2: a file or an option
    cannot be used; 130: interrupted.
    """
    from mobile_bench import records
    from mobile_bench.files import check_writable
    from mobile_bench.flatbuffer import read_model
    from mobile_bench.interpreter import check_is_tflite
    from mobile_bench.measure import MOST_RUNS, measure
    from mobile_bench.roofline import attained, measure_peak, work_of_file
    from mobile_bench.stats import summarize

    if picture and picture.suffix.lower() != ".svg":
        raise InputError("The picture is an SVG", received=picture, allowed="a name that ends in .svg")
    check_writable(picture, *files)
    if not 1 <= runs <= MOST_RUNS:
        raise InputError("--runs is out of range", received=runs, allowed=f"1 to {MOST_RUNS}")
    if not 0 <= seed < 2**32:
        raise InputError("--seed is out of range", received=seed, allowed="0 to 4294967295")
    place = place_for(target, inventory, threads, runtime)
    if ops and len(files) != 1:
        raise InputError("--ops takes one file", received=len(files), next_step="Leave --ops out, or name one file")
    models = []
    for file in files:
        check_is_tflite(file)
        models.append(read_model(file))
    specs = [_spec(file, input_spec) for file in files]
    peak = measure_peak(place.target, connection=place.connection, on_progress=_say_text)
    for warning in peak.warnings:
        say(f"warning: the roofs: {warning}", style="yellow")
    rows, measurements = [], []
    for file, name, model, spec in zip(files, _names(files), models, specs):
        say(f"timing {name}", style="dim")
        found = measure(
            file, place.target, connection=place.connection, runs=runs, spec=spec, seed=seed,
            rounds=_ROUNDS, seconds=0, on_progress=_say_text,
        )  # fmt: skip
        measurements.append(found)
        summary = summarize(found)
        rows.append(attained(name, summary.median_ms, work_of_file(model), peak) if summary else None)
        for warning in found.warnings:
            say(f"warning: {name}: {warning}", style="yellow")
    operations, problem = (), None
    if ops and rows[0]:
        try:
            operations = _operations(files[0], models[0], place, specs[0], seed, peak)
        except Problem as found:  # what was measured so far is still worth showing
            problem = found
    if as_json:
        print_json(
            {
                "schema_version": records.SCHEMA_VERSION,
                "peak": asdict(peak),
                "files": [
                    {"file": str(f), "measurement": records.to_dict(m), "roofline": _dict(row) if row else None}
                    for f, m, row in zip(files, measurements, rows)
                ],
                "ops": [_dict(row) for row in operations],
            }
        )
    else:
        _show(peak, rows, measurements, _names(files), operations, top)
    if picture and any(rows):
        _draw(picture, list(operations) or [row for row in rows if row], peak)
    if problem:
        raise problem
    statuses = {measurement.status for measurement in measurements}
    if statuses != {"ok"}:
        raise typer.Exit(1 if "failed" in statuses else 2)


def _say_text(message: dict) -> None:
    if message.get("text"):
        say(message["text"], style="dim")


def _spec(file: Path, text: str):
    from mobile_bench.inputs import InputSpec, override
    from mobile_bench.metadata import recorded_spec

    spec = recorded_spec(file)
    return override(spec or InputSpec(1, 1, 3), text) if text.strip() else spec


def _operations(file: Path, model, place, spec, seed: int, peak):
    from mobile_bench.profile import profile
    from mobile_bench.roofline import by_operation

    found = profile(
        file, place.target, connection=place.connection, spec=spec, seed=seed, on_progress=_say_text
    )  # fmt: skip
    return by_operation(model, found.ops, peak)


def _names(files: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the files apart."""
    parts = [file.resolve().with_suffix("").parts for file in files]
    if len(files) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]  # 'model.tflite' in each variant's folder
    depth = next(n for n in range(1, 99) if len({p[-n:] for p in parts}) == len(set(parts)) or n == 98)
    return ["/".join(p[-depth:]) for p in parts]


def _draw(picture: Path, rows: list, peak) -> None:
    from mobile_bench.files import write_bytes
    from mobile_bench.roofline_picture import picture as draw

    cpu = peak.device.get("cpu", "unknown CPU")
    write_bytes(picture, draw(f"Roofline of {cpu}, {peak.threads} thread(s)", rows, peak).encode())
    say(f"drawn in {picture}")


def _dict(row) -> dict:
    return {**asdict(row), "lost_ms": row.lost_ms}


def _show(peak, rows, measurements, names, operations, top) -> None:
    console = Console()
    int8 = f"{peak.gops_int8:.4g} GOP/s int8" if peak.gops_int8 else "no int8 in this runtime"
    console.print(
        f"Roofs with {peak.threads} thread(s): {peak.gflops:.4g} GFLOP/s float32, {int8}, {peak.gbytes_s:.3g} GB/s to "
        f"memory, {peak.cache_gbytes_s:.3g} GB/s within {peak.cache_bytes / 2**20:.4g} MiB of cache",
        highlight=False,
    )
    table = _table("Files", "File", "Median")
    for row, measurement, name in zip(rows, measurements, names):
        if row is None:
            table.add_row(escape(name), f"[red]{measurement.status}[/]", escape(measurement.reason.partition(". ")[0]))
        else:
            table.add_row(escape(name), *_cells(row))
    device = peak.device
    table.caption = (
        f"{device.get('cpu', 'unknown CPU')}, {device.get('runtime')} {device.get('runtime_version')}; FLOP: 2 for "
        "each multiply-accumulate; bytes: each operation's tensors once; 100% of the roof is the least time possible"
    )
    table.caption_justify = "left"
    console.print(table)
    if not operations:
        return
    shown = operations[:top] if top else operations
    table = _operations_table(shown, console.width)
    table.title = f"Operations, the dearest {len(shown)} of {len(operations)}"
    unknown = sum(row.time_ms for row in operations if row.lost_ms is None)
    lost = sum(row.lost_ms or 0 for row in operations)
    total = sum(row.time_ms for row in operations)
    table.caption = (
        f"Lost: time above the roof, {_short(lost)} of {_short(total)} in all steps; {_short(unknown)} in steps "
        "without figures. Above 100%: the step's tensors were nearer than the roof's, or the profiler's clock of whole "
        "microseconds was too coarse"
    )
    for note in dict.fromkeys(row.note for row in shown if row.share is None):
        table.caption += f". Unknown: {note}"
    table.caption_justify = "left"
    console.print(table)


def _operations_table(shown, width: int) -> Table:
    """One line an operation: in a narrow window the speed and the kind of numbers give way, and longer names are
    cut."""
    heads, lines = ("Average", "GFLOP/s", "Of roof", "Lost", "Bound by"), []
    for row in shown:
        average, speed, _, _, share, bound = _cells(row)
        lost = "" if row.lost_ms is None else _short(row.lost_ms)
        lines.append((average, speed, share, lost, "unknown" if row.share is None else bound))
    if width < _ROOMY:
        heads = (heads[0], *heads[2:])
        lines = [(average, share, lost, bound.partition(",")[0]) for average, _, share, lost, bound in lines]
    taken = sum(max(map(len, column)) for column in zip(heads, *lines))
    room = width - taken - 3 * (len(heads) + 1) - 1  # a line and a space on either side of each column
    made = Table(title_justify="left")
    made.add_column("Operation", no_wrap=True, min_width=_SHORTEST)
    for head in heads:
        made.add_column(head, justify="left" if head == "Bound by" else "right", no_wrap=True)
    for row, line in zip(shown, lines):
        made.add_row(escape(fitted(row.layer, row.name, max(room, _SHORTEST))), *line)
    return made


def fitted(layer: str, operation: str, room: int) -> str:
    """'layer: operation' in as many characters. The layer tells the lines apart, so the kernel's name is cut first:
    'Fully Connected (NC, QU8) GEMM' to 'Fully Connected GEMM' to 'GEMM'; then the layer loses its start."""
    brief = re.sub(r" *\([^)]*\)", "", operation)
    texts = (operation, brief, *([brief.split()[-1]] if layer and brief else []))
    for text in texts:
        whole = f"{layer}: {text}" if layer else text
        if len(whole) <= room:
            return whole
    left = room - len(texts[-1]) - len("…: ")
    if layer and left >= _LAYER_END:
        return f"…{layer[-left:]}: {texts[-1]}"
    return f"{whole[: room - 1]}…"


def _table(title: str, first: str, time: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in (time, "GFLOP/s", "FLOP/byte", "Roof", "Of roof", "Bound by"):
        table.add_column(name, justify="left" if name == "Bound by" else "right", no_wrap=name != "Bound by")
    return table


def _cells(row) -> tuple[str, ...]:
    if row.share is None:
        return _short(row.time_ms), "", "", "", "", row.note
    bound = row.bound if row.bound == "compute" else f"{'cache' if row.cached else row.bound}"
    speed = f"{row.gflops:.3g}" if row.gflops else "0"
    roof = f"{row.roof_gflops:.3g}" if row.roof_gflops else "0"
    share = f"{row.share:.0%}" if row.share >= 0.1 else f"{row.share:.1%}"
    kind = f", {row.kind}" if row.bound == "compute" else ""
    return _short(row.time_ms), speed, f"{row.intensity:.3g}", roof, share, bound + kind


def _short(time_ms: float) -> str:
    return ms(time_ms) if time_ms >= 0.001 or time_ms == 0 else f"{1000 * time_ms:.2g} µs"
