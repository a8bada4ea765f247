"""What the modules that run on other targets mean for a device that has only benchmark_model."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mobile_bench import benchmark_model, trust
from mobile_bench.energy import Reading
from mobile_bench.errors import InputError
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import OnProgress
from mobile_bench.sustained import Window
from mobile_bench.transports import android

if TYPE_CHECKING:
    from mobile_bench.transports.adb import Adb

#: Timed runs of one invocation, and those before them.
RUNS_PER_SAMPLE, WARMUP_RUNS = 10, 2
#: Samples after which a measurement may end early, where the next one might pass its time limit.
FEW_SAMPLES = 5
#: Turns of a comparison's round, at least: their median is the round's ratio.
MIN_TURNS = 3
#: A sustained run has so many windows at least, of so many seconds at most.
_WINDOWS, _WINDOW_S = 30, 10.0


@dataclass(frozen=True)
class Task:
    """One job: its files here and their names there, and when it must be over (time.monotonic)."""

    session: Adb
    job: dict
    here: list[Path]
    there: list[str]
    tell: OnProgress
    deadline: float
    timeout_s: float | None

    def shapes(self, index: int) -> tuple[dict | None, tuple[int, ...]]:
        specs = self.job["specs"] if "specs" in self.job else [self.job.get("spec")]
        spec = InputSpec.from_dict(specs[index]) if specs[index] else None
        return benchmark_model.wanted_shapes(self.here[index], self.job.get("batch", 1), spec)

    def sample(self, index: int, runs: int, **options) -> benchmark_model.Report:
        return self.session.invoke(
            self.there[index], self.job, self.deadline, runs=runs, warmup_runs=WARMUP_RUNS,
            inputs=self.shapes(index)[0], **options,
        )  # fmt: skip

    def facts(self, facts: dict, sample: benchmark_model.Report, during: dict) -> dict:
        kernels = sample.delegate_kernels
        return {
            **facts,
            "runtime": "benchmark_model",
            "runtime_version": self.session.tool_version,
            "sample": f"average of {sample.runs} runs of one invocation",
            "delegated": sample.delegated,
            **({} if kernels is None else {"delegate_kernels": kernels}),
            "during": during,
        }


def measure_there(task: Task) -> dict:
    """mobile_bench.worker: each sample is the average of one invocation."""
    job, longest_s = task.job, 0.0
    task.tell({"kind": "progress", "stage": "load"})
    before, facts = task.session.state()
    load_average = facts.pop("load_average", None)
    samples, wanted = [], job["runs"]
    inner = max(1, min(RUNS_PER_SAMPLE, job.get("max_runs", wanted) // wanted))
    task.tell({"kind": "progress", "stage": "timing", "runs": wanted})
    for _ in range(wanted):
        started = time.monotonic()
        if len(samples) >= FEW_SAMPLES and started + 2 * longest_s > task.deadline:
            break
        samples.append(task.sample(0, inner))
        longest_s = max(longest_s, time.monotonic() - started)
    during = android.changes(before, task.session.state()[0])
    warnings = trust.warnings_of(facts, load_average, job["threads"], during, True, WARMUP_RUNS)
    warnings += benchmark_model.doubts(samples, wanted, task.timeout_s)
    peaks = [sample.peak_memory_bytes for sample in samples if sample.peak_memory_bytes is not None]
    return {
        "load_ms": samples[0].init_ms,
        "first_inference_ms": samples[0].first_inference_ms,
        "warmup_ms": (),
        "latency_ms": [sample.avg_ms for sample in samples],
        "input_shape": task.shapes(0)[1],
        "peak_rss_bytes": max(peaks, default=None),
        "base_rss_bytes": None,
        "device": task.facts(facts, samples[-1], during),
        "load_average": load_average,
        "warnings": warnings,
    }


def compare_there(task: Task) -> dict:
    """mobile_bench.interleave: a block is one invocation, with one value, its average."""
    job, count = task.job, len(task.here)
    order = np.random.default_rng(job["order_seed"])
    before, facts = task.session.state()
    load_average = facts.pop("load_average", None)
    blocks: list[list[list[float]]] = []
    end = time.monotonic() + job["seconds"]
    while len(blocks) < MIN_TURNS or time.monotonic() < end:
        turn: list[list[float]] = [[]] * count
        for index in order.permutation(count):
            sample = task.sample(index, RUNS_PER_SAMPLE)
            turn[index] = [sample.avg_ms]
        blocks.append(turn)
    during = android.changes(before, task.session.state()[0])
    return {
        "blocks": blocks,
        "device": task.facts(facts, sample, during),
        "load_average": load_average,
        "warnings": trust.warnings_of(facts, load_average, job["threads"], during, True, WARMUP_RUNS),
    }


def profile_there(task: Task) -> dict:
    """mobile_bench.profile: the tool's own table of operations, and the same runs without it."""
    runs = task.job["runs"]
    plain = task.sample(0, runs)
    profiled = task.sample(0, runs, profile="profile.csv")
    ops = benchmark_model.parse_op_profile(task.session.read("profile.csv").decode(errors="replace"))
    return {
        "ops": [asdict(op) for op in ops],
        "unprofiled_median_ms": plain.avg_ms if plain.median_ms is None else plain.median_ms,
        "profiled_median_ms": profiled.avg_ms if profiled.median_ms is None else profiled.median_ms,
        "runtime": f"benchmark_model {task.session.tool_version}",
    }


