"""How long does our conversion take against the converter alone, which neither checks nor compares its file?

    python benchmarks/conversion.py                    MobileNetV2 224, int8, 32 calibration images
    python benchmarks/conversion.py --scheme float16 --images 1 --rounds 10

Each round runs both, in random order, each in a fresh process on the same .keras file and the same images, from the
start of the process to the finished .tflite: ours is `tfopt.convert.convert`, with its own child process, its checks
and its comparison with Keras; the other one loads the model and calls tf.lite.TFLiteConverter.from_keras_model. Shown:
the ratio of their times, its median and the mean's 95% interval. The two files' answers are compared in every round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mobile_bench.device import describe, load_average  # noqa: E402
from mobile_bench.files import write_json  # noqa: E402
from mobile_bench.inputs import InputSpec  # noqa: E402
from mobile_bench.interpreter import open_model  # noqa: E402
from mobile_bench.stats import ratio_interval  # noqa: E402

SPEC = InputSpec(224, 224, 3)
LIMIT = 1.2
_MAKE = """
import sys, keras
keras.utils.set_random_seed(0)
keras.applications.MobileNetV2(weights=None, input_shape=(224, 224, 3)).save(sys.argv[1])
"""
_PLAIN = """
import json, sys
import numpy as np, tensorflow as tf, keras
model_file, images_file, scheme, out = sys.argv[1:]
images = np.load(images_file)
converter = tf.lite.TFLiteConverter.from_keras_model(keras.saving.load_model(model_file, compile=False))
if scheme != "float32":
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
if scheme == "float16":
    converter.target_spec.supported_types = [tf.float16]
if scheme == "int8":
    converter.representative_dataset = lambda: ([(image[None].astype(np.float32) - 127.5) / 127.5] for image in images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
open(out, "wb").write(converter.convert())
"""
_OURS = """
import sys
from pathlib import Path
import numpy as np
from mobile_bench.inputs import InputSpec
from tfopt.convert import convert
model_file, images_file, scheme, out = sys.argv[1:]
images = np.load(images_file)
(done,) = convert(Path(model_file), InputSpec(224, 224, 3), [scheme], Path(out).parent / "ours",
                  calibration=images, calibration_images=len(images), work=Path(out).parent)
assert done.path, done.reason
done.path.replace(out)
"""


def seconds(code: str, *arguments: object) -> float:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    begun = time.perf_counter()
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return time.perf_counter() - begun


def answers(path: Path, images: np.ndarray) -> np.ndarray:
    model = open_model(path)
    return np.concatenate([model.invoke(SPEC.normalize(image[None]))[0] for image in images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", choices=("float32", "float16", "dynamic", "int8"), default="int8")
    parser.add_argument("--images", type=int, default=32, help="calibration images, of noise")
    parser.add_argument("--rounds", type=int, default=6, help="at least 6, for an interval")
    parser.add_argument("--out", type=Path, help="a .json for all samples")
    options = parser.parse_args()
    if options.rounds < 6 or options.images < 1:
        parser.error("--rounds takes 6 and above, --images 1 and above")
    samples, same = [], True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ours").mkdir()
        model, images = folder / "model.keras", folder / "images.npy"
        seconds(_MAKE, model)
        pixels = np.random.default_rng(0).integers(0, 256, (options.images, *SPEC.shape), np.uint8)
        np.save(images, pixels)
        for _ in range(options.rounds):
            ways = {"ours": _OURS, "plain": _PLAIN}
            order = random.sample(list(ways), 2)
            found = {way: seconds(ways[way], model, images, options.scheme, folder / f"{way}.tflite") for way in order}
            one, other = (answers(folder / f"{way}.tflite", pixels[:2]) for way in ways)
            # The two trace the model differently, so that sums are taken in another order.
            same &= bool(np.abs(one - other).max() <= 0.05 * max(np.ptp(other), 1e-3))
            samples.append({**found, "first": order[0], "load_average": load_average()})
            print(json.dumps(samples[-1]), flush=True)
    ratios = [sample["ours"] / sample["plain"] for sample in samples]
    low, high = ratio_interval([math.log(ratio) for ratio in ratios])
    middle = {way: statistics.median(sample[way] for sample in samples) for way in ("ours", "plain")}
    print(
        f"MobileNetV2 224 as {options.scheme}: ours {middle['ours']:.1f} s, converter alone {middle['plain']:.1f} s; "
        f"ratio {statistics.median(ratios):.3f} (mean's 95% interval {low:.3f} to {high:.3f}, {len(ratios)} rounds); "
        f"asked: at most {LIMIT}; answers {'agree' if same else 'DIFFER'}"
    )
    if options.out:
        write_json(
            options.out, {"schema_version": 1, "device": describe(), "samples": samples, "low": low, "high": high}
        )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
