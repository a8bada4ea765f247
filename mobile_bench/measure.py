"""How fast a .tflite is: one measurement, in a fresh process, with nothing else timed beside it."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from pathlib import Path

from mobile_bench.errors import InputError, JobFailed, ModelRefused, unknown_name
from mobile_bench.files import sha256_of
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import OnProgress
from mobile_bench.lock import one_at_a_time
from mobile_bench.records import Measurement, Target
from mobile_bench.transports import transport_for

_LOCAL = Target()


def measure(
    tflite: str | Path, target: Target = _LOCAL, *, batch: int = 1, runs: int = 50, max_runs: int = 1000,
    spec: InputSpec | None = None, seed: int = 0, on_progress: OnProgress | None = None,
    timeout_s: float = 900, wait_s: float = 3600, kind: str = "latency",
) -> Measurement:  # fmt: skip
    """Time the inference of one file on one target.

    A fresh process loads the file (load_ms, the runtime already imported), runs it once
    (first_inference_ms), warms up until the times are steady, then times at least `runs` inferences, more
    for a fast model until they fill a second, never more than the larger of `runs` and `max_runs`. Each
    sample is one call of the runtime's invoke on `batch` images, by time.perf_counter_ns: the input is
    in place before the clock starts, and the output is not read. Inputs are random, the same for the
    same seed, scaled by `spec` where it fits. kind: 'latency', or 'sweep' for a point of one.

    A file that the runtime refuses gives a Measurement of status 'refused', a crash or a passed
    timeout_s one of status 'failed', each with its reason. InputError is raised for what makes no sense
    to try: no such file, an unknown runtime, an accelerator or transport that is not there. Waits up to
    wait_s for another measurement on the same machine, and says so through on_progress.
    """
    for name, value, most in (("batch", batch, 4096), ("runs", runs, 100_000), ("max_runs", max_runs, 100_000)):
        if not isinstance(value, int) or not 1 <= value <= most:
            raise InputError(f"{name} is out of range", received=value, allowed=f"1 to {most}")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError("seed is out of range", received=seed, allowed="0 to 4294967295")
    check_can_run(target)
    facts = {"kind": kind, "sha256": sha256_of(tflite), "target": target, "batch": batch}
    facts["run_id"] = uuid.uuid4().hex[:8]
    job = {
        "threads": target.threads, "runtime": target.runtime, "batch": batch, "runs": runs,
        "max_runs": max_runs, "seed": seed, "spec": spec.to_dict() if spec else None,
    }  # fmt: skip
    transport = transport_for(target)
    with one_at_a_time(transport.place, wait_s=wait_s, on_progress=on_progress), transport:
        facts["started_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            found = transport.run(
                "mobile_bench.worker", job, files={"tflite": Path(tflite)}, on_progress=on_progress, timeout_s=timeout_s
            )
        except ModelRefused as refusal:
            return Measurement(**facts, status="refused", reason=str(refusal))
        except JobFailed as failure:
            return Measurement(**facts, status="failed", reason=str(failure))
    return Measurement(**facts, status="ok", **found)


def check_can_run(target: Target) -> None:
    """Raise InputError for an accelerator or a runtime that is not there."""
    from mobile_bench.interpreter import RUNTIMES

    if target.accelerator != "cpu":
        raise InputError(
            "This version measures on the CPU only", received=target.accelerator, allowed="cpu",
        )  # fmt: skip
    if target.runtime not in ("auto", *RUNTIMES):
        raise unknown_name("runtime", target.runtime, ("auto", *RUNTIMES))
