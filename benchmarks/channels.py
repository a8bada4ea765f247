"""Can every architecture lose its channels, and does the smaller model compute what it should?

    python benchmarks/channels.py                           all of keras.applications' families and the odd graphs
    python benchmarks/channels.py --only MobileNetV2 u_net
    python benchmarks/channels.py --table                   the table of what was measured so far

One cell is one model at one ratio: untrained, with random batch norms, uniform, by the L2 norm, rounded to --multiple.
Each is appended to the results as one JSON line as soon as it is there, and a second run measures what is missing.
`lost` is the share of the kernels that can lose channels which lost the ratio within one multiple, `exact` the largest
difference from the whole model in which nothing reads the removed channels, as a share of the outputs' size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

#: name -> the size of its image; the smallest each family takes, or near it.
FAMILIES = {
    "VGG16": 32, "ResNet50": 64, "ResNet50V2": 64, "InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71,
    "MobileNet": 64, "MobileNetV2": 64, "MobileNetV3Small": 64, "MobileNetV3Large": 64, "DenseNet121": 64,
    "NASNetMobile": 224, "EfficientNetB0": 64, "EfficientNetV2B0": 64, "ConvNeXtTiny": 64,
}  # fmt: skip
RATIOS = (0.3, 0.5)


def build(name: str):
    import keras

    from tests.tfopt.odd_graphs import GRAPHS
    from tfopt.channels import check

    keras.utils.set_random_seed(0)
    if name in GRAPHS:
        return check.randomized(GRAPHS[name]())
    shape = (FAMILIES[name], FAMILIES[name], 3)
    return check.randomized(getattr(keras.applications, name)(weights=None, input_shape=shape, classes=10))


def measure(name: str, ratio: float, multiple: int, with_file: bool) -> dict:
    """One cell. Runs in a process of its own."""
    import keras
    import numpy as np

    from tfopt.channels import check, choose, cut, dependencies, importance

    started = time.monotonic()
    model = build(name)
    found = dependencies.analyze(model)
    removed = choose.uniform(found, importance.scores(found, "l2"), ratio, multiple)
    smaller = cut.cut(found, removed)
    report = cut.report(found, smaller, removed)
    rows = list(report.layers.values())
    inputs = check.random_inputs(model, 1)
    facts = {
        "model": name, "ratio": ratio, "multiple": multiple, "kernels": len(found.kernels()), "eligible": len(rows),
        "lost": float(np.mean([abs(1 - after / before - ratio) <= multiple / before for before, after in rows])),
        "narrower": sum(after < before for before, after in rows), "groups": len(found.groups),
        "parameters": report.parameters_after / report.parameters_before,
        "macs": report.macs_after / report.macs_before, "exact": check.exactness(found, removed, smaller),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        smaller.save(path)
        again = keras.saving.load_model(path)
        facts["reloaded"] = check.difference(smaller, again, inputs) == 0
        facts["converted"] = _converted(again, inputs, Path(folder)) if with_file else None
    return {**facts, "seconds": round(time.monotonic() - started, 1)}


def _converted(model, inputs, folder: Path) -> float | None:
    """The largest difference of the .tflite from Keras; None where it has no single input and output to compare."""
    import numpy as np
    import tensorflow as tf

    from mobile_bench.interpreter import open_model

    path = folder / "model.tflite"
    path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        interpreter = tf.lite.Interpreter(str(path))
        interpreter.allocate_tensors()
        return None
    (answer,) = open_model(path).invoke(inputs[0])
    return float(np.abs(answer - np.asarray(model(inputs[0], training=False))).max())


def table(rows: list[dict]) -> str:
    lines = [
        "| model | ratio | kernels | can lose | lost | parameters | MACs | exact | reloaded | .tflite differs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['ratio']:.0%} | failed: {row['error']} |  |  |  |  |  |  |  |")
            continue
        converted = "opens" if row["converted"] is None else f"{row['converted']:.0e}"
        reloaded = "yes" if row["reloaded"] else "NO"
        lines.append(
            f"| {row['model']} | {row['ratio']:.0%} | {row['kernels']} | {row['eligible']} | {row['lost']:.0%} | "
            f"{row['parameters']:.0%} | {row['macs']:.0%} | {row['exact']:.0e} | {reloaded} | {converted} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--ratios", nargs="*", type=float, default=list(RATIOS))
    parser.add_argument("--multiple", type=int, default=8)
    parser.add_argument("--no-file", action="store_true", help="leave the conversion to .tflite out")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "channels.jsonl")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--cell", nargs=2, metavar=("MODEL", "RATIO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        name, ratio = options.cell
        print(json.dumps(measure(name, float(ratio), options.multiple, not options.no_file)))
        return
    from tests.tfopt.odd_graphs import GRAPHS

    known = [*FAMILIES, *GRAPHS]
    for name in options.only or ():
        if name not in known:
            sys.exit(f"There is no model {name}; there are {', '.join(known)}")
    rows = _read(options.results)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    cells = [(name, ratio) for name in options.only or known for ratio in options.ratios]
    for name, ratio in [] if options.table else cells:
        if (name, ratio, options.multiple) in rows:
            continue
        command = [sys.executable, __file__, "--cell", name, str(ratio), "--multiple", str(options.multiple)]
        done = subprocess.run(command + ["--no-file"] * options.no_file, capture_output=True, text=True)
        row = {"model": name, "ratio": ratio, "multiple": options.multiple}
        if done.returncode == 0:
            row = json.loads(done.stdout.strip().splitlines()[-1])
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        else:
            row["error"] = (done.stderr.strip().splitlines() or ["no message"])[-1][:120]
        rows[name, ratio, options.multiple] = row
        print(f"{name} {ratio:.0%}: {row.get('error') or str(row['seconds']) + ' s'}", file=sys.stderr, flush=True)
    wanted = [rows[name, ratio, options.multiple] for name, ratio in cells if (name, ratio, options.multiple) in rows]
    print(table(wanted))


def _read(path: Path) -> dict[tuple, dict]:
    rows = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line that was cut off when the machine went down
        rows[row["model"], row["ratio"], row["multiple"]] = row
    return rows


if __name__ == "__main__":
    main()
