"""`mobile-bench evaluate`: what a file answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from mobile_bench.commands.shared import (
    Accelerator,
    DelegateOption,
    Fallback,
    File,
    Inventory,
    Json,
    Library,
    OneTarget,
    Reference,
    Runtime,
    Spec,
    bar,
    delegate_of,
    place_for,
    print_json,
    say,
    say_dim,
    table,
    warn_of_fit,
)


def evaluate(
    file: File,
    sample: Annotated[
        Path, typer.Option(help="An .npz of images (uint8, NHWC, RGB) and labels (int32)", show_default=False)
    ],
    input_spec: Spec = "",
    workers: Annotated[
        Optional[int],  # noqa: UP045 - Typer reads this form in every version
        typer.Option(
            help="Interpreters at work at once [default: chosen by timing the first images]", show_default=False
        ),
    ] = None,
    runtime: Runtime = None,
    target: OneTarget = None,
    inventory: Inventory = None,
    accelerator: Accelerator = None,
    library: Library = "",
    delegate_option: DelegateOption = None,
    allow_fallback: Fallback = False,
    reference: Reference = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a file on a sample of labelled images.

    The same code runs here and on a board, so the two numbers can be compared:

        mobile-bench evaluate model.tflite --sample sample.npz

    On the board itself, and image by image against this machine:

        mobile-bench evaluate model.tflite --sample sample.npz --target ssh://pi@raspberry.local

    On another processor than the CPU, and image by image against the CPU of this machine:

        mobile-bench evaluate model.tflite --sample sample.npz --accelerator gpu

    A file from elsewhere does not say how it wants its pixels:

        mobile-bench evaluate other.tflite --sample sample.npz --input-spec scaling=signed,head=logits

    Exit code 0: evaluated; 1: the device cannot be reached, or the file crashed the runtime; 2: the file, the sample
    or an option cannot be used; 130: interrupted.
    """
    from mobile_bench.errors import Problem
    from mobile_bench.evaluate import evaluate_apart, read_sample
    from mobile_bench.files import sha256_of
    from mobile_bench.interpreter import check_is_tflite
    from mobile_bench.metadata import find_spec
    from mobile_bench.records import SCHEMA_VERSION
    from mobile_bench.stats import wilson_interval

    place = place_for(target, inventory, None, runtime, accelerator)
    delegate = delegate_of(library, delegate_option, allow_fallback, reference)
    for path in (file, *([reference] if reference else [])):
        check_is_tflite(path)
    images, _ = read_sample(sample)
    spec = find_spec(file, input_spec, shape=images.shape[1:])
    warn_of_fit(file, spec, images.shape[1:])
    with bar(f"evaluating {file.name}") as progress:
        found = evaluate_apart(
            file, sample, spec, place.target, connection=place.connection, delegate=delegate, workers=workers,
            progress=progress, tell=say_dim,
        )  # fmt: skip
    same, here = None, None
    # What is compiled for the Edge TPU runs nowhere else: only the file that it was made of can be compared.
    if reference or (place.target.accelerator != "edgetpu" and (place.connection or place.target.accelerator != "cpu")):
        try:
            with bar("evaluating here, on the CPU") as progress:
                here = evaluate_apart(reference or file, sample, spec, progress=progress)
            same = int((here.predictions == found.predictions).sum())
        except Problem as problem:  # what was measured is still worth showing
            say(f"warning: nothing to set beside it: this machine's CPU cannot answer. {problem}", style="yellow")
    low, high = wilson_interval(found.correct, found.images)
    if as_json:
        facts = {name: getattr(found, name) for name in ("top1", "images", "correct", "runtime", "workers", "seconds")}
        print_json(
            {
                "schema_version": SCHEMA_VERSION, **facts, "top1_low": low, "top1_high": high,
                "images_per_second": found.images_per_second, "sha256": sha256_of(file),
                "predictions": found.predictions.tolist(), "target": place.target.name, "same_as_here": same,
            }
        )  # fmt: skip
        return
    if place.target.accelerator != "cpu":
        say(f"run on the {place.target.accelerator}", style="dim")
    rows = {
        "Top-1": f"{found.top1:.2%} (95% interval {low:.2%} to {high:.2%})",
        "Images": f"{found.correct:,} of {found.images:,} right",
        "Speed": f"{found.images_per_second:,.0f} images/s with {found.workers} worker(s), loading included",
        "Runtime": found.runtime,
    }
    if same is not None:
        rows["Against this machine's CPU"] = (
            f"the same class for {same:,} of {found.images:,} images ({here.runtime} here)"
        )
    Console().print(table(str(file), rows))
