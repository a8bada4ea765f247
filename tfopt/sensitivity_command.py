"""`tfopt sensitivity`: how much each layer can lose, as a table, JSON and a picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated
from xml.sax.saxutils import escape as xml

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_bench.commands.shared import Json, Spec, print_json
from mobile_bench.errors import InputError
from mobile_bench.records import SCHEMA_VERSION
from tfopt.sensitivity import IMAGES, LEVELS, Sensitivity, analyze

_CELL, _ROW, _LEFT, _TOP = 64, 22, 260, 86


def command(
    model: Annotated[str, typer.Argument(help="A .keras or .h5 file, a SavedModel folder, or keras:NAME")],
    data: Annotated[str, typer.Option(help="Images whose validation split is answered; see tfopt study --help")],
    max_drop: Annotated[float, typer.Option(help="Points of accuracy that one layer alone may cost")] = 1.0,
    level: Annotated[
        list[float] | None,
        typer.Option(help="A sparsity to try. Repeatable [default: 0.1 to 0.9 and 0.95]", show_default=False),
    ] = None,
    images: Annotated[int, typer.Option(help="Validation images, class-balanced", min=1)] = IMAGES,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Layers to leave out: name, pattern or type. Repeatable")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="An .svg to draw it into")] = None,
    input_spec: Spec = "",
    trust: Annotated[bool, typer.Option("--trust", help="Run code that the model file carries")] = False,
    as_json: Json = False,
) -> None:
    """Prune one layer at a time, train nothing, and show what it costs on validation images.

    The last column is what a recipe with `prune: {sparsity: sensitivity}` would give each layer. What one layer loses
    alone comes back with training, and what several lose together adds up.

    tfopt sensitivity mine.keras --data photos/ --max-drop 1 --picture layers.svg
    """
    from mobile_bench.files import check_writable, write_bytes
    from tfopt import data as data_sets
    from tfopt import models
    from tfopt.convert import refuse_tflite

    if not 0 <= max_drop <= 100:
        raise InputError("--max-drop is out of range", received=f"{max_drop:g}", allowed="0 to 100 points")
    if picture:
        if picture.suffix != ".svg":
            raise InputError("The picture is an SVG", received=picture, allowed="a name that ends in .svg")
        check_writable(picture)
    refuse_tflite(model)
    console = Console(stderr=True)
    with console.status(f"reading {escape(data)}") as status:
        found = data_sets.load(data)
        loaded = models.load(model, input_spec=input_spec or None, trust=trust)
        models.check_classes(loaded, found.class_names)
        result = analyze(
            loaded.model, found["validation"], loaded.spec, levels=level or LEVELS, images=images,
            exclude=exclude or (),
            progress=lambda done, total, facts: status.update(f"{escape(facts['what'])}: {done} of {total}"),
        )  # fmt: skip
    if picture:
        write_bytes(picture, draw(model, result, max_drop / 100).encode())
    if as_json:
        facts = {"schema_version": SCHEMA_VERSION, "model": model, "max_drop": max_drop / 100}
        print_json({**facts, **result.to_dict(max_drop / 100), "picture": str(picture) if picture else None})
    else:
        show(model, result, max_drop / 100)


def show(model: str, found: Sensitivity, max_drop: float) -> None:
    """The table: a kernel a row, the points of accuracy that each sparsity costs."""
    console = Console() if sys.stdout.isatty() else Console(width=150)
    title = f"{model}: {found.accuracy:.2%} on {found.images} validation images; points lost at each sparsity"
    table = Table(title=escape(title), title_justify="left", box=None)
    table.add_column("layer", overflow="fold", min_width=12)
    for name in ("weights", *(f"{level:.0%}" for level in found.levels), "can lose"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.layers:
        drops = [f"{100 * drop:.1f}" for drop in row.drops(found.accuracy).values()]
        table.add_row(escape(row.layer), f"{row.weights:,}", *drops, f"{row.most(found.accuracy, max_drop):.0%}")
    console.print(table)
    weights = sum(row.weights for row in found.layers)
    zeros = sum(row.weights * row.most(found.accuracy, max_drop) for row in found.layers)
    console.print(
        f"With at most {100 * max_drop:g} points a layer: {zeros / weights:.0%} of all kernels' weights. One image "
        f"is {100 / found.images:.2g} points.",
        highlight=False,
    )


def draw(model: str, found: Sensitivity, max_drop: float) -> str:
    """An SVG document: a row a kernel, a cell a sparsity, the redder the more it costs; a frame: what it can lose."""
    width = _LEFT + _CELL * len(found.levels) + 30
    height = _TOP + _ROW * len(found.layers) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12" fill="#1f2933">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(16, 26, f"What each layer of {Path(model).name} can lose", 'font-size="16" font-weight="600"'),
        _text(16, 46, f"{found.accuracy:.2%} on {found.images} validation images; points lost, one layer at a time"),
    ]
    for column, level in enumerate(found.levels):
        parts.append(_text(_LEFT + (column + 0.5) * _CELL, _TOP - 8, f"{level:.0%}", 'text-anchor="middle"'))
    for number, row in enumerate(found.layers):
        y = _TOP + number * _ROW
        name = row.layer if len(row.layer) <= 36 else f"{row.layer[:17]}…{row.layer[-18:]}"
        parts.append(_text(_LEFT - 8, y + 15, name, 'text-anchor="end"'))
        most = row.most(found.accuracy, max_drop)
        for column, (level, drop) in enumerate(zip(found.levels, row.drops(found.accuracy).values())):
            x = _LEFT + column * _CELL
            shade = min(1.0, max(0.0, drop / max(found.accuracy, 1e-9)) * 2)
            other = round(255 - 175 * shade)
            frame = ' stroke="#0b62a4" stroke-width="2"' if level == most else ""
            parts.append(
                f'<rect x="{x + 1.5}" y="{y + 1.5}" width="{_CELL - 3}" height="{_ROW - 3}" '
                f'fill="rgb(255,{other},{other})"{frame}/>'
            )
            parts.append(_text(x + _CELL / 2, y + 15, f"{100 * drop:.1f}", 'text-anchor="middle"'))
    note = f"Framed: the most for at most {100 * max_drop:g} points"
    parts.append(_text(_LEFT, height - 10, note, 'fill="#0b62a4"'))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{xml(text)}</text>'
