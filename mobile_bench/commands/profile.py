"""`mobile-bench profile`: what each operation of a file costs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_bench.commands.shared import (
    File,
    Inventory,
    Json,
    OneTarget,
    Spec,
    Threads,
    ms,
    place_for,
    print_json,
    say_stage,
)
from mobile_bench.errors import unknown_name

_VIEWS = {"op": "Operation", "type": "Type of operation", "layer": "Layer"}


def profile(
    file: File,
    threads: Threads = None,
    target: OneTarget = None,
    inventory: Inventory = None,
    runs: Annotated[int, typer.Option(help="Inferences to average over")] = 50,
    top: Annotated[int, typer.Option(min=0, help="Rows to show, the dearest; 0 for all, in the order they run")] = 15,
    by: Annotated[str, typer.Option(help="What a row is: op, type or layer")] = "op",
    input_spec: Spec = "",
    seed: Annotated[int, typer.Option(help="Seed of the random input")] = 0,
    as_json: Json = False,
) -> None:
    """Show where the time of an inference goes: by operation, by type of operation or by layer.

    It needs nothing but ai-edge-litert 2.3 or later, on the CPU; by adb benchmark_model's own profile is read. The
    profiler costs time itself: use the shares, and `mobile-bench run` for how fast the file is.

    Which layers are worth making smaller?

        mobile-bench profile model.tflite --by layer

    Exit code 0: profiled; 1: the runtime crashed, or the device cannot be reached; 2: the file, an option or the
    runtime cannot be used; 130: interrupted.
    """
    from mobile_bench import records
    from mobile_bench.inputs import InputSpec, override
    from mobile_bench.interpreter import check_is_tflite
    from mobile_bench.metadata import recorded_spec
    from mobile_bench.profile import profile as profile_file

    if by not in _VIEWS:
        raise unknown_name("view", by, _VIEWS)
    check_is_tflite(file)
    spec = recorded_spec(file)
    if input_spec.strip():
        spec = override(spec or InputSpec(1, 1, 3), input_spec)
    place = place_for(target, inventory, threads, None)
    found = profile_file(
        file, place.target, connection=place.connection, runs=runs, spec=spec, seed=seed, on_progress=say_stage
    )
    if as_json:
        print_json({"schema_version": records.SCHEMA_VERSION, "profile": asdict(found)})
        return
    console = Console()
    console.print(_profile_table(file, found, by, top))
    console.print(_footer(found), markup=False, highlight=False)


def _profile_table(file: Path, found, by: str, top: int) -> Table:
    rows = {"op": found.ops, "type": found.by_type, "layer": found.by_layer}[by]
    dearest = sorted(rows, key=lambda row: -row.avg_ms)[:top] if top else rows
    left = f", the dearest {len(dearest)} of {len(rows)}" if len(dearest) < len(rows) else ""
    table = Table(title=f"{escape(str(file))}{left}", title_justify="left")
    if by == "op":
        for name in ("#", _VIEWS[by], "Layer", "By"):
            table.add_column(name, justify="right" if name == "#" else "left")
        cells = lambda op: (str(op.index), escape(op.node_type), escape(op.layer), op.delegate or "runtime")
    else:
        table.add_column(_VIEWS[by])
        table.add_column("Steps", justify="right")
        cells = lambda group: (escape(group.name or "(not known)"), str(group.count))
    table.add_column("Average", justify="right", no_wrap=True)
    table.add_column("Share", justify="right", no_wrap=True)
    for row in dearest:
        table.add_row(*cells(row), ms(row.avg_ms) if row.avg_ms >= 0.001 else "<0.001 ms", f"{row.share:.1%}")
    return table


def _footer(found) -> str:
    part = found.total_ms / found.unprofiled_median_ms if found.unprofiled_median_ms else 0.0
    return "\n".join(
        (
            f"Sum of the steps: {ms(found.total_ms)}, {part:.0%} of the median of {ms(found.unprofiled_median_ms)} "
            f"without the profiler ({ms(found.profiled_median_ms)} with it, which adds work of its own)",
            f"Measured: {found.runs} runs, {found.threads} thread(s), {found.runtime}",
            f"Delegate: {found.delegate_note}",
            f"Layers: {found.layer_note}",
        )
    )
