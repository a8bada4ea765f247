"""The evaluator's own choice against the best combination that a full sweep of processes, threads and batch finds.

    python benchmarks/evaluator_sweep.py --tflite model.tflite [--images 4000] [--rounds 5]

Every combination answers the same images; then the best three and the evaluator, which chose without the sweep,
take turns in random order, each from opening the file to the last prediction. Predictions must be identical.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mobile_bench.evaluate import classes_of, predictions_only  # noqa: E402
from mobile_bench.interpreter import dequantize, load_runtime, open_model, quantize  # noqa: E402
from mobile_bench.metadata import recorded_spec  # noqa: E402


def answer(tflite: str, images: np.ndarray, spec, threads: int, batch: int) -> np.ndarray:
    """One interpreter over its share of the images, `batch` at a time; the rest one by one."""
    found = []
    whole = len(images) - len(images) % batch
    for start, end, size in ((0, whole, batch), (whole, len(images), 1)):
        if start == end:
            continue
        model = open_model(tflite, threads, batch=size)
        for at in range(start, end, size):
            model.set_inputs(quantize(spec.normalize(images[at : at + size]), model.inputs[0]))
            model.run()
            values = dequantize(model.get_outputs()[0], model.outputs[0])
            found.append(classes_of(values.reshape(size, -1), spec.head))
    return np.concatenate(found)


def child(pipe, tflite, images, spec, threads, batch):
    load_runtime()
    pipe.send("ready")
    pipe.recv()
    pipe.send(answer(tflite, images, spec, threads, batch))


def alone(pipe, tflite, images, spec):
    load_runtime()
    pipe.send("ready")
    pipe.recv()
    pipe.send(predictions_only(tflite, images, spec))


def timed(calls: list[tuple]) -> tuple[float, np.ndarray]:
    """Start the processes, wait until all have loaded their libraries, and time the work itself."""
    context = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for target, *arguments in calls:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *arguments))
        process.start()
        pipes.append(ours)
        children.append(process)
    for pipe in pipes:
        pipe.recv()
    started = time.perf_counter()
    for pipe in pipes:
        pipe.send("go")
    found = np.concatenate([pipe.recv() for pipe in pipes])
    seconds = time.perf_counter() - started
    for process in children:
        process.join()
    return seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflite", type=Path, required=True)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    tflite, spec = str(arguments.tflite), recorded_spec(arguments.tflite)
    images = np.random.default_rng(0).integers(0, 256, (arguments.images, *spec.shape), np.uint8)
    expected = predictions_only(tflite, images, spec, workers=1)

    def combination(processes: int, threads: int, batch: int) -> float:
        calls = [(child, tflite, part, spec, threads, batch) for part in np.array_split(images, processes)]
        seconds, found = timed(calls)
        assert np.array_equal(found, expected), (processes, threads, batch)
        return arguments.images / seconds

    def evaluator() -> float:
        seconds, found = timed([(alone, tflite, images, spec)])
        assert np.array_equal(found, expected)
        return arguments.images / seconds

    cores = os.cpu_count() or 1
    counts = sorted({1, 2, cores})
    sweep = {}
    for way in itertools.product(counts, counts, (1, 8, 32)):
        try:
            sweep[way] = combination(*way)
        except AssertionError:
            print(f"{way}: other predictions, left out")
    best = sorted(sweep, key=sweep.get, reverse=True)[:3]
    rates: dict = {way: [] for way in [*best, "evaluator"]}
    for _ in range(arguments.rounds):
        for way in random.sample(list(rates), len(rates)):
            rates[way].append(evaluator() if way == "evaluator" else combination(*way))
    medians = {way: statistics.median(values) for way, values in rates.items()}
    top = max(best, key=medians.get)
    for way, rate in medians.items():
        name = way if way == "evaluator" else "{} process(es), {} thread(s), batch {}".format(*way)
        print(f"{name}: {rate:,.0f} images/s (median of {arguments.rounds})")
    print(f"evaluator / best of {len(sweep)}: {medians['evaluator'] / medians[top]:.3f}; asked: at least 0.9")


if __name__ == "__main__":
    main()
