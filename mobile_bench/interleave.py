"""The process that times several files in turns, so that whatever slows the machine slows them all.

Started fresh for each round of a comparison as `python -m mobile_bench.interleave job.json`. All files are
loaded into one process, in random order. A turn runs a short block of each, again in random order; a block is
a few milliseconds of one file, so that a change of frequency or a busy neighbour meets every file of the turn.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable

import numpy as np

from mobile_bench import device, trust
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import Model, load_runtime, open_model
from mobile_bench.jobs import serve
from mobile_bench.worker import STEADY_CHANGE, STEADY_RUNS, random_inputs, time_runs, warm_up

#: A block is long enough for a clock read to vanish in it and short enough for many turns a second.
BLOCK_MS = 4.0
#: The first run of a block finds the caches full of another file. From this duration on that no longer shows.
COLD_BELOW_MS = 10.0
MIN_TURNS = 3


def time_in_turns(job: dict, emit: Callable[..., None]) -> dict:
    """The raw samples of one round.

    job: tflites (how many; their paths are tflite_0, tflite_1, …), specs (one a file, or None), threads,
    runtime, batch, seed (of the inputs, the same in each round), order_seed (another in each round), seconds
    (of timing). Gives blocks: for each turn, for each file in the order of the job, its latencies in
    milliseconds; and what measure_latency says of the machine.
    """
    load_runtime(job["runtime"])
    facts, load_average = device.describe(), device.load_average()
    order = np.random.default_rng(job["order_seed"])
    emit("progress", stage="load")
    models: list[Model] = [None] * job["tflites"]
    for index in order.permutation(job["tflites"]):
        spec = InputSpec.from_dict(job["specs"][index]) if job["specs"][index] else None
        models[index] = model = open_model(
            job[f"tflite_{index}"], job["threads"], job["runtime"], batch=job["batch"],
            size=(spec.height, spec.width) if spec else None,
        )  # fmt: skip
        model.set_inputs(*random_inputs(model, spec, job["seed"]))
    gc.collect()
    gc.disable()
    emit("progress", stage="warm-up")
    warm = [warm_up(model) for model in models]
    runs, cold = block_of([statistics.median(times_ms[-STEADY_RUNS:]) for times_ms, _ in warm])
    emit("progress", stage="timing in turns")
    blocks: list[list[list[float]]] = []
    before, end = trust.read_state(), time.perf_counter() + job["seconds"]
    while len(blocks) < MIN_TURNS or time.perf_counter() < end:
        turn: list[list[float]] = [[]] * len(models)
        for index in order.permutation(len(models)):
            turn[index] = time_runs(models[index], cold + runs)[cold:]
        blocks.append(turn)
    during = trust.between(before, trust.read_state())
    steady, warmup_runs = all(settled for _, settled in warm), max(len(times_ms) for times_ms, _ in warm)
    runtime = models[0].runtime
    return {
        "blocks": blocks,
        "device": {**facts, "runtime": runtime.name, "runtime_version": runtime.version, "during": during},
        "load_average": load_average,
        "warnings": trust.warnings_of(facts, load_average, job["threads"], during, steady, warmup_runs, STEADY_CHANGE),
    }


def block_of(typical_ms: list[float]) -> tuple[int, int]:
    """How many runs of each file are timed in a block, and how many run before them unseen.

    The same for all files: the median of two skewed samples is not that of three.
    """
    middle_ms = math.exp(statistics.fmean(math.log(max(ms, 1e-6)) for ms in typical_ms))
    return max(1, math.ceil(BLOCK_MS / middle_ms)), int(middle_ms < COLD_BELOW_MS)


if __name__ == "__main__":
    serve(time_in_turns)
