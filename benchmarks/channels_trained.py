"""What trained networks lose and gain by fewer channels: accuracy after fine-tuning, and time under LiteRT.

    python benchmarks/channels_trained.py --out build/channels-trained            (hours on two cores; resumable)
    python benchmarks/channels_trained.py --out build/channels-trained --table

Each baseline loses channels until a share of its multiplications is left, and is trained again with the original as its
teacher, for each of three seeds. Accuracy is that of the float32 .tflite on all test images. Then the baseline and the
narrower networks of the first seed are timed in one interleaved comparison for each scheme, on one thread. What is no
shipped baseline is trained first. A network that is made already, and a comparison that is done, are found in --out and
not made again; --times measures the comparisons again.

Published figures, for comparison (theirs; other networks, and CIFAR-10 itself): DepGraph (Fang et al. 2023) brings
ResNet-56 from 93.53% to 93.64% at 2.57 times fewer MACs; CHIP (Sui et al. 2021) gains 0.90 at 47% fewer; NetAdapt
(Yang et al. 2018) measures 1.7 times the speed at equal accuracy on a phone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

SHIPPED = ROOT / "saved_models" / "baselines"


@dataclass(frozen=True)
class Baseline:
    """own: how it is made with 'tfopt train' where it is not shipped. multiple: what channels are rounded to.

    scope: as in `channels`. but: what differs at one of the shares, {share: {field: value}}.
    """

    data: str
    epochs: float
    own: tuple[str, ...] = ()
    multiple: int = 8
    learning_rate: float = 0.05
    scope: str = "global"
    but: dict[str, dict] = field(default_factory=dict)

    def at(self, share: str) -> Baseline:
        return replace(self, **self.but.get(share, {}))


#: Kernels work on 16 to 64 channels at a time, so that a network which has hardly more gains little from fewer: the
#: shipped ResNet-8 begins with 16, its double with 32. At 2.57x one threshold takes more of the last layers and
#: less of the first, which cost most: 0.89 points lost after 24 epochs, where the same share of each group loses 0.43.
BASELINES = {
    "resnet8-double-cifar10": Baseline(
        "cifar10",
        24,
        ("resnet8", "--width", "2", "--train", "epochs=24"),
        16,
        but={"2.57x": {"scope": "uniform", "multiple": 8, "epochs": 20}},
    ),
    "mobilenet-full-fashion": Baseline("fashion_mnist", 5, ("mobilenet", "--train", "epochs=6"), 32),
    "resnet8-cifar10-jpeg": Baseline("cifar10", 20),
    "mobilenet-fashion": Baseline("fashion_mnist", 8),
}
#: shares of the MACs that are left
SHARES = {"50%": 0.5, "2.57x": 1 / 2.57}
SCHEMES = ("float32", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "channels-trained")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--cifar10", default="cifar10", help="the folder of CIFAR-10 (JPEG)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="several runs can share the work")
    parser.add_argument("--shares", nargs="*", choices=SHARES, default=list(SHARES))
    parser.add_argument("--seconds", type=float, default=60.0, help="of each comparison of times")
    parser.add_argument("--times", action="store_true", help="compare again, though it is done")
    parser.add_argument("--table", action="store_true", help="make nothing")
    options = parser.parse_args()
    for name in [] if options.table else options.baselines:
        source = options.cifar10 if BASELINES[name].data == "cifar10" else BASELINES[name].data
        place = baseline(name, source, options.out)
        for share in options.shares:
            for seed in options.seeds:
                result = options.out / name / f"{share}-{seed}"
                if not (result / "facts.json").is_file():
                    made(name, place, share, seed, source, result)
        if options.times or not (options.out / name / "times.json").is_file():
            timed(place, source, options.out / name, options.seconds)
    print(table(options.out))


def baseline(name: str, source: str, out: Path) -> Path:
    """The folder of a baseline, trained if it is not shipped."""
    if not BASELINES[name].own:
        return SHIPPED / name
    place = out / name / "baseline"
    if not (place / "card.json").is_file():
        tfopt = str(Path(sys.executable).with_name("tfopt"))
        command = [tfopt, "train", *BASELINES[name].own, "--data", source, "--out", str(place)]
        subprocess.run(command, check=True)
    return place


def made(name: str, baseline: Path, share: str, seed: int, source: str, place: Path) -> None:
    """The narrower network, trained, with its files and what it answers."""
    from mobile_bench.files import write_json
    from tfopt import attest, data, models
    from tfopt.convert import convert
    from tfopt.technique import Context, OptimizedModel
    from tfopt.techniques.narrow import Narrow
    from tfopt.training import TrainConfig

    started = time.monotonic()
    chosen = BASELINES[name].at(share)
    loaded, found = models.load(str(baseline / "model.keras")), data.load(source)
    train = TrainConfig(
        epochs=chosen.epochs, learning_rate=chosen.learning_rate, batch_size=128, optimizer="sgd", momentum=0.9,
        weight_decay=5e-4, augmentation="crop_flip", evaluations=2, validation_images=2000,
        distill={"temperature": 4.0, "alpha": 0.7},
    )  # fmt: skip
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        say = lambda step, steps, facts: print(f"\r{name} {share} {seed}: {step}/{steps}", end="", file=sys.stderr)
        context = Context(found, Path(work), loaded.model, seed=seed, progress=say)
        start = OptimizedModel(loaded.model, loaded.spec)
        narrow = Narrow(macs=SHARES[share], scope=chosen.scope, multiple=chosen.multiple, train=train)
        result, report = narrow.apply(start, context)
        models.save(result.model, place / "model.keras", loaded.spec)
        facts = {
            "macs": report.macs_after / report.macs_before, "parameters": report.parameters_after,
            "before_training": report.properties["accuracy_before_training"],
        }  # fmt: skip
        files = convert(
            place / "model.keras", loaded.spec, SCHEMES, place, calibration=found["calibration"], work=Path(work)
        )
        images = attest.save_split(found["test"], loaded.spec, Path(work))
        for converted in files:
            answers = attest.answers(converted.path, images, loaded.spec, Path(work))
            facts[converted.scheme] = float((answers.predictions == found["test"].labels).mean())
    write_json(place / "facts.json", {**facts, "seconds": round(time.monotonic() - started)})


def timed(baseline: Path, source: str, place: Path, seconds: float) -> None:
    """The baseline and the first seed's networks in turns, one comparison for each scheme."""
    from mobile_bench.compare import compare
    from mobile_bench.files import write_json
    from tfopt import data, models
    from tfopt.convert import convert

    loaded, rows = models.load(str(baseline / "model.keras")), []
    shares = [share for share in SHARES if (place / f"{share}-0" / "facts.json").is_file()]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        calibration = data.load(source)["calibration"]
        convert(baseline / "model.keras", loaded.spec, SCHEMES, work, calibration=calibration, work=work)
        for scheme in SCHEMES:
            files = [work / f"{scheme}.tflite", *(place / f"{share}-0" / f"{scheme}.tflite" for share in shares)]
            found = compare(files, seconds=seconds)
            for share, verdict in zip(shares, found.verdicts):
                rows.append({
                    "scheme": scheme, "share": share, "speed": 1 / verdict.ratio, "low": 1 / verdict.high,
                    "high": 1 / verdict.low, "ms": verdict.median_ms, "baseline_ms": verdict.reference_ms,
                    "processor": found.device.get("processor"), "warnings": found.warnings,
                })  # fmt: skip
    write_json(place / "times.json", rows)


