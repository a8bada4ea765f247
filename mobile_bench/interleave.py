"""The process that times several files in turns, so that whatever slows the machine slows them all.

Started fresh for each round of a comparison as `python -m mobile_bench.interleave job.json`. All files are
loaded into one process, in random order. A turn runs a short block of each, again in random order; a block is
a few milliseconds of one file, so that a change of frequency or a busy neighbour meets every file of the turn.
"""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable

import numpy as np

from mobile_bench import delegates, device, trust
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import Model, load_runtime
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
    milliseconds; and what measure_latency says of the machine. The keys for another processor than the CPU are
    those of measure_latency, with reference_0, reference_1, … instead of reference; the answer then has
    delegated_ops, fallback_ops and output_drift, each a list with one entry a file.
    """
    wanted = [
        delegates.Wanted.of({**job, "reference": job.get(f"reference_{index}")}) for index in range(job["tflites"])
    ]
    load_runtime(job["runtime"])
    facts, load_average = device.describe(), device.load_average()
    order = np.random.default_rng(job["order_seed"])
    emit("progress", stage="load")
    models: list[Model] = [None] * job["tflites"]
    drifts: list[float | None] = [None] * job["tflites"]
    for index in order.permutation(job["tflites"]):
        spec = InputSpec.from_dict(job["specs"][index]) if job["specs"][index] else None
        path, size = job[f"tflite_{index}"], (spec.height, spec.width) if spec else None
        models[index] = model = delegates.open_on(wanted[index], path, job, size)
        inputs = functools.partial(random_inputs, model, spec)
        model.set_inputs(*inputs(job["seed"]))
        if wanted[index]:
            model.run()
            drifts[index] = delegates.check(wanted[index], model, path, job, size, inputs)
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
    used = {"runtime": models[0].runtime.name, "runtime_version": models[0].runtime.version, "during": during}
    placed = {
        "delegated_ops": [model.delegated_ops for model in models],
        "fallback_ops": [model.fallback_ops for model in models],
        "output_drift": drifts,
    }
    found = trust.warnings_of(facts, load_average, job["threads"], during, steady, warmup_runs, STEADY_CHANGE)
    return {
        **(placed if wanted[0] else {}),
        "blocks": blocks,
        "device": {**facts, **models[0].facts, **used},
        "load_average": load_average,
        "warnings": [*found, *dict.fromkeys(warning for model in models for warning in model.warnings)],
    }


def block_of(typical_ms: list[float]) -> tuple[int, int]:
    """How many runs of each file are timed in a block, and how many run before them unseen.

    The same for all files: the median of two skewed samples is not that of three.
    """
    middle_ms = math.exp(statistics.fmean(math.log(max(ms, 1e-6)) for ms in typical_ms))
    return max(1, math.ceil(BLOCK_MS / middle_ms)), int(middle_ms < COLD_BELOW_MS)


if __name__ == "__main__":
    serve(time_in_turns)
