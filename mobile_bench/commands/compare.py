"""`mobile-bench compare` and `mobile-bench gate`: is one file faster than another, and may it replace it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mobile_bench.commands.shared import (
    Accelerator,
    DelegateOption,
    Fallback,
    File,
    Inventory,
    Json,
    Library,
    OneTarget,
    References,
    Runtime,
    Spec,
    Threads,
    bar,
    delegate_of,
    ms,
    place_for,
    print_json,
    say,
    say_dim,
    table,
    warn_of_fit,
)
from mobile_bench.errors import InputError

if TYPE_CHECKING:
    from mobile_bench.targets import Place

Seconds = Annotated[float, typer.Option(help="How long to measure, process starts included")]
Batch = Annotated[int, typer.Option(help="Images per inference")]
Seed = Annotated[int, typer.Option(help="Seed of the random input")]


def compare(
    files: Annotated[
        list[Path], typer.Argument(help="Two files or more; each is set against the first", show_default=False)
    ],
    threads: Threads = None,
    seconds: Seconds = 20.0,
    rounds: Annotated[int, typer.Option(help="Fresh processes, 6 or more")] = 12,
    level: Annotated[
        float, typer.Option(help="The chance of a verdict where there is no difference, for the whole comparison")
    ] = 0.02,
    runtime: Runtime = None,
    target: OneTarget = None,
    inventory: Inventory = None,
    accelerator: Accelerator = None,
    library: Library = "",
    delegate_option: DelegateOption = None,
    allow_fallback: Fallback = False,
    reference: References = None,
    batch: Batch = 1,
    seed: Seed = 0,
    out: Annotated[
        Optional[Path],  # noqa: UP045 - Typer reads this form in every version
        typer.Option(help="Write everything, raw samples too, to this JSON file", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which file is faster, or that it cannot be told.

    The files take turns of a few milliseconds in one process, in random order, and that in a dozen fresh
    processes; the interval of the ratio rests on the processes.

        mobile-bench compare float32.tflite int8.tflite
        mobile-bench compare float32.tflite int8.tflite --target ssh://pi@raspberry.local

    Two files for the Edge TPU, each with the one that it was compiled from:

        mobile-bench compare a_edgetpu.tflite b_edgetpu.tflite --accelerator edgetpu --reference a.tflite
        --reference b.tflite

    Exit code 0 whatever the verdict; 1: a process crashed, or the device cannot be reached; 2: a file or an option
    cannot be used; 130: interrupted.
    """
    from mobile_bench.files import check_writable, write_json
    from mobile_bench.records import SCHEMA_VERSION

    check_writable(out, *files, *(reference or ()))
    place = place_for(target, inventory, threads, runtime, accelerator)
    delegate = delegate_of(library, delegate_option, allow_fallback)
    found = _compare(files, place, seconds, rounds, level, batch, seed, delegate, reference)
    if out:
        write_json(out, {"schema_version": SCHEMA_VERSION, "files": [str(file) for file in files], **asdict(found)})
        say(f"written to {out}")
    if as_json:
        facts = asdict(found)
        del facts["blocks"]
        print_json({"schema_version": SCHEMA_VERSION, "files": [str(file) for file in files], **facts})
    else:
        Console().print(_table(files, found))
    for warning in found.warnings:
        say(f"warning: {warning}", style="yellow")


