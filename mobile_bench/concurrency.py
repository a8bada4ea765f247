"""Several streams at once: how many images a second a machine serves when processes share it.

Started as `python -m mobile_bench.concurrency job.json`, it starts one process for each stream, each with its own
interpreter. Each loads the file, warms up and waits; then all get the same moment of the system's monotonic clock, run
from before it to after the end of the window, and count what lies in it, so that all streams are busy all the time
that counts.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_bench.errors import DelegateError, InputError, JobFailed, ModelRefused, TransportError
from mobile_bench.jobs import OnProgress, follow, outcome, serve, write_job
from mobile_bench.records import Connection, Measurement, Target

if TYPE_CHECKING:
    from mobile_bench.inputs import InputSpec

MOST_STREAMS = 64
#: From the signal to the window: all streams run, nothing is counted. The window is never longer than MOST_S.
_LEAD_S, _MOST_S = 0.3, 60.0


@dataclass(frozen=True)
class Streams:
    """What N streams did together. measurement: of kind 'stream', its rounds are the streams; 'refused' or 'failed'
    with its reason where they could not run. rates_fps: images a second of each stream.
    """

    measurement: Measurement
    streams: int
    rates_fps: tuple[float, ...] = ()

    @property
    def fps(self) -> float:
        """Images a second of all streams together."""
        return sum(self.rates_fps)

    def efficiency(self, single_fps: float) -> float:
        """throughput(N) / (N throughput(1)): 1 where the streams do not hinder each other."""
        return self.fps / (self.streams * single_fps)

    def per_stream(self) -> list[dict]:
        """For each stream its median_ms, p99_ms, fps and count of inferences."""
        from mobile_bench.stats import percentiles

        found, values = [], iter(self.measurement.latency_ms)
        counts = self.measurement.rounds or (len(self.measurement.latency_ms),)
        for count, fps in zip(counts, self.rates_fps):
            mine = [next(values) for _ in range(count)]
            median_ms, p99_ms = percentiles(mine, (50, 99))
            found.append({"median_ms": median_ms, "p99_ms": p99_ms, "fps": fps, "count": count})
        return found


def measure_streams(
    tflite: str | Path, streams: int, target: Target = Target(), *, connection: Connection | None = None,  # noqa: B008 - frozen
    batch: int = 1, runs: int = 30, seconds: float = 2.0, spec: InputSpec | None = None, resize: bool = False,
    seed: int = 0, on_progress: OnProgress | None = None, timeout_s: float = 900, wait_s: float = 3600,
) -> Streams:  # fmt: skip
    """Run `streams` processes on one file at once, for `seconds` or as long as `runs` inferences of each may take.

    target.threads: of each stream. Raises InputError for what makes no sense to try, and for a phone by adb.
    """
    from mobile_bench.files import sha256_of
    from mobile_bench.lock import one_at_a_time
    from mobile_bench.measure import check_can_run
    from mobile_bench.transports import transport_for

    if not isinstance(streams, int) or not 1 <= streams <= MOST_STREAMS:
        raise InputError("The number of streams is out of range", received=streams, allowed=f"1 to {MOST_STREAMS}")
    if target.transport == "adb":
        raise InputError("Streams cannot be measured by adb: the phone has no Python", received=target.name)
    check_can_run(target)
    job = {
        "streams": streams, "threads": target.threads, "runtime": target.runtime, "batch": batch, "runs": runs,
        "seconds": seconds, "seed": seed, "resize": resize, "spec": spec.to_dict() if spec else None,
    }  # fmt: skip
    facts = {"run_id": uuid.uuid4().hex[:8], "kind": "stream", "sha256": sha256_of(tflite), "target": target,
             "batch": batch}  # fmt: skip
    transport = transport_for(target, connection)
    with one_at_a_time(transport.place, wait_s=wait_s, on_progress=on_progress):
        facts["started_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            with transport:
                found = transport.run(
                    "mobile_bench.concurrency", job, files={"tflite": Path(tflite)}, on_progress=on_progress,
                    timeout_s=timeout_s,
                )  # fmt: skip
        except (ModelRefused, DelegateError) as refusal:
            return Streams(Measurement(**facts, status="refused", reason=str(refusal)), streams)
        except (JobFailed, TransportError) as failure:
            return Streams(Measurement(**facts, status="failed", reason=str(failure)), streams)
    rates = tuple(found.pop("rates_fps"))
    return Streams(Measurement(**facts, **found, status="ok"), streams, rates)


def run_together(job: dict, emit: Callable[..., None]) -> dict:
    """The child's side: start the streams, line them up, gather what they say."""
    from mobile_bench import device, trust

    facts, load_average = device.describe(), device.load_average()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mobile-bench-streams-")))
        children = [stack.enter_context(_Stream(job, number, folder)) for number in range(job["streams"])]
        ready_ms = [child.wait_ready() for child in children]
        # Streams that share cores take turns.
        turns = max(1.0, job["streams"] * job["threads"] / facts.get("cores", 1))
        window_s = min(_MOST_S, max(job["seconds"], job["runs"] * turns * max(ready_ms) / 1000))
        emit("log", text=f"{job['streams']} stream(s) for {window_s:.1f} s")
        before, start = trust.read_state(), time.monotonic() + _LEAD_S
        for child in children:
            child.tell(f"{start} {start + window_s}\n")
        found = [child.result() for child in children]
        during = trust.between(before, trust.read_state())
    own = {child.pid for child in children}
    others = [process for process in during.get("busy", []) if process["pid"] not in own]
    during = {**during, "busy": others, "busy_cores": round(sum(process["cores"] for process in others), 3)}
    warnings = trust.warnings_of(facts, load_average, job["threads"], during, True, 0)
    return {
        "rates_fps": [answer["fps"] for answer in found],
        "latency_ms": [value for answer in found for value in answer["latency_ms"]],
        "rounds": [len(answer["latency_ms"]) for answer in found] if len(found) > 1 else (),
        "load_ms": statistics.median(answer["load_ms"] for answer in found),
        "peak_rss_bytes": sum(answer["peak_rss_bytes"] or 0 for answer in found) or None,
        "input_shape": found[0]["input_shape"], "load_average": load_average, "warnings": warnings,
        "device": {**facts, "runtime": found[0]["runtime"], "runtime_version": found[0]["runtime_version"],
                   "during": [during]},
    }  # fmt: skip


