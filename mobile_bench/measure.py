"""How fast a .tflite is: one measurement, in a fresh process, with nothing else timed beside it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from mobile_bench.errors import DelegateError, InputError, JobFailed, ModelRefused, TransportError, unknown_name
from mobile_bench.files import sha256_of
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import OnProgress
from mobile_bench.lock import one_at_a_time
from mobile_bench.records import Connection, Measurement, Target
from mobile_bench.targets import Place
from mobile_bench.transports import transport_for

_LOCAL = Target()


def measure(
    tflite: str | Path, target: Target = _LOCAL, *, connection: Connection | None = None, batch: int = 1,
    runs: int = 50, max_runs: int = 1000, spec: InputSpec | None = None, seed: int = 0,
    on_progress: OnProgress | None = None, timeout_s: float = 900, wait_s: float = 3600, kind: str = "latency",
) -> Measurement:  # fmt: skip
    """Time the inference of one file on one target.

    A fresh process loads the file (load_ms, the runtime already imported), runs it once
    (first_inference_ms), warms up until the times are steady, then times at least `runs` inferences, more
    for a fast model until they fill a second, never more than the larger of `runs` and `max_runs`. Each
    sample is one call of the runtime's invoke on `batch` images, by time.perf_counter_ns: the input is
    in place before the clock starts, and the output is not read. Inputs are random, the same for the
    same seed, scaled by `spec` where it fits. kind: 'latency', or 'sweep' for a point of one.

    A file that the runtime refuses, or a delegate that does not really run it, gives a Measurement of status
    'refused'; a crash, a passed timeout_s or a device that cannot be reached one of status 'failed', each with
    its reason. connection: how to get there, for a target that is not this machine. InputError is raised for
    what makes no sense to try: no such file, an unknown runtime, an accelerator or transport that is not there.
    Waits up to wait_s for another measurement on the same machine, and says so through on_progress.
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
    transport = transport_for(target, connection)
    with one_at_a_time(transport.place, wait_s=wait_s, on_progress=on_progress):
        facts["started_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            with transport:
                found = transport.run(
                    "mobile_bench.worker", job, files={"tflite": Path(tflite)}, on_progress=on_progress,
                    timeout_s=timeout_s,
                )  # fmt: skip
        except (ModelRefused, DelegateError) as refusal:
            return Measurement(**facts, status="refused", reason=str(refusal))
        except (JobFailed, TransportError) as failure:
            return Measurement(**facts, status="failed", reason=str(failure))
    return Measurement(**facts, status="ok", **found)


def measure_on(
    places: Sequence[Place], tflite: str | Path, *, on_progress: Callable[[Place, dict], None] | None = None, **options
) -> list[Measurement]:
    """`measure` on several places at once, in their order; one that fails is a record, and the others go on.

    on_progress(place, message) is called from several threads. options are those of `measure`.
    """

    def one(place: Place) -> Measurement:
        relay = (lambda message: on_progress(place, message)) if on_progress else None
        return measure(tflite, place.target, connection=place.connection, on_progress=relay, **options)

    if len(places) == 1:  # in this thread: an interrupt ends it at once
        return [one(places[0])]
    for place in places:
        check_can_run(place.target)
        transport_for(place.target, place.connection)
    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places))


def check_can_run(target: Target) -> None:
    """Raise InputError for an accelerator or a runtime that is not there."""
    from mobile_bench.interpreter import RUNTIMES

    if target.transport == "adb":
        allowed, runtimes = ("cpu", "gpu", "nnapi", "external"), ("auto",)
    else:
        allowed, runtimes = ("cpu",), ("auto", *RUNTIMES)
    if target.accelerator not in allowed:
        raise InputError(
            f"This version does not measure on that accelerator by {target.transport}", received=target.accelerator,
            allowed=", ".join(allowed),
        )  # fmt: skip
    if target.runtime not in runtimes:
        raise unknown_name("runtime", target.runtime, runtimes)
