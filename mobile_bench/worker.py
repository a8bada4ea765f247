"""The process that times one file: load, first inference, warm-up, timed runs, one result.

Started fresh for each measurement by a transport as `python -m mobile_bench.worker job.json`; it imports
numpy and a runtime, nothing more. The clock (time.perf_counter_ns) is read directly around the runtime's
own invoke: the input is in place before it starts and the output is not read, so a latency is what the
model costs, without preparing images or reading answers. On a GPU the output is read as well, because a GPU
has not computed it before.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from mobile_bench import delegates, device, trust
from mobile_bench.errors import ModelRefused
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import Model, load_runtime, quantize
from mobile_bench.jobs import serve
from mobile_bench.records import Tensor

#: Warm-up ends when the median of the last 5 runs is within 5% of that of the 5 before, and 0.1 s have
#: passed (a core needs that long to raise its frequency); it gives up after 3 s or 1,000 runs.
STEADY_RUNS, STEADY_CHANGE = 5, 0.05
WARMUP_MIN_S, WARMUP_MAX_S, WARMUP_MAX_RUNS = 0.1, 3.0, 1000
#: Timed runs go on until they fill a second, within the limits that the job sets.
TIMED_S = 1.0


def measure_latency(job: dict, emit: Callable[..., None]) -> dict:
    """What one job says about its file: the fields of a Measurement that only the worker can know.

    job: tflite, threads, runtime, batch, runs (at least), max_runs, seed, spec (a dict or None),
    timed_s (TIMED_S where absent). On another processor than the CPU also accelerator, delegate (its library),
    delegate_options, allow_fallback, reference (see delegates.Wanted); the answer then has delegated_ops,
    fallback_ops and output_drift too, and DelegateError is raised before anything is timed that means nothing.
    """
    wanted = delegates.Wanted.of(job)
    load_runtime(job["runtime"])  # importing it is no part of loading the file
    spec = InputSpec.from_dict(job["spec"]) if job["spec"] else None
    facts, load_average, base_rss_bytes = device.describe(), device.load_average(), device.peak_rss_bytes()
    emit("progress", stage="load")
    size = (spec.height, spec.width) if spec else None
    started = time.perf_counter_ns()
    model = delegates.open_on(wanted, job["tflite"], job, size)
    load_ms = _since_ms(started)
    model.set_inputs(*random_inputs(model, spec, job["seed"]))
    started = time.perf_counter_ns()
    model.run()
    first_inference_ms = _since_ms(started)
    # The CPU's copy of the model is no part of what the accelerator needs.
    peak_rss_bytes = device.peak_rss_bytes() if wanted else None
    drift = delegates.check(wanted, model, job["tflite"], job, size, lambda seed: random_inputs(model, spec, seed))
    gc.collect()
    gc.disable()
    emit("progress", stage="warm-up")
    warmup_ms, steady = warm_up(model)
    runs = planned_runs(
        statistics.median(warmup_ms[-STEADY_RUNS:]), job["runs"], job["max_runs"], job.get("timed_s", TIMED_S)
    )
    emit("progress", stage="timing", runs=runs)
    before = trust.read_state()
    latency_ms = time_runs(model, runs)
    during = trust.between(before, trust.read_state())
    warnings = trust.warnings_of(facts, load_average, job["threads"], during, steady, len(warmup_ms), STEADY_CHANGE)
    placed = {"delegated_ops": model.delegated_ops, "fallback_ops": model.fallback_ops, "output_drift": drift}
    return {
        **(placed if wanted else {}),
        "load_ms": load_ms,
        "first_inference_ms": first_inference_ms,
        "warmup_ms": warmup_ms,
        "latency_ms": latency_ms,
        "input_shape": model.inputs[0].shape if model.inputs else (),
        "peak_rss_bytes": peak_rss_bytes or device.peak_rss_bytes(),
        "base_rss_bytes": base_rss_bytes,
        "device": {
            **facts,
            **model.facts,
            "runtime": model.runtime.name,
            "runtime_version": model.runtime.version,
            "during": during,
        },
        "load_average": load_average,
        "warnings": [*warnings, *model.warnings],
    }


def random_inputs(model: Model, spec: InputSpec | None, seed: int) -> list[np.ndarray]:
    """The same input for the same seed: random pixels as `spec` scales them, or values all over the range.

    Never zeros for floats: some kernels are faster on them.
    """
    random = np.random.default_rng(seed)
    return [_random_values(tensor, spec, random) for tensor in model.inputs]


def _random_values(tensor: Tensor, spec: InputSpec | None, random: np.random.Generator) -> np.ndarray:
    dtype = np.dtype(tensor.dtype)
    if spec and tensor.shape[1:] == spec.shape:
        return quantize(spec.normalize(random.integers(0, 256, tensor.shape, np.uint8)), tensor)
    if tensor.dtype == "bool":
        return random.integers(0, 2, tensor.shape).astype(bool)
    if np.issubdtype(dtype, np.floating):
        return random.uniform(-1, 1, tensor.shape).astype(dtype)
    if np.issubdtype(dtype, np.integer) and dtype.itemsize <= 2:
        limits = np.iinfo(dtype)
        return random.integers(limits.min, limits.max, tensor.shape, dtype, endpoint=True)
    if np.issubdtype(dtype, np.integer):
        return np.zeros(tensor.shape, dtype)  # an index or a size: any other value may be out of range
    raise ModelRefused(
        "The file takes an input that cannot be made up", received=f"{tensor.name!r} of type {tensor.dtype}"
    )


def warm_up(model: Model) -> tuple[list[float], bool]:
    """Run until the times are steady. Gives them in milliseconds, and whether steadiness was reached."""
    times_ms: list[float] = []
    started = time.perf_counter()
    while True:
        begun = time.perf_counter_ns()
        model.run()
        times_ms.append(_since_ms(begun))
        passed_s = time.perf_counter() - started
        if passed_s >= WARMUP_MIN_S and is_steady(times_ms):
            return times_ms, True
        if passed_s >= WARMUP_MAX_S or (len(times_ms) >= WARMUP_MAX_RUNS and passed_s >= WARMUP_MIN_S):
            # A slow model has had few runs by now: judge it by what there is.
            return times_ms, len(times_ms) < 2 or is_steady(times_ms, min(STEADY_RUNS, len(times_ms) // 2))


def is_steady(times_ms: list[float], window: int = STEADY_RUNS) -> bool:
    """Whether the last `window` times have a median within 5% of that of as many before them."""
    if len(times_ms) < 2 * window:
        return False
    before = statistics.median(times_ms[-2 * window : -window])
    now = statistics.median(times_ms[-window:])
    return abs(now - before) <= STEADY_CHANGE * before


def planned_runs(typical_ms: float, runs: int, max_runs: int, timed_s: float = TIMED_S) -> int:
    """How many runs to time: `timed_s` worth, at least `runs` and at most `max_runs`."""
    return max(runs, min(max_runs, int(1000 * timed_s / max(typical_ms, 1e-6))))


def time_runs(model: Model, runs: int) -> list[float]:
    """`runs` latencies in milliseconds, in order."""
    invoke, clock = model.bare_invoke, time.perf_counter_ns
    times_ns = [0] * runs
    for index in range(runs):
        started = clock()
        invoke()
        times_ns[index] = clock() - started
    return [nanoseconds / 1e6 for nanoseconds in times_ns]


def _since_ms(started_ns: int) -> float:
    return (time.perf_counter_ns() - started_ns) / 1e6


def _main(job: dict, emit: Callable[..., None]) -> dict:
    if platform.python_implementation() != "CPython":
        raise ModelRefused("The runtimes need CPython", received=platform.python_implementation())
    return measure_latency(job, emit)


if __name__ == "__main__":
    serve(_main)
