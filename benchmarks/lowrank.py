"""A trained network with at least twice fewer weights by low rank: what it loses, and whether each chain is faster.

    python benchmarks/lowrank.py --out build/lowrank            (resumable)

The shipped MobileNet 0.25 and ResNet-8 of Fashion-MNIST are factorized with data-aware factors of --energy, keep
'smaller' (each chain timed beside its layer; those that are slower are dropped), and trained with the original as
teacher. Accuracy is that of the float32 .tflite on all test images.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

BASELINES = ROOT / "saved_models" / "baselines"
#: baseline -> the energy at which about half of its weights are left, by count alone
ENERGY = {"mobilenet-fashion": 0.94, "resnet8-fashion": 0.9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "lowrank")
    parser.add_argument("--baselines", nargs="*", choices=ENERGY, default=list(ENERGY))
    parser.add_argument("--energy", type=float, help="of all baselines, instead of each one's own")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--keep", default="smaller", choices=("cheaper", "faster", "smaller"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(
        "| baseline | energy | weights | MACs | top-1 before | top-1 "
        "| chains kept | dropped as slower | slower among kept |"
    )
    print("|:--|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in options.baselines:
        energy = options.energy or ENERGY[name]
        place = options.out / f"{name}-{energy:g}-{options.keep}-{options.seed}.json"
        if not place.is_file():
            made(name, energy, options.epochs, options.keep, options.seed, place)
        row = json.loads(place.read_text())
        before = json.loads((BASELINES / name / "card.json").read_text())["test_top1"]
        print(
            f"| {name} | {energy:g} | {row['parameters']:.0%} | {row['macs']:.0%} | {before:.2%} | {row['top1']:.2%} | "
            f"{row['kept']} | {row['dropped']} | {row['slower']} |"
        )


def made(name: str, energy: float, epochs: float, keep: str, seed: int, place: Path) -> None:
    from mobile_bench.files import write_json
    from tfopt import attest, data, models
    from tfopt.convert import convert
    from tfopt.technique import Context, OptimizedModel
    from tfopt.techniques.factorize import Factorize
    from tfopt.training import TrainConfig

    loaded, found = models.load(str(BASELINES / name / "model.keras")), data.load("fashion_mnist")
    train = TrainConfig(
        epochs=epochs, learning_rate=0.02, batch_size=128, optimizer="sgd", momentum=0.9, weight_decay=5e-4,
        augmentation="crop_flip", evaluations=2, validation_images=2000, distill={"temperature": 4.0, "alpha": 0.7},
    )  # fmt: skip
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        say = lambda step, steps, facts: print(f"\r{name}: {facts.get('what')} {step}/{steps}", end="", file=sys.stderr)
        context = Context(found, work, loaded.model, seed=seed, progress=say)
        technique = Factorize(data=True, energy=energy, keep=keep, train=train)
        result, report = technique.apply(OptimizedModel(loaded.model, loaded.spec), context)
        model = place.with_name(f"{place.stem}.keras")
        models.save(result.model, model, loaded.spec)
        (converted,) = convert(model, loaded.spec, ["float32"], work, work=work)
        images = attest.save_split(found["test"], loaded.spec, work)
        answers = attest.answers(converted.path, images, loaded.spec, work)
    times = report.properties["times"]
    write_json(place, {
        "parameters": report.parameters_after / report.parameters_before,
        "macs": report.macs_after / report.macs_before,
        "top1": float((answers.predictions == found["test"].labels).mean()), "kept": len(report.touched),
        "dropped": sum(skip.reason == "not faster on the target" for skip in report.skipped),
        "slower": sum(times[name]["verdict"] == "slower" for name in report.touched if name in times),
        "times": times, "ranks": report.properties["ranks"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
