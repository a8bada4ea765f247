"""`tfopt precheck`: what quantization-aware training would end in, layer by layer, before any training."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_bench.commands.shared import Json, Spec, print_json
from mobile_bench.records import SCHEMA_VERSION

_STYLES = {"int8": "green", "float": "yellow"}


def command(
    model: Annotated[str, typer.Argument(help="A .keras or .h5 file, a SavedModel folder, or keras:NAME")],
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Layers with a kernel to leave in float: name, pattern or type. Repeatable"),
    ] = None,
    input_spec: Spec = "",
    trust: Annotated[bool, typer.Option("--trust", help="Run code that the model file carries")] = False,
    as_json: Json = False,
) -> None:
    """Say of each layer whether it will compute in whole numbers after quantization-aware training. Trains nothing.

    The model, with simulated int8 and ranges from random images, is given to the converter: what its file computes in
    whole numbers, the trained one will too.

    tfopt precheck mine.keras

    tfopt precheck keras:MobileNetV3Small --exclude 'conv*' --json

    Exit code 0: all in whole numbers, but for what --exclude leaves out; 1: some layers in float; 2: bad input.
    """
    from tfopt import models
    from tfopt.convert import refuse_tflite
    from tfopt.tfmot import foresight

    refuse_tflite(model)
    console = Console(stderr=True)
    with console.status("rebuilding, calibrating and converting"):
        loaded = models.load(model, input_spec=input_spec or None, trust=trust)
        found = foresight.foresee(loaded.model, loaded.spec, tuple(exclude or ()))
    floats = [one for one in found.layers if one.becomes == "float"]
    if as_json:
        layers = [asdict(one) for one in found.layers]
        tensors = [asdict(tensor) for tensor in found.floats]
        print_json({"schema_version": SCHEMA_VERSION, "model": model, "layers": layers, "float_tensors": tensors})
    else:
        Console().print(_table(loaded.name, found))
        whole = sum(one.becomes == "int8" for one in found.layers)
        end = f"{len(floats)} in float, {len(found.floats)} float tensors" if floats else "none in float"
        Console().print(f"{whole} layers in whole numbers, {end}", highlight=False)
    if floats and not exclude:
        raise typer.Exit(1)


def _table(title: str, found) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for name in ("Layer", "Type", "Becomes", "Operations", "Why"):
        table.add_column(name, overflow="fold", no_wrap=name == "Becomes")
    for one in found.layers:
        style = _STYLES.get(one.becomes, "dim")
        ops = ", ".join(dict.fromkeys(one.ops))
        table.add_row(escape(one.layer), one.kind, f"[{style}]{one.becomes}[/]", ops, escape(one.why))
    return table
