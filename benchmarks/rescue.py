"""What the ladder of `tfopt rescue` gives back, on photographs split by index: 100 fit, 300 decide, 600 report.

    python benchmarks/rescue.py MODEL.keras PHOTOS --input-spec scaling=signed --out rescue.json

PHOTOS holds class folders in the order of the model's classes. Of each ten photographs in order of class and name the
first is for calibration, the next three decide which repairs stay, and six are looked at once, at the end. The ladder
is climbed twice: to its end in full int8, and on with some layers in float. Agreement is with the float .tflite.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mobile_bench.files import write_json  # noqa: E402
from mobile_bench.stats import wilson_interval  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--input-spec", default=None)
    parser.add_argument("--out", type=Path, default=Path("rescue.json"))
    chosen = parser.parse_args()

    from PIL import Image

    from tfopt import models
    from tfopt.data import ImageData, Split
    from tfopt.rescue import rescue

    loaded = models.load(chosen.model, input_spec=chosen.input_spec)
    height, width = loaded.spec.height, loaded.spec.width
    folders = sorted(folder for folder in chosen.photos.iterdir() if folder.is_dir())
    files = [(path, number) for number, folder in enumerate(folders) for path in sorted(folder.iterdir())]
    pixels = np.stack([_centre(Image.open(path).convert("RGB"), height, width) for path, _ in files])
    labels = np.array([number for _, number in files], np.int32)
    tenth = np.arange(len(files)) % 10
    splits = {}
    for name, part in (("calibration", tenth == 0), ("validation", (tenth >= 1) & (tenth <= 3)), ("test", tenth >= 4)):
        splits[name] = Split(labels[part], np.flatnonzero(part).astype(np.uint64), images=pixels[part])
    data = ImageData(
        chosen.photos.name, tuple(folder.name for folder in folders), splits, "by index", str(chosen.photos),
        (height, width, 3),
    )  # fmt: skip
    results = {}
    for name, goal in (("full int8", {"mixed": False}), ("mixed", {"mixed": True})):
        rescued = rescue(
            loaded, data, min_agreement=1.0, max_drop=0.0, calibration_images=1000, choice_images=3000,
            test_images=6000, on_progress=lambda message: _say(message), **goal,
        )  # fmt: skip
        results[name] = rescued.report
        chosen.out.with_suffix(f".{name.replace(' ', '-')}.tflite").write_bytes(rescued.content)
        write_json(chosen.out, results)
        test = rescued.report["test"]
        low, high = wilson_interval(test["agree"], test["images"])
        print(
            f"{name}: agreement {test['agree'] / test['images']:.2%} ({low:.2%} to {high:.2%}), top-1 "
            f"{test['correct'] / test['images']:.2%}, float {test['float_correct'] / test['images']:.2%}, "
            f"{rescued.report['size_bytes'] / rescued.report['int8_bytes']:.3f} of the int8 file",
            flush=True,
        )


def _centre(picture, height: int, width: int) -> np.ndarray:
    """The middle of a photograph whose shorter edge is 8/7 of the input's."""
    factor = max(height, width) * 8 / 7 / min(picture.size)
    if abs(factor - 1) > 0.01:
        picture = picture.resize((round(picture.width * factor), round(picture.height * factor)))
    top, left = (picture.height - height) // 2, (picture.width - width) // 2
    return np.asarray(picture)[top : top + height, left : left + width]


def _say(message: dict) -> None:
    if "rung" in message:
        print(json.dumps(message["rung"]), flush=True)


if __name__ == "__main__":
    main()
