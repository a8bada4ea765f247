"""`mobile-bench`: how fast a .tflite is on the device in hand, and what it answers."""

from __future__ import annotations

import typer

from mobile_bench.cli_support import run_app
from mobile_bench.commands.compare import compare, gate
from mobile_bench.commands.evaluate import evaluate
from mobile_bench.commands.fetch_tool import fetch_tool
from mobile_bench.commands.profile import profile
from mobile_bench.commands.roofline import roofline
from mobile_bench.commands.run import run
from mobile_bench.commands.stream import stream
from mobile_bench.commands.sustained import sustained
from mobile_bench.commands.sweep import sweep
from mobile_bench.commands.xray import xray

app = typer.Typer(
    name="mobile-bench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Measure .tflite files on the machine in hand: latency, memory and accuracy. No TensorFlow needed.

How fast is it, and does it keep up with a camera of 30 frames a second?

    mobile-bench run model.tflite

Which of two is faster, and may the new one replace the old one?

    mobile-bench compare old.tflite new.tflite
    mobile-bench gate new.tflite --against old.tflite --sample sample.npz

What of it will run on the accelerator, and why not the rest?

    mobile-bench xray model.tflite --delegate edgetpu

Does it answer as well here as where it was made? (A sample is images and labels, by numpy.savez.)

    mobile-bench evaluate model.tflite --sample sample.npz
""",
)


@app.callback()
def _callback() -> None:
    """Each command has its own --help."""


for command in (run, compare, gate, sweep, profile, roofline, stream, sustained, evaluate, xray, fetch_tool):
    app.command()(command)


def main() -> None:
    run_app(app)


if __name__ == "__main__":
    main()