def sustain_there(task: Task) -> dict:
    """mobile_bench.sustained_worker: each window is one invocation of a few seconds, and loads the file anew."""
    job, tell = task.job, task.tell
    window_s = max(1.0, min(_WINDOW_S, job["seconds"] / _WINDOWS))
    gauge = _Gauge(task, job["energy"])
    tell({"kind": "progress", "source": gauge.source, "text": f"running for {job['seconds']:g} s"})
    before, facts = task.session.state()
    load_average = facts.pop("load_average", None)
    if gauge.source and job["idle_s"]:
        tell({"kind": "progress", "text": f"measuring the idle device for {job['idle_s']:g} s"})
        tell({"kind": "progress", "idle": gauge.read()})
        time.sleep(job["idle_s"])
        tell({"kind": "progress", "idle": gauge.read()})
    tell({"kind": "progress", "reading": gauge.read()})
    start, count = time.monotonic(), 0
    while (begun := time.monotonic()) - start < job["seconds"]:
        sample = task.sample(0, 1, min_secs=window_s, max_secs=window_s)
        count += 1
        state, now = android.read(said := task.session.said())
        heat_c = now.get("battery_temperature_c") if state.temperature_c is None else state.temperature_c
        window = Window(
            begun - start, max(1e-9, sample.avg_ms * sample.runs / 1000), sample.runs,
            sample.avg_ms if sample.median_ms is None else sample.median_ms, None, sample.max_ms,
            temperature_c=heat_c, frequency_mhz=state.frequency_mhz,
        )  # fmt: skip
        tell({
            "kind": "progress", "window": asdict(window), "reading": gauge.read(said),
            "facts": task.facts(facts, sample, {}),
        })  # fmt: skip
    during = android.changes(before, task.session.state()[0])
    warnings = trust.warnings_of(facts, load_average, job["threads"], during, True, WARMUP_RUNS)
    if gauge.source:
        warnings.append(f"the energy holds loading and warming up {count} times, once a window of {window_s:g} s")
    if state.temperature_c is None and heat_c is not None:
        warnings.append("the temperature is the battery's: this phone does not tell its processor's")
    return {"device": {"during": during}, "warnings": warnings + gauge.warnings}


class _Gauge:
    """The phone's battery as a source of energy, where it was asked for and tells something."""

    def __init__(self, task: Task, choice: str):
        self._task, self.source, self.warnings = task, None, []
        self._clock = choice == "clock"
        if choice == "rapl":
            raise InputError(
                "A phone has no RAPL counters", received="--energy rapl", allowed="auto, battery, none or FILE.csv"
            )
        if choice not in ("auto", "battery"):
            return
        facts, _, why_not = android.battery(task.session.said())
        if why_not and choice == "battery":
            raise InputError("The battery cannot tell what is used", received=why_not, allowed="auto, none, FILE.csv")
        if why_not:
            self.warnings.append(f"energy: {why_not}")
        else:
            self.source = facts

    def read(self, said: str = "") -> dict | None:
        if self.source is None and not self._clock:
            return None
        values = () if self._clock else android.battery(said or self._task.session.said())[1]
        if not values and not self._clock:
            self._task.tell({"kind": "progress", "trouble": "the battery stopped discharging on the way"})
            return None
        return asdict(Reading(time.monotonic(), time.time(), values))


JOBS = {
    "mobile_bench.worker": measure_there,
    "mobile_bench.interleave": compare_there,
    "mobile_bench.profile": profile_there,
    "mobile_bench.sustained_worker": sustain_there,
}
