"""`mobile-bench xray`: which operations of a file a delegate will take, and why not the others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_bench.commands.shared import File, Json, print_json, say

if TYPE_CHECKING:
    from mobile_bench.xray import XrayReport
    from mobile_bench.xray.report import Run

#: Below this many columns, a layer stands under its operation and a fix under its reason.
_WIDE = 120

DelegateName = Annotated[str, typer.Option("--delegate", help="cpu (XNNPACK), gpu or edgetpu", show_default=False)]
Backend = Annotated[
    str, typer.Option(help="For gpu: webgpu, opencl or opengl [default: the delegate's first]", show_default=False)
]
Ask = Annotated[
    bool, typer.Option("--ask", help="Ask the real delegate or compiler too, where this machine has it, and compare")
]
Save = Annotated[bool, typer.Option("--save", help="Store it beside the file as xray/DELEGATE.json, for the dashboard")]


def xray(
    file: File,
    delegate: DelegateName,
    backend: Backend = "",
    ask: Ask = False,
    save: Save = False,
    as_json: Json = False,
) -> None:
    """Show where each operation would run, why not on the delegate, and what would change that.

    For gpu and edgetpu the file is only read and held against the delegate's rules: no such device is needed. For cpu
    it is run once, in a process of its own, and the runtime itself says what XNNPACK took.

        mobile-bench xray model.tflite --delegate edgetpu

    Exit code 0: shown; 1: the file crashed the runtime; 2: the file or an option cannot be used, or is refused.
    """
    from mobile_bench import records
    from mobile_bench.xray import xray as look

    report = look(file, delegate, backend=backend, ask=ask)
    saved = _save(file, report) if save else None
    if as_json:
        print_json({"schema_version": records.SCHEMA_VERSION, "file": str(file), **report.to_dict(), "saved": saved})
    else:
        show(report, str(file))


def _save(file: Path, report: XrayReport) -> str:
    from mobile_bench.xray.record import write_record

    path = write_record(file, report)
    say(f"stored: {path}", style="dim")
    return str(path)


def show(report: XrayReport, title: str) -> None:
    """The report on standard output: a table of operations, then totals, notes and disagreements."""
    console = Console()
    console.print(_table(report, title, console.width >= _WIDE))
    for line in summary(report):
        console.print(line, markup=False, highlight=False)


def summary(report: XrayReport) -> Iterable[str]:
    """What is said of the file as a whole, a sentence a line."""
    from mobile_bench.xray.report import PLACES

    there, here = PLACES[report.delegate]
    pieces = "1 piece" if report.partitions == 1 else f"{report.partitions} pieces"
    yield f"{there}: {report.delegated} of {len(report.ops)} operations in {pieces}; {here}: {report.fallback}"
    yield f"Memory: {_size(report.weights_bytes)} of weights on {there}; activations {_size(report.activation_bytes)}"
    yield f"Asked: {report.asked}" if report.asked else "By rules alone: no delegate or compiler was asked"
    yield from (f"Note: {note}" for note in report.notes)
    yield from (f"Disagreement: {sentence}" for sentence in report.disagreements)


def _table(report: XrayReport, title: str, wide: bool) -> Table:
    from mobile_bench.xray.report import PLACES, runs_of

    table = Table(title=escape(title), title_justify="left")
    table.add_column("#", justify="right", no_wrap=True)
    names = ("Operation", "Layer", "Runs on", "Reason", "Fix") if wide else ("Operation", "Runs on", "Reason and fix")
    for name in names:
        table.add_column(name, overflow="fold", min_width=8 if name == "Runs on" else None)
    told: dict[tuple[str, str], str] = {}  # a reason is told in full once
    for run in runs_of(report.ops):
        first = run.ops[0]
        taken = first.runs_on == "delegate"
        place = f"[green]{PLACES[report.delegate][0]}[/]" if taken else f"[yellow]{PLACES[report.delegate][1]}[/]"
        name, layer = escape(run.name), escape(_layers(run))
        reason, fix = escape(first.reason), escape(first.fix)
        before = told.setdefault((reason, fix), run.place)
        if reason and before != run.place:
            reason, fix = f"[dim]as {before}[/]", ""
        if wide:
            table.add_row(run.place, name, layer, place, reason, fix)
        else:
            under = f"{name}\n[dim]{layer}[/]" if layer else name
            table.add_row(run.place, under, place, f"{reason}\n[dim]Fix:[/] {fix}" if fix else reason)
    return table


def _layers(run: Run) -> str:
    """The layer of a single operation; of several, the kinds of operations."""
    if len(run.ops) == 1:
        return run.ops[0].layer
    kinds = dict.fromkeys(op.op for op in run.ops)
    if run.ops[0].runs_on == "delegate" or len(kinds) == 1:
        return ""
    return ", ".join([*list(kinds)[:4], *(["…"] if len(kinds) > 4 else [])])


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
