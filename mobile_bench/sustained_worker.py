"""The process of a sustained run: inferences for minutes, and every second what they took. Started by sustained."""

from __future__ import annotations

import gc
import math
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from mobile_bench import device, trust
from mobile_bench.energy import Clock, Source, closed_sources, find_source
from mobile_bench.errors import Problem
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import Model, open_model
from mobile_bench.jobs import serve
from mobile_bench.sustained import Window
from mobile_bench.worker import STEADY_CHANGE, random_inputs, warm_up

_WINDOW_NS = 1_000_000_000


def _child(job: dict, emit: Callable[..., None]) -> dict:
    spec = InputSpec.from_dict(job["spec"]) if job["spec"] else None
    facts, load_average = device.describe(job["root"]), device.load_average()
    source = Clock() if job["energy"] == "clock" else find_source(job["energy"], job["root"])
    emit(source=source.facts if source else None)
    emit(text="loading")
    size = (spec.height, spec.width) if spec else None
    model = open_model(job["tflite"], job["threads"], job["runtime"], size=size)
    model.set_inputs(*random_inputs(model, spec, job["seed"]))
    model.run()
    facts = {**facts, "runtime": model.runtime.name, "runtime_version": model.runtime.version}
    emit(facts=facts)
    if source and job["idle_s"]:
        emit(text=f"measuring the idle machine for {job['idle_s']:g} s")
        emit(idle=_reading(source, emit))
        time.sleep(job["idle_s"])
        emit(idle=_reading(source, emit))
    emit(text="warming up")
    warmup_ms, steady = warm_up(model)
    emit(text=f"running for {job['seconds']:g} s")
    before = trust.read_state(job["root"])
    gc.collect()
    gc.disable()
    run_windows(model, job["seconds"], job["fps"], lambda window: _tell(window, source, job["root"], emit))
    during = trust.between(before, trust.read_state(job["root"]))
    warnings = trust.warnings_of(
        facts, load_average, job["threads"], during, steady, len(warmup_ms), STEADY_CHANGE
    )  # fmt: skip
    if source is None and job["energy"] == "auto":
        warnings += [f"energy: {text}" for text in closed_sources(job["root"])]
    return {"device": {"during": during}, "warnings": warnings}


def run_windows(model: Model, seconds: float, fps: float | None, tell: Callable[[Window | None], None]) -> None:
    """Run it for so long; `tell` gets None at the start, and then each window as it ends.

    A window ends with the first inference that is done a second or more after the window began; a rest of less than
    half a second is left out. With fps, turn n is at n / fps after the start; of those that pass while an inference is
    under way only the last is made up for, and the others are missed.
    """
    invoke, clock = model.bare_invoke, time.perf_counter_ns
    period_ns = 1e9 / fps if fps else 0.0
    turns = math.ceil(seconds * fps) if fps else 0
    tell(None)
    start = window_start = clock()
    end, turn, missed = start + round(seconds * 1e9), 0, 0
    times_ns, first = array("q"), True
    while True:
        if period_ns:
            due = start + round(turn * period_ns)
            if due >= end:
                break
            while (early_ns := due - clock()) > 0:
                time.sleep(early_ns / 1e9)
        began = clock()
        invoke()
        done = clock()
        times_ns.append(done - began)
        if period_ns:
            next_turn = max(turn + 1, min(turns, int((done - start) / period_ns)))
            missed += next_turn - turn - 1
            turn = next_turn
        if done - window_start >= _WINDOW_NS or (done >= end and first):
            tell(_window((window_start - start) / 1e9, (done - window_start) / 1e9, times_ns, missed))
            times_ns, missed, window_start, first = array("q"), 0, clock(), False
        if done >= end:
            break
    passed_ns = clock() - window_start
    if len(times_ns) and (first or passed_ns >= _WINDOW_NS // 2):
        tell(_window((window_start - start) / 1e9, passed_ns / 1e9, times_ns, missed))


def _window(start_s: float, seconds: float, times_ns: array, missed: int) -> Window:
    median, p99, most = (float(v) / 1e6 for v in np.percentile(np.frombuffer(times_ns, np.int64), (50, 99, 100)))
    return Window(start_s, seconds, len(times_ns), median, p99, most, missed)


def _tell(window: Window | None, source: Source | None, root: str, emit: Callable[..., None]) -> None:
    reading = _reading(source, emit) if source else None
    if window is None:
        emit(reading=reading)
        return
    state = {
        "temperature_c": trust.temperature_c(root),
        "frequency_mhz": device.describe(root).get("frequency_mhz"),
    }
    emit(window={**asdict(window), **state}, reading=reading)


def _reading(source: Source, emit: Callable[..., None]) -> dict | None:
    """What the source says now; where it has nothing to say any more, the run goes on without energy."""
    try:
        return asdict(source.read())
    except Problem as problem:
        emit(trouble=str(problem))
        return None


if __name__ == "__main__":
    serve(_child)
