"""Is a distilled student better than the same student trained alone? Paired by seed, from the same start.

    nice -n 19 python benchmarks/distillation.py --tune      (validation images alone)
    nice -n 19 python benchmarks/distillation.py             (as it was tuned; test images)
    python benchmarks/distillation.py --table                (runs nothing)

The teacher is the shipped ResNet-8 of Fashion-MNIST, which has seen all of its training images. The student is a
ResNet-8 of a quarter of the width that gets --images of them: for each seed another sample with as many of each class,
and the same with and without the teacher, for the same number of steps, with the same augmentation and schedule, from
the same weights. --tune tries each way at each of RATES with a seed of its own; the benchmark itself takes the rate
that was best on validation. 'alone, smoothed' is the student alone with label smoothing, the usual rival of a teacher's
soft answers; gains are over the better of the two on validation. Test images are looked at once a run, after training.
A benchmark that was stopped goes on where it was.
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
#: way -> (changes of the training, what the teacher teaches)
WAYS = {
    "alone": ({}, None),
    "alone, smoothed": ({"label_smoothing": 0.1}, None),
    "logits": ({}, {"temperature": 4.0, "alpha": 0.9}),
    "logits and attention": ({}, {"temperature": 4.0, "alpha": 0.9, "attention": 1000.0}),
    "logits and hints": ({}, {"temperature": 4.0, "alpha": 0.9, "hints": 1.0}),
    "logits and relations": ({}, {"temperature": 4.0, "alpha": 0.9, "relational": 10.0}),
}
ALONE = [way for way, (_, taught) in WAYS.items() if taught is None]
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
TUNING_SEED = 100
_SETTING = ("images", "steps", "width")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "distillation.jsonl")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tune", action="store_true", help="every rate, one seed, validation alone")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    setting = {name: getattr(options, name) for name in _SETTING}
    rows = lambda: [row for row in read(options.out) if setting.items() <= row.items()]
    if not options.table:
        runs = _tuning(options.ways, options.rates) if options.tune else _runs(options, rows())
        for seed, way, rate in runs:
            key = {"seed": seed, "way": way, "rate": rate, **setting}
            if not any(key.items() <= row.items() for row in rows()):
                row = {**key, **run(seed, way, rate, **setting, threads=options.threads)}
                write(options.out, [*read(options.out), row])
                print(row, file=sys.stderr, flush=True)
    print(table(rows(), tuning=options.tune))


def _tuning(ways: list[str], rates: list[float]) -> list[tuple]:
    return [(TUNING_SEED, way, rate) for way in ways for rate in rates]


def _runs(options: argparse.Namespace, rows: list[dict]) -> list[tuple]:
    best = chosen(rows)
    if missing := [way for way in options.ways if way not in best]:
        raise SystemExit(f"No rate is chosen for {', '.join(missing)}: run with --tune first")
    return [(seed, way, best[way]) for seed in range(options.seeds) for way in options.ways]


def chosen(rows: list[dict]) -> dict[str, float]:
    """The rate of each way that was best on validation with the seed for tuning."""
    tuned = sorted((row for row in rows if row["seed"] == TUNING_SEED), key=lambda row: row["validation"])
    return {row["way"]: row["rate"] for row in tuned}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write(path: Path, rows: list[dict]) -> None:
    from mobile_bench.files import atomic_path

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(seed: int, way: str, rate: float, images: int, steps: int, width: float, threads: int = 1) -> dict:
    import tensorflow as tf

    if threads and not tf.config.threading.get_intra_op_parallelism_threads():
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    import keras

    from tfopt import builders, data, models, training
    from tfopt.distillation.hook import distilling
    from tfopt.distillation.settings import Distillation
    from tfopt.distillation.teachers import Loaded

    started = time.monotonic()
    loaded, found = models.load(str(TEACHER)), data.load("fashion_mnist")
    spec = loaded.spec
    train = found["train"].subset(_sample(found["train"], images, seed))
    keras.utils.set_random_seed(seed)
    student = builders.build("resnet8", spec.shape, found.classes, width=width)
    changes, taught = WAYS[way]
    config = training.TrainConfig(
        steps=steps, batch_size=64, learning_rate=rate, augmentation="crop_flip", evaluations=1, validation_images=5000,
        **changes,
    )  # fmt: skip
    fit = lambda hook: training.fit(
        student, train, found["validation"], spec, config, keras=keras, seed=seed, loss_hook=hook
    )
    if taught is None:
        report = fit(None)
    else:
        panel = [Loaded("teacher", loaded.model, spec)]
        with distilling(student, panel, Distillation(**taught), spec) as (hook, _):
            report = fit(hook)
    # The run that chooses a rate must not see the test images.
    test = None if seed == TUNING_SEED else training.accuracy(student, found["test"], spec)
    return {
        "validation": report.accuracy_after, "test": test, "parameters": int(student.count_params()),
        "settings": dataclasses.asdict(Distillation(**taught)) if taught else None, "training": changes,
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


def table(rows: list[dict], tuning: bool) -> str:
    import numpy as np

    if tuning:
        lines = ["| way | rate | validation top-1 |", "|:--|--:|--:|"]
        for row in rows:
            if row["seed"] == TUNING_SEED:
                lines.append(f"| {row['way']} | {row['rate']:g} | {100 * row['validation']:.2f} |")
        return "\n".join(lines)
    own: dict[str, dict[int, dict]] = {}
    for row in rows:
        if row["seed"] != TUNING_SEED:
            own.setdefault(row["way"], {})[row["seed"]] = row
    mean = lambda way, split: 100 * np.mean([row[split] for row in own[way].values()])
    rivals = [way for way in ALONE if way in own]
    rival = max(rivals, key=lambda way: mean(way, "validation"), default=None)
    lines = [
        f"| way | rate | seeds | test top-1 | spread | gain over {rival} | 95% interval |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for way, found in own.items():
        scores = [100 * row["test"] for row in found.values()]
        spread = f"{np.std(scores, ddof=1):.2f}" if len(scores) > 1 else ""
        gain, interval = ("", "") if way in ALONE else paired(found, own.get(rival, {}))
        rate = ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in found.values()}))
        lines.append(f"| {way} | {rate} | {len(found)} | {mean(way, 'test'):.2f} | {spread} | {gain} | {interval} |")
    return "\n".join(lines)


def paired(found: dict[int, dict], rival: dict[int, dict]) -> tuple[str, str]:
    """The mean gain in points over the same seeds, and Student's interval for it."""
    import numpy as np
    from scipy import stats

    gains = [100 * (found[seed]["test"] - rival[seed]["test"]) for seed in found if seed in rival]
    if len(gains) < 2:
        return "", ""
    low, high = stats.t.interval(0.95, len(gains) - 1, np.mean(gains), stats.sem(gains))
    return f"{np.mean(gains):+.2f}", f"{low:+.2f} to {high:+.2f}"


if __name__ == "__main__":
    main()
