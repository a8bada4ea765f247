"""Is a distilled student better than the same student trained alone? Paired by seed, from the same start.

    python benchmarks/distillation.py --out build/distillation.jsonl
    python benchmarks/distillation.py --out build/distillation.jsonl --table
    python benchmarks/distillation.py --tune --out build/distillation-tune.jsonl

The teacher is the shipped ResNet-8 of Fashion-MNIST, which has seen all of its training images. The student is a
ResNet-8 of half the width that gets --images of them, the same ones, with and without the teacher, for the same number
of steps, with the same augmentation and schedule, from the same weights. Each way has its own learning rate: --tune
tries each of RATES with another seed, and those that were best on validation stand in CHOSEN. Test images are looked at
once a run, after training. One run is one line of --out, so a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

TEACHER = ROOT / "saved_models" / "baselines" / "resnet8-fashion" / "model.keras"
WAYS = {
    "alone": None,
    "logits": {"temperature": 4.0, "alpha": 0.9},
    "logits and attention": {"temperature": 4.0, "alpha": 0.9, "attention": 1000.0},
    "attention": {"alpha": 0.0, "attention": 1000.0},
    "relational": {"alpha": 0.0, "relational": 10.0},
}
RATES = (3e-3, 1e-2, 3e-2)
CHOSEN = dict.fromkeys(WAYS, 1e-2)
_TUNING_SEED = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "distillation.jsonl")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tune", action="store_true", help="every learning rate, one seed, validation alone")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    if options.tune:
        runs = [(_TUNING_SEED, way, rate) for way in options.ways for rate in RATES]
    else:
        runs = [(seed, way, CHOSEN[way]) for seed in range(options.seeds) for way in options.ways]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed, way, rate in [] if options.table else runs:
        key = {"seed": seed, "way": way, "rate": rate, "images": options.images, "steps": options.steps}
        if any(key.items() <= row.items() for row in read(options.out)):
            continue
        row = {**key, **run(seed, way, rate, options.images, options.steps, with_test=not options.tune)}
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, file=sys.stderr, flush=True)
    rows = [row for row in read(options.out) if (row["images"], row["steps"]) == (options.images, options.steps)]
    print(table(rows, "validation" if options.tune else "test"))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run(seed: int, way: str, rate: float, images: int, steps: int, with_test: bool) -> dict:
    import keras

    from tfopt import builders, data, models, training
    from tfopt.distillation.hook import distilling
    from tfopt.distillation.settings import Distillation
    from tfopt.distillation.teachers import Loaded

    started = time.monotonic()
    loaded, found = models.load(str(TEACHER)), data.load("fashion_mnist")
    spec = loaded.spec
    # The labelled images are another sample for each seed, and the same with and without the teacher.
    train = found["train"].subset(_sample(found["train"], images, seed))
    keras.utils.set_random_seed(seed)
    student = builders.build("resnet8", spec.shape, found.classes, width=0.5)
    config = training.TrainConfig(
        steps=steps, batch_size=64, learning_rate=rate, augmentation="crop_flip", evaluations=1, validation_images=5000
    )
    fit = lambda hook: training.fit(
        student, train, found["validation"], spec, config, keras=keras, seed=seed, loss_hook=hook
    )
    if WAYS[way] is None:
        report = fit(None)
    else:
        with distilling(student, [Loaded("teacher", loaded.model, spec)], Distillation(**WAYS[way]), spec, keras) as (
            hook, _,
        ):  # fmt: skip
            report = fit(hook)
    test = training.accuracy(student, found["test"], spec) if with_test else None
    return {
        "validation": report.accuracy_after, "test": test, "parameters": int(student.count_params()),
        "settings": dataclasses.asdict(Distillation(**WAYS[way])) if WAYS[way] else None,
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def _sample(split, images: int, seed: int):
    import numpy as np

    random = np.random.default_rng(seed)
    classes = np.unique(split.labels)
    each = images // len(classes)
    return np.sort(
        np.concatenate([random.choice(np.flatnonzero(split.labels == c), each, replace=False) for c in classes])
    )


def table(rows: list[dict], split: str) -> str:
    import numpy as np
    from scipy import stats

    lines = [
        f"| way | rate | seeds | {split} top-1 | spread | gain over alone | 95% interval |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    alone = {row["seed"]: row for row in rows if row["way"] == "alone"}
    for way, rate in dict.fromkeys((row["way"], row["rate"]) for row in rows):
        own = [row for row in rows if (row["way"], row["rate"]) == (way, rate)]
        scores = 100 * np.array([row[split] for row in own])
        gain = interval = ""
        pairs = [100 * (row[split] - alone[row["seed"]][split]) for row in own if row["seed"] in alone]
        if way != "alone" and len(pairs) > 1 and split == "test":
            gain = f"{np.mean(pairs):+.2f}"
            low, high = stats.t.interval(0.95, len(pairs) - 1, np.mean(pairs), stats.sem(pairs))
            interval = f"{low:+.2f} to {high:+.2f}"
        spread = f"{scores.std(ddof=1):.2f}" if len(scores) > 1 else ""
        lines.append(f"| {way} | {rate:g} | {len(own)} | {scores.mean():.2f} | {spread} | {gain} | {interval} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
