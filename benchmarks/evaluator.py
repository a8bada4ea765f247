"""The .tflite evaluator against a one-image-at-a-time, one-thread loop: the same answers, how much sooner?

    python benchmarks/evaluator.py                          ResNet-8, 32x32x3: the loop takes 5 s or more
    python benchmarks/evaluator.py --seconds 0.05 --seconds 0.5 --seconds 6
    python benchmarks/evaluator.py --tflite model.tflite    a file of your own (with an input spec)

Each round runs both, in random order, each in a fresh process, and times it from opening the file to the
last prediction (start-up included; imports are not, they are the same for both). The number of images is
chosen so that the loop takes about the seconds asked for. Shown: the ratio of images per second, its median
over the rounds with the 95% interval of that median, and its extremes; the predictions of every round are
compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mobile_bench.device import describe, load_average  # noqa: E402
from mobile_bench.evaluate import classes_of, predictions_only  # noqa: E402
from mobile_bench.files import write_json  # noqa: E402
from mobile_bench.inputs import InputSpec  # noqa: E402
from mobile_bench.interpreter import load_runtime, open_model, quantize  # noqa: E402
from mobile_bench.metadata import recorded_spec  # noqa: E402
from mobile_bench.stats import median_interval  # noqa: E402


def loop(tflite: Path, images: np.ndarray, spec: InputSpec) -> np.ndarray:
    """What everybody writes first: each image scaled, set, run and read in turn, on one thread."""
    model = open_model(tflite, threads=1)
    found = np.empty(len(images), np.int64)
    for index in range(len(images)):
        model.set_inputs(quantize(spec.normalize(images[index : index + 1]), model.inputs[0]))
        model.run()
        found[index] = classes_of(model.get_outputs()[0].reshape(1, -1), spec.head)[0]
    return found


def run_one(way: str, tflite: str, images: str, spec: str, out: str) -> None:
    """The child's side: time one way over the images and print the seconds."""
    load_runtime()
    pixels = np.load(images)
    run = {"loop": loop, "evaluator": predictions_only}[way]
    started = time.perf_counter()
    found = run(Path(tflite), pixels, InputSpec.from_dict(json.loads(spec)))
    seconds = time.perf_counter() - started
    np.save(out, found)
    print(json.dumps(seconds))


def time_apart(way: str, tflite: Path, images: Path, spec: InputSpec, folder: Path) -> tuple[float, np.ndarray]:
    out = folder / f"{way}.npy"
    command = [sys.executable, __file__, "--child", way, str(tflite), str(images), json.dumps(spec.to_dict()), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), np.load(out)


def build_resnet8(folder: Path) -> tuple[Path, InputSpec]:
    """An untrained ResNet-8 for 32x32x3, converted to float32: how long it takes does not depend on training."""
    code = (
        "import sys; import tensorflow as tf; from tfopt.builders import build\n"
        "model = build('resnet8', (32, 32, 3), 10)\n"
        "open(sys.argv[1], 'wb').write(tf.lite.TFLiteConverter.from_keras_model(model).convert())"
    )
    path = folder / "resnet8.tflite"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment, capture_output=True)
    return path, InputSpec(32, 32, 3)


def compare(tflite: Path, spec: InputSpec, seconds: float, rounds: int, folder: Path) -> dict:
    """Both ways on as many images as keep the loop busy for `seconds`, `rounds` times, interleaved."""
    pixels = np.random.default_rng(0)
    probe = pixels.integers(0, 256, (200, *spec.shape), np.uint8)
    loop(tflite, probe[:20], spec)
    started = time.perf_counter()
    loop(tflite, probe, spec)
    count = max(1, round(seconds * len(probe) / (time.perf_counter() - started)))
    images = folder / "images.npy"
    np.save(images, pixels.integers(0, 256, (count, *spec.shape), np.uint8))
    order, samples, same = random.Random(0), [], True
    for _ in range(rounds):
        ways = ["loop", "evaluator"]
        order.shuffle(ways)
        found = {way: time_apart(way, tflite, images, spec, folder) for way in ways}
        same &= bool((found["loop"][1] == found["evaluator"][1]).all())
        samples.append({"first": ways[0], **{way: found[way][0] for way in ways}, "load_average": load_average()})
    ratios = [sample["loop"] / sample["evaluator"] for sample in samples]
    low, high = median_interval(ratios)
    return {
        "images": count, "loop_s": float(np.median([s["loop"] for s in samples])), "identical": same,
        "ratio": float(np.median(ratios)), "ratio_low": low, "ratio_high": high,
        "ratio_min": min(ratios), "ratio_max": max(ratios), "samples": samples,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflite", type=Path, help="a file with an input spec inside; default: a ResNet-8")
    parser.add_argument("--seconds", type=float, action="append", help="how long the loop shall take; repeatable")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="a .json for all samples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tflite, spec = (options.tflite, recorded_spec(options.tflite)) if options.tflite else build_resnet8(folder)
        if spec is None:
            parser.error(f"{tflite} carries no input spec")
        rows = [compare(tflite, spec, s, options.rounds, folder) for s in options.seconds or [0.03, 0.3, 6.0]]
    print(f"{'images':>8} {'loop':>9} {'ratio':>7} {'95% interval':>16} {'extremes':>14}  predictions")
    for row in rows:
        interval, extremes = (
            f"{row[f'ratio_{a}']:.2f} to {row[f'ratio_{b}']:.2f}" for a, b in (("low", "high"), ("min", "max"))
        )
        verdict = "identical" if row["identical"] else "DIFFERENT"
        print(
            f"{row['images']:>8} {row['loop_s']:>7.3f} s {row['ratio']:>6.2f}x {interval:>16} {extremes:>14}  {verdict}"
        )
    if options.out:
        write_json(options.out, {"schema_version": 1, "device": describe(), "rows": rows})
    sys.exit(0 if all(row["identical"] for row in rows) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_one(*sys.argv[2:])
    else:
        main()