def table(out: Path) -> str:
    import numpy as np

    lines = [
        "| baseline | MACs | seeds | baseline top-1 | top-1 | spread | change | int8 top-1 | float32 | int8 |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, chosen in BASELINES.items():
        card = (out / name / "baseline" if chosen.own else SHIPPED / name) / "card.json"
        if not card.is_file():
            continue
        times = out / name / "times.json"
        speed = {(row["share"], row["scheme"]): row for row in json.loads(times.read_text())} if times.is_file() else {}
        for share in SHARES:
            facts = [json.loads(file.read_text()) for file in sorted(out.glob(f"{name}/{share}-*/facts.json"))]
            if not facts:
                continue
            top1 = 100 * np.array([row["float32"] for row in facts])
            before = 100 * json.loads(card.read_text())["test_top1"]
            int8 = 100 * np.mean([row["int8"] for row in facts])
            spread = f"{top1.std(ddof=1):.2f}" if len(top1) > 1 else ""
            faster = [
                f"{row['speed']:.2f}x ({row['low']:.2f} to {row['high']:.2f})" if row else ""
                for row in (speed.get((share, scheme)) for scheme in SCHEMES)
            ]
            lines.append(
                f"| {name} | {np.mean([row['macs'] for row in facts]):.1%} | {len(facts)} | {before:.2f} | "
                f"{top1.mean():.2f} | {spread} | {top1.mean() - before:+.2f} | {int8:.2f} | {faster[0]} | {faster[1]} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