def gate(
    file: File,
    against: Annotated[Path, typer.Option(help="The .tflite that is in use now", show_default=False)],
    max_slower: Annotated[float, typer.Option(help="Allowed rise of the latency, in percent")] = 3.0,
    max_larger: Annotated[float, typer.Option(help="Allowed rise of the file size, in percent")] = 1.0,
    max_drop: Annotated[float, typer.Option(help="Allowed drop of the top-1 accuracy, in points")] = 0.5,
    sample: Annotated[
        Optional[Path],  # noqa: UP045 - Typer reads this form in every version
        typer.Option(help="An .npz of images and labels; without it accuracy is not judged", show_default=False),
    ] = None,
    input_spec: Spec = "",
    threads: Threads = None,
    seconds: Seconds = 20.0,
    runtime: Runtime = None,
    target: OneTarget = None,
    inventory: Inventory = None,
    accelerator: Accelerator = None,
    library: Library = "",
    delegate_option: DelegateOption = None,
    allow_fallback: Fallback = False,
    reference: References = None,
    batch: Batch = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Judge whether a new file may replace the one in use: latency, size and accuracy, for your CI.

        mobile-bench gate new.tflite --against shipped.tflite --sample sample.npz

    Without --sample accuracy is not judged at all. To exclude a drop of half a point takes about 600 images where
    both files are right on the same ones, and 1,300 where they differ on one in a hundred.

    With --accelerator both files are timed and answer on it. --reference comes twice then, for the new file and for
    the one in use.

    Exit code 0: ACCEPT; 1: REGRESSION; 2: a file or an option cannot be used; 3: ANOMALOUS, it cannot be told
    (too noisy, too few images, a file crashed, or the device went away); 130: interrupted.
    """
    from mobile_bench import gate as gates
    from mobile_bench.compare import reference_files
    from mobile_bench.errors import JobFailed, TransportError
    from mobile_bench.evaluate import read_sample
    from mobile_bench.interpreter import check_is_tflite
    from mobile_bench.records import SCHEMA_VERSION

    place = place_for(target, inventory, threads, runtime, accelerator)
    delegate = delegate_of(library, delegate_option, allow_fallback)
    limits = gates.Limits(max_slower / 100, max_larger / 100, max_drop)
    for path in (file, against):
        check_is_tflite(path)
    reference_files(reference or (), (file, against), place.target)
    if sample:
        read_sample(sample)
    elif input_spec.strip():
        raise InputError("--input-spec is for accuracy", received=input_spec, next_step="Add --sample sample.npz")
    checks = [gates.judge_size(file.stat().st_size, against.stat().st_size, limits.larger)]
    if sample:
        checks.append(_accuracy(file, against, sample, input_spec, place, limits.points, delegate))
    try:
        # The options name the new file first; it is set against the one in use.
        references = reference and reference[::-1]
        found = _compare([against, file], place, seconds, 12, 0.02, batch, seed, delegate, references)
        checks.append(gates.judge_latency(found.verdicts[0], limits.slower))
    except (JobFailed, TransportError) as failure:
        found = None
        checks.append(gates.Check("latency", gates.ANOMALOUS, str(failure)))
    verdict = gates.overall(checks)
    if as_json:
        print_json(
            {"schema_version": SCHEMA_VERSION, "verdict": verdict, "checks": [asdict(check) for check in checks]}
        )
    else:
        rows = {check.name.capitalize(): f"{check.verdict}: {check.text}" for check in checks}
        Console().print(table(f"{verdict}: {file} against {against}", rows))
    for warning in found.warnings if found else ():
        say(f"warning: {warning}", style="yellow")
    if not sample:
        say("accuracy was not judged: give labelled images with --sample sample.npz", style="yellow")
    raise typer.Exit(gates.EXIT_CODES[verdict])


def _compare(
    files, place: Place, seconds: float, rounds: int, level: float, batch: int, seed: int, delegate, references
):
    from mobile_bench.compare import compare as compare_files
    from mobile_bench.interpreter import check_is_tflite
    from mobile_bench.metadata import recorded_spec

    for file in files:
        check_is_tflite(file)
    with bar("comparing") as progress:

        def relay(message: dict) -> None:
            if message.get("stage") == "round":
                progress(message["done"], message["total"])
            elif message.get("text"):
                say_dim(message["text"])

        return compare_files(
            files, place.target, connection=place.connection, seconds=seconds, rounds=rounds, level=level, batch=batch,
            seed=seed, specs=[recorded_spec(file) for file in files], delegate=delegate, references=references,
            on_progress=relay,
        )  # fmt: skip


def _accuracy(file: Path, against: Path, sample: Path, input_spec: str, place: Place, points: float, delegate):
    from mobile_bench import gate as gates
    from mobile_bench.errors import JobFailed, TransportError
    from mobile_bench.evaluate import evaluate_apart, read_sample
    from mobile_bench.metadata import find_spec

    images, labels = read_sample(sample)
    answers = []
    for path in (file, against):
        spec = find_spec(path, input_spec, shape=images.shape[1:])
        warn_of_fit(path, spec, images.shape[1:])
        try:
            with bar(f"evaluating {path.name}") as progress:
                found = evaluate_apart(
                    path, sample, spec, place.target, connection=place.connection, delegate=delegate,
                    progress=progress, tell=say_dim,
                )  # fmt: skip
        except (JobFailed, TransportError) as failure:
            return gates.Check("accuracy", gates.ANOMALOUS, str(failure))
        answers.append(found.predictions)
    return gates.judge_accuracy(*answers, labels, points)


def _table(files: list[Path], found) -> Table:
    title = escape(f"Against {files[0]}") + f" ({ms(found.verdicts[0].reference_ms)})"
    shown = Table(title=title, title_justify="left")
    for name in ("File", "Verdict", "Median", "Ratio", f"{found.verdicts[0].confidence:.1%} interval"):
        shown.add_column(name)
    for file, verdict in zip(files[1:], found.verdicts):
        words = {"faster": f"{1 / verdict.ratio:.3f}x faster", "slower": f"{verdict.ratio:.3f}x slower"}
        shown.add_row(
            escape(str(file)), words.get(verdict.verdict, verdict.verdict), ms(verdict.median_ms),
            f"{verdict.ratio:.4f}", f"{verdict.low:.4f} to {verdict.high:.4f}",
        )  # fmt: skip
    device = found.device
    shown.caption = (
        f"{found.rounds} processes, {found.turns} turns in {found.seconds:.1f} s, {found.target.threads} thread(s), "
        f"{device.get('runtime')} {device.get('runtime_version')} on {device.get('cpu', 'an unknown CPU')}"
    )
    shown.caption_justify = "left"
    return shown
