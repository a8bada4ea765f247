"""What the commands share: their common options, and how a table, a number and a line to the user look."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_bench.cli_support import visible
from mobile_bench.errors import InputError

if TYPE_CHECKING:
    from mobile_bench.inputs import InputSpec
    from mobile_bench.records import Delegate
    from mobile_bench.targets import Place

File = Annotated[Path, typer.Argument(help="A .tflite file", metavar="FILE.tflite", show_default=False)]
Runtime = Annotated[
    Optional[str],  # noqa: UP045 - Typer reads this form in every version
    typer.Option(help="auto, ai-edge-litert or tflite-runtime [default: the inventory's, or auto]", show_default=False),
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Threads the runtime may use [default: the inventory's, or 1]", show_default=False),
]
OneTarget = Annotated[
    Optional[list[str]],  # noqa: UP045 - a list, so that a second one is seen
    typer.Option(
        "--target", metavar="TEXT", show_default=False,
        help="Where: local, ssh://user@host, adb:SERIAL, or a name in targets.toml [default: local]",
    ),
]  # fmt: skip
Inventory = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="A TOML file of targets [default: targets.toml here, if there]", show_default=False),
]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output, everything else on standard error")
]
Spec = Annotated[
    str,
    typer.Option(
        help="How the model is fed where the file does not say: scaling=raw|unit|signed|torch|caffe, size=, "
        "resize=stretch|crop, order=rgb|bgr, head=softmax|logits|sigmoid, or a .json file",
        show_default=False,
    ),
]


Accelerator = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="cpu, gpu, edgetpu, external, or by adb nnapi [default: the inventory's, or cpu]", show_default=False
    ),
]
Library = Annotated[
    str, typer.Option("--delegate", help="The delegate's library on the device, for external", show_default=False)
]
DelegateOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--delegate-option", help="KEY=VALUE; may be given several times", show_default=False),
]
Fallback = Annotated[bool, typer.Option("--allow-fallback", help="The CPU may run what the accelerator does not take")]


Reference = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="A .tflite whose answers on the CPU count as right [default: the file itself]", show_default=False
    ),
]


References = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(
        "--reference", show_default=False,
        help="With an accelerator, a .tflite whose answers on the CPU count as right; once for each file, in their "
        "order [default: the files themselves]",
    ),
]  # fmt: skip


def delegate_of(
    library: str, options: list[str] | None, allow_fallback: bool, reference: Path | None = None
) -> Delegate:
    """What the command line says of a delegate."""
    from mobile_bench.records import Delegate

    pairs = {}
    for text in options or ():
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InputError("A delegate's option has another form", received=repr(text), allowed="KEY=VALUE")
        pairs[key] = value
    return Delegate(library, pairs, allow_fallback, str(reference) if reference else "")


def places_for(
    targets: list[str], inventory: Path | None, threads: int | None, runtime: str | None,
    accelerator: str | None = None,
) -> list[Place]:  # fmt: skip
    """The places that were asked for; what the command line says of them goes before the inventory."""
    from mobile_bench.targets import find_places

    given = {"threads": threads, "runtime": runtime, "accelerator": accelerator}
    given = {name: value for name, value in given.items() if value is not None}
    return [replace(p, target=replace(p.target, **given)) for p in find_places(targets, inventory)]


def place_for(targets: list[str] | None, *options) -> Place:
    """The one place of a command that takes one. options: those of `places_for`."""
    if targets and len(targets) > 1:
        raise InputError(
            "This command takes one target", received=", ".join(targets), allowed="one --target",
            next_step="Call it once for each; run takes several at once",
        )  # fmt: skip
    (place,) = places_for(targets or ["local"], *options)
    return place


def table(title: str, rows: dict[str, str]) -> Table:
    """Names and values as they are: brackets in a file's name are no markup."""
    table = Table(title=escape(visible(title)), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    return table


def ms(value: float) -> str:
    """Milliseconds to four digits: '0.2849 ms', '12.53 ms', '1042 ms'."""
    if value >= 1000:
        return f"{value:.0f} ms"
    return f"{value:.{3 if value >= 1 else 4}g} ms" if value < 10 else f"{value:.4g} ms"


def variant_folder(file: Path, save: bool | None) -> Path | None:
    """Where the record goes: the folder of the study variant that this very file is, or None."""
    from mobile_bench.errors import Problem
    from mobile_bench.files import sha256_of
    from mobile_bench.store import read_entry

    if save is False:
        return None
    folder = file.resolve().parent
    if not (folder / "variant.json").is_file():
        if save:
            raise InputError(
                "There is no study variant to store the record with",
                received=file,
                allowed="a file beside its variant.json",
            )
        return None
    try:
        same = read_entry(folder).variant.sha256 == sha256_of(file)
    except Problem:
        same = False
    if not same and save:
        raise InputError("variant.json beside the file speaks of another file", received=file)
    if not same:
        say("not stored: variant.json beside the file speaks of another file", style="yellow")
    return folder if same else None


def warn_of_fit(file: Path, spec: InputSpec, shape: tuple[int, ...]) -> None:
    """Say that images of (height, width, channels) are made to fit the input: that changes what is measured."""
    if tuple(shape) != spec.shape:
        as_text = lambda sides: "x".join(map(str, sides[:2])) + (" gray" if sides[2] == 1 else " RGB")
        say(
            f"warning: {file.name} takes images of {as_text(spec.shape)}, the sample's are {as_text(shape)}: each is "
            "resized or converted; where it was trained on others, its accuracy is not that of the sample",
            style="yellow",
        )


def say_stage(message: dict, prefix: str = "") -> None:
    """One line a stage and no live display: redrawing would take time from a core that is being measured."""
    texts = {
        "load": "loading", "warm-up": "warming up", "timing": "timing {runs} runs",
        "round": "process {done}: median {median}{interval}",
    }  # fmt: skip
    median = ms(message["median_ms"]) if "median_ms" in message else ""
    text = message.get("text") or texts.get(message.get("stage", ""), "").format(**message, median=median)
    if text:
        say(prefix + text, style="dim")


def say_dim(text: str) -> None:
    say(text, style="dim")


def say(text: str, style: str = "") -> None:
    Console(stderr=True).print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)


def bar(label: str):

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bar():
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as progress:
            task = progress.add_task(label, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bar()


def print_json(value: dict) -> None:
    from mobile_bench.files import json_text

    print(json_text(value))
