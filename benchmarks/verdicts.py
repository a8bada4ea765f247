"""Does `mobile-bench compare` tell a difference where there is none, and find the one that is there?

    python benchmarks/verdicts.py [--same 200] [--different 100] [--seconds 20] [--out FOLDER]

A chain of 33 equal convolutions is compared with itself, and with a chain of 34: 3.03% more multiplications.
Each comparison is one line of FOLDER/verdicts.jsonl, with the ratio of every round; run again, it goes on where
it was stopped. All raw samples of a comparison lie beside it in raw/.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mobile_bench.compare import compare  # noqa: E402
from mobile_bench.stats import wilson_interval  # noqa: E402

LAYERS, MORE = 33, 34
_MAKE = """
import sys, keras, tensorflow as tf
keras.utils.set_random_seed(0)
for layers in map(int, sys.argv[2:]):
    x = inputs = keras.Input((16, 16, 32), batch_size=1)
    for _ in range(layers):
        x = keras.layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    content = tf.lite.TFLiteConverter.from_keras_model(keras.Model(inputs, x)).convert()
    open(f"{sys.argv[1]}/chain-{layers}.tflite", "wb").write(content)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--same", type=int, default=200, help="comparisons of the file with itself")
    parser.add_argument("--different", type=int, default=100, help="comparisons with 3%% more work")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "verdicts")
    arguments = parser.parse_args()
    (arguments.out / "raw").mkdir(parents=True, exist_ok=True)
    files = {layers: arguments.out / f"chain-{layers}.tflite" for layers in (LAYERS, MORE)}
    if not all(file.is_file() for file in files.values()):
        command = [sys.executable, "-c", _MAKE, str(arguments.out), str(LAYERS), str(MORE)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = arguments.out / "verdicts.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    done = [row for row in done if row["seconds_asked"] == arguments.seconds]
    for kind, number in track(_plan(arguments, done), description="comparing", console=Console(stderr=True)):
        found = compare([files[LAYERS], files[LAYERS if kind == "same" else MORE]], seconds=arguments.seconds)
        verdict = asdict(found.verdicts[0])
        row = {"kind": kind, "number": number, "seconds_asked": arguments.seconds, "seconds": found.seconds}
        row |= {"load_average": found.load_average, "warnings": found.warnings, **verdict}
        with gzip.open(arguments.out / "raw" / f"{kind}-{arguments.seconds:g}s-{number:03}.json.gz", "wt") as raw:
            json.dump(found.blocks, raw)
        with open(log, "a") as lines:
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        done.append(row)
    _report(done)


def _plan(arguments: argparse.Namespace, done: list[dict]) -> list[tuple[str, int]]:
    """What is still to do, the two kinds mixed, so that a stop half-way leaves some of both."""
    finished = {(row["kind"], row["number"]) for row in done}
    wanted = [("same", n, n / max(arguments.same, 1)) for n in range(arguments.same)]
    wanted += [("different", n, n / max(arguments.different, 1)) for n in range(arguments.different)]
    return [(kind, n) for kind, n, _ in sorted(wanted, key=lambda w: w[2]) if (kind, n) not in finished]


def _report(done: list[dict]) -> None:
    for kind, question in (("same", "a difference where there is none"), ("different", "3.03% more work found")):
        rows = [row for row in done if row["kind"] == kind]
        if not rows:
            continue
        hits = sum(
            row["verdict"] == "slower" if kind == "different" else row["verdict"] != "cannot tell" for row in rows
        )
        low, high = wilson_interval(hits, len(rows))
        ratios = sorted(row["ratio"] for row in rows)
        widths = sorted(row["high"] - row["low"] for row in rows)
        print(
            f"{question}: {hits} of {len(rows)} ({hits / len(rows):.1%}, 95% {low:.1%} to {high:.1%}); "
            f"ratio {ratios[0]:.4f} to {ratios[-1]:.4f}, median {ratios[len(ratios) // 2]:.4f}; "
            f"interval's width, median {widths[len(widths) // 2]:.4f}; "
            f"{sum(row['seconds'] for row in rows) / len(rows):.1f} s a comparison"
        )


if __name__ == "__main__":
    main()
