"""`mobile-bench sustained`: does a file stay as fast for minutes, and what energy does an inference take?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

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
    from mobile_bench.sustained import Sustained, SustainedSummary, Window

_CHART_COLUMNS, _CHART_ROWS, _CHART_MARGIN = 72, 6, 20
_BLOCKS = " ▁▂▃▄▅▆▇█"
_SAY_EVERY_S = 30.0


def sustained(
    file: File,
    seconds: Annotated[float, typer.Option(help="How long it runs")] = 300.0,
    threads: Threads = None,
    fps: Annotated[
        Optional[float],  # noqa: UP045 - Typer reads this form in every version
        typer.Option(help="Inferences a second [default: back to back]", show_default=False),
    ] = None,
    energy: Annotated[
        str, typer.Option(help="auto, rapl, battery, none, or FILE.csv, the log of a meter that spans the run")
    ] = "auto",
    idle_seconds: Annotated[float, typer.Option(help="Measure the idle machine's power for so long before")] = 3.0,
    target: OneTarget = None,
    inventory: Inventory = None,
    input_spec: Spec = "",
    runtime: Runtime = None,
    seed: Annotated[int, typer.Option(help="Seed of the random input")] = 0,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write everything here as JSON, every second of it", show_default=False),
    ] = None,
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw latency over time into this .svg file", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a file for minutes: latency over time, when it throttles, and the energy of an inference.

    Devices without a fan are fast for a minute. Five minutes back to back, and the picture:

        mobile-bench sustained model.tflite --picture latency.svg

    As a camera would use it, with the power that an external meter logs meanwhile:

        mobile-bench sustained model.tflite --fps 30 --seconds 600 --energy meter.csv

    On a board or a phone, which runs and is asked for its temperature and energy there:

        mobile-bench sustained model.tflite --target ssh://pi@raspberry.local --seconds 600

    Ctrl-C (or SIGTERM) keeps, shows and writes what was measured until then. Energy is read from the processor's
    counters (RAPL), a battery that discharges or a meter's log, whose columns are time (Unix seconds or ISO 8601) and
    power in W, or volts and amps.
    Without one of these it says 'not measured': nothing is guessed.

    Exit code 0: measured, throttled or not; 1: it crashed or the device went away (what was measured is shown); 2:
    the file or an option cannot be used; 130: interrupted.
    """
    from mobile_bench.files import check_writable, write_bytes, write_json
    from mobile_bench.inputs import InputSpec, override
    from mobile_bench.metadata import recorded_spec
    from mobile_bench.records import SCHEMA_VERSION
    from mobile_bench.sustained import summarize_sustained, sustain

    if picture and picture.suffix.lower() != ".svg":
        raise InputError("A picture of that kind cannot be drawn", received=picture, allowed="a file named .svg")
    check_writable(out, file, energy)
    check_writable(picture, file, out)
    if not 0 <= seed < 2**32:
        raise InputError("seed is out of range", received=seed, allowed="0 to 4294967295")
    spec = recorded_spec(file)
    if input_spec.strip():
        spec = override(spec or InputSpec(1, 1, 3), input_spec)
    place = place_for(target, inventory, threads, runtime)
    found = sustain(
        file, seconds=seconds, target=place.target, connection=place.connection, fps=fps, energy=energy,
        idle_s=idle_seconds, spec=spec, seed=seed, on_progress=_teller(),
    )  # fmt: skip
    summary = summarize_sustained(found)
    whole = {"schema_version": SCHEMA_VERSION, "sustained": asdict(found), "summary": asdict(summary)}
    if as_json:
        print_json(whole)
    else:
        console = Console()
        columns = max(10, min(_CHART_COLUMNS, console.width - _CHART_MARGIN))
        console.print(chart(found.windows, summary, columns), markup=False, highlight=False)
        console.print(table(str(file), _rows(found, summary, energy)))
    for warning in found.warnings:
        say(f"warning: {warning}", style="yellow")
    if out:
        write_json(out, whole)
        say(f"every second is in {out}")
    if picture:
        from mobile_bench.sustained_picture import picture as draw

        write_bytes(picture, draw(str(file), found, summary).encode())
        say(f"the picture is {picture}")
    if found.status != "ok":
        reason = f": {found.reason}" if found.status == "failed" else ""
        say(f"{found.status} after {summary.measured_s:.0f} of {found.seconds:g} s{reason}", style="bold red")
        raise typer.Exit(INTERRUPTED if found.status == "interrupted" else 1)


