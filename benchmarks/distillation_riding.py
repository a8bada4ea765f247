"""Does fine-tuning lose less where it learns from the original too? Pruned, then trained for int8; paired by seed.

    nice -n 19 python benchmarks/distillation_riding.py
    python benchmarks/distillation_riding.py --table             (runs nothing)

The shipped classifiers of Fashion-MNIST are pruned and trained for int8 as the recipe prune_qat says, with the labels
alone and with `distill: true` in both steps; all else is the same. Accuracy is that of the fake-quantized model on all
test images, looked at once a run; the settings are the recipe's and tfopt's own, and none was chosen here. A benchmark
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

import distillation
import numpy as np

from tfopt import recipe
from tfopt.training import TrainConfig

BASELINES = distillation.ROOT / "saved_models" / "baselines"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=distillation.ROOT / "build" / "distillation_riding.jsonl")
    parser.add_argument("--baselines", nargs="*", default=["mobilenet-fashion", "resnet8-fashion"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    runs = [(name, seed, taught) for name in options.baselines for seed in range(options.seeds) for taught in (0, 1)]
    for name, seed, taught in [] if options.table else runs:
        key = {"baseline": name, "seed": seed, "taught": bool(taught)}
        rows = distillation.read(options.out)
        if not any(key.items() <= row.items() for row in rows):
            row = {**key, **run(**key)}
            distillation.write(options.out, [*rows, row])
            print(row, file=sys.stderr, flush=True)
    print(table(distillation.read(options.out)))


def run(baseline: str, seed: int, taught: bool) -> dict:
    from tfopt import data, models, training
    from tfopt.technique import Context, OptimizedModel
    from tfopt.tfmot.client import predict_quantized

    started = time.monotonic()
    loaded = models.load(str(BASELINES / baseline / "model.keras"))
    spec, found = loaded.spec, data.load("fashion_mnist").decoded(loaded.spec)
    steps = recipe.load("prune_qat").steps
    if taught:
        steps = [dataclasses.replace(step, train=_taught(step.train)) for step in steps]
    optimized, keep = OptimizedModel(loaded.model, spec), frozenset()
    with tempfile.TemporaryDirectory() as folder:
        for number, step in enumerate(steps):
            context = Context(found, Path(folder) / str(number), loaded.model, keep=keep & step.keeps, seed=seed)
            optimized, report = step.apply(optimized, context)
            keep = optimized.properties
        outputs = predict_quantized(optimized.quantized, found["test"], spec)
    return {
        "test": float(np.mean(training.classify(outputs, spec) == found["test"].labels)),
        "sparsity": report.properties["sparsity"], "recipe": [step.settings() for step in steps],
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def _taught(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, distill=True)


def table(rows: list[dict]) -> str:
    lines = [
        "| baseline | seeds | top-1, labels alone | top-1, from the original too | gain | 95% interval |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(row["baseline"] for row in rows):
        own = {taught: {} for taught in (False, True)}
        for row in rows:
            if row["baseline"] == name:
                own[row["taught"]][row["seed"]] = row
        means = [100 * np.mean([row["test"] for row in found.values()]) for found in own.values() if found]
        gain, interval = distillation.paired(own[True], own[False])
        if len(means) == 2:
            lines.append(f"| {name} | {len(own[True])} | {means[0]:.2f} | {means[1]:.2f} | {gain} | {interval} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.chdir(distillation.ROOT)
    main()
