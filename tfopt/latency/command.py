"""`tfopt latency`: what each layer of a model costs on a target by its numbers of channels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from mobile_bench.commands.shared import Json, Spec, ms, print_json, say
from mobile_bench.errors import InputError
from mobile_bench.records import SCHEMA_VERSION

if TYPE_CHECKING:
    from tfopt.latency.parts import Anatomy
    from tfopt.latency.table import Table

#: Beyond this the table and the whole model disagree so much that the user should know.
_DOUBTFUL = 1.5


def command(
    model: Annotated[str, typer.Argument(help="A .keras or .h5 file, a SavedModel folder, or keras:NAME")],
    target: Annotated[
        str, typer.Option(help="local, ssh://user@host, adb:SERIAL, or a name in targets.toml")
    ] = "local",
    scheme: Annotated[str, typer.Option(help="float32 or int8")] = "float32",
    threads: Annotated[int, typer.Option(help="Threads the runtime may use")] = 1,
    out: Annotated[Path | None, typer.Option(help="The table to write [default: MODEL-latency.json]")] = None,
    points: Annotated[int, typer.Option(help="Numbers of channels of each axis at which all pairs are measured")] = 4,
    seconds: Annotated[float, typer.Option(help="Of timing in each of three processes a batch")] = 2.0,
    force: Annotated[bool, typer.Option("--force", help="Measure anew and replace what is at --out")] = False,
    input_spec: Spec = "",
    trust: Annotated[bool, typer.Option("--trust", help="Run code that the model file carries")] = False,
    as_json: Json = False,
) -> None:
    """Measure a latency table for `channels: {latency: 0.5, table: TABLE}`. Trains nothing.

    Each layer becomes files of that layer alone with fewer and fewer channels, which are timed in turns on the target;
    the whole model is timed beside them. Stopped and run again, it takes up where it was; a finished table that still
    holds is shown and not measured again.

    tfopt latency mine.keras --target ssh://pi@raspberry.local --scheme int8 --threads 4 --out pi.json
    """
    _check(points, seconds)
    from tfopt.latency.micro import Place

    place = Place(target, scheme, threads)
    place.found()
    from mobile_bench.files import check_writable
    from tfopt import models
    from tfopt.convert import refuse_tflite
    from tfopt.latency import channels, fill
    from tfopt.latency.parts import anatomy
    from tfopt.latency.table import Setting

    refuse_tflite(model)
    out = out or Path(f"{Path(model.removeprefix('keras:')).stem}-latency.json")
    check_writable(out, model)
    source = f"{model}:random" if model.startswith("keras:") and model.count(":") == 1 else model
    loaded = models.load(source, input_spec=input_spec or None, trust=trust)
    found = anatomy(loaded.model)
    if force:
        out.unlink(missing_ok=True)
        out.with_name(f"{out.name}.partial").unlink(missing_ok=True)
    table = channels.is_current(out, found, Setting(target, scheme, threads))
    reused = table is not None
    if table is None:
        table = fill.measure(
            found, fill.file_of(loaded.model, loaded.spec, scheme), loaded.name, place, out, points=points,
            seconds=seconds, on_progress=_tell,
        )  # fmt: skip
    if as_json:
        facts = {"schema_version": SCHEMA_VERSION, "out": str(out), "reused": reused}
        print_json({**facts, **_facts(table, found)})
    else:
        _show(table, found, out, reused)


def _check(points: int, seconds: float) -> None:
    for name, value, least, most in (("--points", points, 2, 16), ("--seconds", seconds, 0.05, 600)):
        if not least <= value <= most:
            raise InputError(f"{name} is out of range", received=f"{value:g}", allowed=f"{least} to {most}")


def _tell(done: int, total: int, facts: dict) -> None:
    left = facts.get("seconds_left")
    say(f"{done} of {total}: {facts['what']}" + (f", about {left:.0f} s left" if left else ""), style="dim")


def _facts(table: Table, found: Anatomy) -> dict:
    from tfopt.latency.predict import Latency

    layers = Latency(found, table).layers(found.groups)
    known = table.to_dict()
    cells = sum(len(one["cells"]) for one in known.pop("families"))
    known = {name: known[name] for name in known if name not in ("format", "unit", "schema_version")}
    return {**known, "rest_ms": table.rest_ms, "cells": cells, "families": len(table.families), "layers_ms": layers}


def _show(table: Table, found: Anatomy, out: Path, reused: bool) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=120)
    facts = _facts(table, found)
    kinds = {part.layer: part for part in found.parts}
    grid = Grid(title=escape(f"{table.model} on {table.setting.target}, {table.setting.scheme}"), box=None)
    for name in ("layer", "kind", "channels", "time", "share"):
        grid.add_column(name, justify="right" if name in ("time", "share") else "left", overflow="fold")
    for layer, value in sorted(facts["layers_ms"].items(), key=lambda row: -row[1]):
        grid.add_row(escape(layer), *_row(kinds[layer], found), ms(value), f"{value / table.whole_ms:.0%}")
    grid.add_row("(all else)", "", "", ms(table.rest_ms), f"{table.rest_ms / table.whole_ms:.0%}")
    console.print(grid)
    lines = [
        f"whole model {ms(table.whole_ms)} [{ms(table.whole_low_ms)}, {ms(table.whole_high_ms)}], {facts['cells']} "
        f"cells of {facts['families']} kinds of layers",
        f"layers alone take {table.ratio:.2f} times what they take in the whole model; the table is scaled by that",
        f"{out}: {'it was there and still holds' if reused else 'written'}",
    ]
    if not 1 / _DOUBTFUL < table.ratio < _DOUBTFUL:
        lines.insert(
            2,
            "[yellow]warning:[/] that is far from 1: choices by this table are rough. Another load takes turns "
            "with a model of many milliseconds and spares single layers: measure on a quiet machine",
        )
    lines += [f"[yellow]warning:[/] {escape(warning)}" for warning in table.warnings]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _row(part, found: Anatomy) -> tuple[str, str]:
    from tfopt.latency.parts import in_words

    made = f" -> {part.made.of(found.groups)}" if part.made else ""
    return in_words(part.family), f"{part.read.of(found.groups)}{made}"