def chart(windows: Sequence[Window], summary: SustainedSummary, columns: int = _CHART_COLUMNS) -> str:
    """Latency over time in block characters, from 0 up: each column the median of its seconds' medians."""
    count = len(windows)
    columns = min(columns, count)
    cuts = [round(place * count / columns) for place in range(columns + 1)]
    values = [statistics.median(w.median_ms for w in windows[a:b]) for a, b in pairwise(cuts)]
    top = max(values) or 1.0
    steps = len(_BLOCKS) - 1
    heights = [max(1, round(value / top * _CHART_ROWS * steps)) for value in values]
    lines = []
    for row in reversed(range(_CHART_ROWS)):
        label = ms(top) if row == _CHART_ROWS - 1 else ""
        cells = "".join(_BLOCKS[min(steps, max(0, height - row * steps))] for height in heights)
        lines.append(f"{label:>10} │{cells}")
    end_s = windows[-1].start_s + windows[-1].seconds
    lines.append(f"{'0 ms':>10} └{'─' * columns} {end_s:.0f} s")
    if summary.onset:
        column = next(place for place in range(columns) if cuts[place + 1] > summary.onset.window)
        lines.append(f"{'':>10}  {' ' * column}▲ slower from {summary.onset.at_s:.0f} s on")
    return "\n".join(lines)


def _rows(found: Sustained, summary: SustainedSummary, asked: str) -> dict[str, str]:
    rows = {
        "First 10 windows": f"median {ms(summary.first_ms)}",
        "Last 10 windows": f"median {ms(summary.last_ms)} ({summary.change:+.1%})",
        "Worst window": f"median {ms(summary.worst_ms)}, at {summary.worst_at_s:.0f} s",
        "Throttling": _verdict(summary),
        "Inferences": f"{summary.inferences:,} in {summary.measured_s:.1f} s, {summary.per_second:,.1f} a second",
    }
    if found.fps:
        rows["Pace"] = f"{found.fps:g} a second; {summary.missed:,} turns missed"
    for name, pair, unit in (("Temperature", summary.temperature_c, "°C"), ("Frequency", summary.frequency_mhz, "MHz")):
        rows[name] = f"{pair[0]:.0f} {unit} at first, {pair[1]:.0f} {unit} at the end" if pair else "not readable here"
    rows["Energy"] = _energy(found, asked)
    device = found.device
    rows["Measured"] = (
        f"{found.target.threads} thread(s), {device.get('runtime')} {device.get('runtime_version')} on "
        f"{device.get('cpu', 'an unknown CPU')}, from {found.started_at}"
    )
    return rows


def _verdict(summary: SustainedSummary) -> str:
    if not summary.judged:
        return f"too short to say: {summary.windows} windows, 12 are needed"
    if summary.onset is None:
        return "none: no lasting change to slower by more than 3%"
    onset = summary.onset
    return f"from {onset.at_s:.0f} s on, {onset.slower:.1%} slower than at first (p = {onset.p_value:.3f})"


def _energy(found: Sustained, asked: str) -> str:
    from mobile_bench.energy import NOT_MEASURED

    used = found.energy
    if used is None and asked == "auto":
        return f"{NOT_MEASURED}: no RAPL and no battery that discharges can be read there; --energy takes a meter's log"
    if used is None:
        return NOT_MEASURED
    net = "" if used.net_mj is None else f", {used.net_mj:.4g} mJ above idling ({used.idle_w:.3g} W)"
    watts = used.gross_j / used.seconds
    return f"{used.gross_mj:.4g} mJ an inference{net}; {used.gross_j:.4g} J at {watts:.3g} W on average ({used.source})"


def _teller():
    """What the run says on its way: the stages, and a line every half minute."""
    said_s = 0.0

    def tell(message: dict) -> None:
        nonlocal said_s
        window = message.get("window")
        if window and window["start_s"] - said_s >= _SAY_EVERY_S:
            said_s = window["start_s"]
            say(f"{said_s:.0f} s: median {ms(window['median_ms'])}", style="dim")
        say_stage(message)

    return tell