class _Stream:
    """One process of its own, seen from the one that lines them up."""

    def __init__(self, job: dict, number: int, folder: Path):
        path, self._log = folder / f"{number}.json", folder / f"{number}.txt"
        write_job(path, {**job, "seed": job["seed"] + number, "alone": True})
        with open(self._log, "wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "mobile_bench.concurrency", str(path)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, env=dict(os.environ),
            )  # fmt: skip
        self.pid = self._child.pid

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.stdout.close()
        self._child.stdin.close()
        self._child.wait()

    def wait_ready(self) -> float:
        """The median of its warm-up in ms; raises what went wrong where it ended instead."""
        found: list[float] = []
        lines = iter(self._child.stdout.readline, b"")
        final = follow(_until(lines, found), lambda message: found.append(message["median_ms"]))
        if not found:
            self._finish(final)
        return found[0]

    def tell(self, text: str) -> None:
        try:
            self._child.stdin.write(text.encode())
            self._child.stdin.flush()
        except OSError:
            pass  # it has ended; result() says why

    def result(self) -> dict:
        return self._finish(follow(self._child.stdout))

    def _finish(self, final: dict | None) -> dict:
        self._child.wait()
        return outcome(
            final, self._child.returncode, process="A stream", verdict="",
            log=lambda: self._log.read_text(errors="replace"),
            next_step="If the memory was short, run fewer streams",
        )  # fmt: skip


def _until(lines, found: list):
    """Lines up to the one that fills `found`."""
    for line in lines:
        yield line
        if found:
            return


def run_alone(job: dict, emit: Callable[..., None]) -> dict:
    """One stream: load, warm up, say so, wait for the moment, and run until the window is over."""
    from mobile_bench import device
    from mobile_bench.inputs import InputSpec
    from mobile_bench.interpreter import load_runtime, open_model
    from mobile_bench.worker import random_inputs, warm_up

    load_runtime(job["runtime"])
    spec = InputSpec.from_dict(job["spec"]) if job["spec"] else None
    started = time.perf_counter()
    model = open_model(
        job["tflite"], job["threads"], job["runtime"], batch=job["batch"],
        size=(spec.height, spec.width) if spec else None, resize=job.get("resize", False),
    )  # fmt: skip
    load_ms = 1000 * (time.perf_counter() - started)
    model.set_inputs(*random_inputs(model, spec, job["seed"] % 2**32))
    model.run()
    warmup_ms, _ = warm_up(model)
    emit("progress", median_ms=statistics.median(warmup_ms))
    line = sys.stdin.readline()
    if not line:
        raise JobFailed("A stream was never started")
    start, end = map(float, line.split())
    latency_ms, last = _run_until(model.bare_invoke, start, end)
    return {
        "latency_ms": latency_ms, "fps": job["batch"] * len(latency_ms) / (last - start), "load_ms": load_ms,
        "peak_rss_bytes": device.peak_rss_bytes(), "input_shape": model.inputs[0].shape if model.inputs else (),
        "runtime": model.runtime.name, "runtime_version": model.runtime.version,
    }  # fmt: skip


def _run_until(
    invoke: Callable[[], None], start: float, end: float, clock: Callable[[], float] = time.monotonic
) -> tuple[list[float], float]:
    """Latencies in ms of the inferences that end after `start` and by `end`, and when the last of them ended.

    It runs until one ends after `end`; that one counts only where it is the only one. The first may have begun before
    the start: it counts, as the last, cut off by the end, does not.
    """
    latency_ms, last = [], -math.inf
    while True:
        begun = clock()
        invoke()
        ended = clock()
        if ended > start and (ended <= end or not latency_ms):
            latency_ms.append(1000 * (ended - begun))
            last = ended
        if ended > end:
            return latency_ms, last


def _main(job: dict, emit: Callable[..., None]) -> dict:
    return run_alone(job, emit) if job.get("alone") else run_together(job, emit)


if __name__ == "__main__":
    serve(_main)
