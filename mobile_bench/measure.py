"""How fast a .tflite is: one measurement, in fresh processes, with nothing else timed beside it."""

from __future__ import annotations

import math
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from mobile_bench import trust
from mobile_bench.errors import (
    DelegateError,
    InputError,
    Interrupted,
    JobFailed,
    ModelRefused,
    Problem,
    TransportError,
    unknown_name,
)
from mobile_bench.files import sha256_of
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import OnProgress
from mobile_bench.lock import one_at_a_time
from mobile_bench.records import Connection, Delegate, Measurement, Target
from mobile_bench.stats import rounds_interval
from mobile_bench.targets import Place
from mobile_bench.transports import transport_for

#: Rounds at least, the interval's width to stop at, and the time after which no further round begins.
ROUNDS, WIDTH, SECONDS = 3, 0.02, 1.5
MOST_RUNS = 100_000
_LOCAL = Target()


def measure(
    tflite: str | Path, target: Target = _LOCAL, *, connection: Connection | None = None, batch: int = 1,
    runs: int = 50, max_runs: int = 1000, rounds: int = ROUNDS, width: float = WIDTH,
    seconds: float = SECONDS, spec: InputSpec | None = None, resize: bool = False, seed: int = 0,
    delegate: Delegate | None = None, on_progress: OnProgress | None = None, timeout_s: float = 900,
    wait_s: float = 3600, kind: str = "latency",
) -> Measurement:  # fmt: skip
    """Time the inference of one file on one target, in several rounds.

    Each round is a fresh process: it loads the file (load_ms, the runtime already imported), runs it once
    (first_inference_ms), warms up until the times are steady, and times its share of at least `runs`
    inferences, more for a fast model until `rounds` of them fill a second, never more in all than the larger of
    `runs` and `max_runs` for each `rounds`. Each sample is one call of the runtime's invoke on `batch` images, by
    time.perf_counter_ns: the input is in place before the clock starts, and the output is not read. Inputs are
    random, the same for the same seed, scaled by `spec` where it fits.

    There are `rounds` rounds, and then more until the 95% interval of the median is narrower than `width` times
    the median, or until `seconds` have passed; 0 makes it exactly `rounds`. By adb there is one round, in which
    each sample is a process of its own. kind: 'latency', or 'sweep' for a point of one.

    resize: run it with the size that `spec` says even where the file fixes another one (on the CPU).

    delegate: how an accelerator other than the CPU is reached, and what its answers are compared with before
    anything is timed.

    A file that the runtime refuses, or a delegate that does not really run it or answers otherwise than the CPU,
    gives a Measurement of status 'refused'; a crash, a passed timeout_s (of one round) or a device that cannot be
    reached one of status 'failed', each with its reason, and with the samples of the rounds before. connection: how
    to get there, for a target that is not this machine. InputError is raised for what makes no sense to try: no
    such file, an unknown runtime, an accelerator or transport that is not there. Waits up to wait_s for another
    measurement on the same machine, and says so through on_progress. A KeyboardInterrupt becomes Interrupted with
    the Measurement of the rounds that had ended, where there are any; one of its warnings says so.
    """
    if target.transport == "adb":
        rounds, seconds = 1, 0.0
    for name, value, most in (
        ("batch", batch, 4096), ("runs", runs, MOST_RUNS), ("max_runs", max_runs, MOST_RUNS), ("rounds", rounds, 1000),
    ):  # fmt: skip
        if not isinstance(value, int) or not 1 <= value <= most:
            raise InputError(f"{name} is out of range", received=value, allowed=f"1 to {most}")
    if not 0 < width < 10:
        raise InputError(
            "The width of the interval is out of range", received=f"{100 * width:g}%",
            allowed="above 0% and below 1000% of the median",
        )  # fmt: skip
    if not 0 <= seconds <= 1e6:
        raise InputError("seconds is out of range", received=seconds, allowed="0 to 1000000")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError("seed is out of range", received=seed, allowed="0 to 4294967295")
    check_can_run(target)
    facts = {"kind": kind, "sha256": sha256_of(tflite), "target": target, "batch": batch}
    facts["run_id"] = uuid.uuid4().hex[:8]
    job = {
        "threads": target.threads, "runtime": target.runtime, "batch": batch, "runs": math.ceil(runs / rounds),
        "max_runs": max(1, max_runs // rounds), "timed_s": 1 / rounds, "seed": seed, "resize": resize,
        "spec": spec.to_dict() if spec else None,
    }  # fmt: skip
    reference = accelerator_job(job, target, delegate)
    if reference and target.transport == "adb":
        raise InputError(
            "A phone's tool times a file and compares it with no other", received=f"--reference {reference}",
            next_step="Leave it out, and see what the phone answers with: mobile-bench evaluate",
        )  # fmt: skip
    files = {"tflite": Path(tflite)} | ({"reference": reference} if reference else {})
    transport = transport_for(target, connection)
    found: list[dict] = []
    with one_at_a_time(transport.place, wait_s=wait_s, on_progress=on_progress):
        facts["started_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        started = time.monotonic()
        try:
            with transport:
                while len(found) < rounds or (time.monotonic() - started < seconds and _width(found) > width):
                    found.append(
                        transport.run(
                            "mobile_bench.worker", job, files=files,
                            on_progress=_relay(on_progress, len(found)), timeout_s=timeout_s,
                        )
                    )  # fmt: skip
                    if on_progress and rounds > 1:
                        on_progress(_state(found))
                    trust.check_same_machine([answer["device"] for answer in found])
        except (ModelRefused, DelegateError) as refusal:
            return Measurement(**facts, **_together(found), status="refused", reason=str(refusal))
        except (JobFailed, TransportError) as failure:
            return Measurement(**facts, **_together(found), status="failed", reason=str(failure))
        except KeyboardInterrupt:
            if not found:
                raise
            kept = _together(found)
            kept["warnings"] = (*kept["warnings"], f"interrupted after {len(found)} of at least {rounds} process(es)")
            raise Interrupted(Measurement(**facts, **kept, status="ok")) from None
    return Measurement(**facts, **_together(found), status="ok")


def accelerator_job(job: dict, target: Target, delegate: Delegate | None) -> Path | None:
    """Add to a job what it needs on another processor than the CPU; the reference file where there is one."""
    delegate = delegate or Delegate()
    if target.accelerator == "cpu":
        if delegate != Delegate():
            given = {
                f"--delegate {delegate.library}": delegate.library, "--allow-fallback": delegate.allow_fallback,
                "--delegate-option " + " ".join(f"{k}={v}" for k, v in delegate.options.items()): delegate.options,
                f"--reference {delegate.reference}": delegate.reference,
            }  # fmt: skip
            raise InputError(
                "These options are for another processor than the CPU",
                received=", ".join(text for text, value in given.items() if value),
                next_step="Leave them out, or say which processor with --accelerator gpu, edgetpu or external",
            )
        return None
    job |= {
        "accelerator": target.accelerator, "delegate": delegate.library, "delegate_options": dict(delegate.options),
        "allow_fallback": delegate.allow_fallback,
    }  # fmt: skip
    if target.transport == "adb" and delegate.library:
        job["external_delegate_path"] = delegate.library
    return Path(delegate.reference) if delegate.reference else None


def _width(found: list[dict]) -> float:
    """The interval of the median as a share of it; infinite for one round."""
    if len(found) < 2:
        return math.inf
    low, high = rounds_interval([answer["latency_ms"] for answer in found])
    return high / low - 1


def _state(found: list[dict]) -> dict:
    median_ms = statistics.median(value for answer in found for value in answer["latency_ms"])
    shown = f", 95% interval {_width(found):.1%} wide" if len(found) > 2 else ""
    return {"kind": "progress", "stage": "round", "done": len(found), "median_ms": median_ms, "interval": shown}


def _relay(on_progress: OnProgress | None, done: int) -> OnProgress | None:
    """The stages of the first round are news; those of the others are not."""
    if on_progress is None or not done:
        return on_progress
    return lambda message: on_progress(message) if message.get("kind") != "progress" else None


def _together(found: list[dict]) -> dict:
    """One measurement's fields from what its rounds say."""
    if not found:
        return {}
    joined = {name: [value for answer in found for value in answer[name]] for name in ("warmup_ms", "latency_ms")}
    for name in ("load_ms", "first_inference_ms"):
        values = [answer[name] for answer in found if answer[name] is not None]
        joined[name] = statistics.median(values) if values else None
    for name in ("peak_rss_bytes", "base_rss_bytes", "load_average", "output_drift"):
        joined[name] = max((answer[name] for answer in found if answer.get(name) is not None), default=None)
    return {
        **found[0], **joined,
        "rounds": [len(answer["latency_ms"]) for answer in found] if len(found) > 1 else (),
        "device": {**found[0]["device"], "during": [answer["device"]["during"] for answer in found]},
        "warnings": trust.of_processes([answer["warnings"] for answer in found]),
    }  # fmt: skip


def measure_on(
    places: Sequence[Place], tflite: str | Path, *, on_progress: Callable[[Place, dict], None] | None = None, **options
) -> list[Measurement]:
    """`measure` on several places at once, in their order; one that fails is a record, and the others go on.

    on_progress(place, message) is called from several threads. options are those of `measure`. A KeyboardInterrupt
    becomes Interrupted with a list of what each place had measured, None for nothing, unless none had.
    """

    stopped = threading.Event()

    def one(place: Place) -> Measurement:
        def relay(message: dict) -> None:
            if stopped.is_set():
                raise KeyboardInterrupt
            if on_progress:
                on_progress(place, message)

        return measure(tflite, place.target, connection=place.connection, on_progress=relay, **options)

    def one_of_several(place: Place) -> Measurement:
        try:
            transport_for(place.target, place.connection)
        except InputError as error:  # what this one place lacks
            facts = {"run_id": uuid.uuid4().hex[:8], "started_at": datetime.now(UTC).isoformat(timespec="seconds")}
            return Measurement(
                **facts, kind=options.get("kind", "latency"), sha256=sha256_of(tflite), target=place.target,
                batch=options.get("batch", 1), status="refused", reason=str(error),
            )  # fmt: skip
        return one(place)

    if len(places) == 1:  # in this thread: an interrupt ends it at once
        try:
            return [one(places[0])]
        except Interrupted as interrupt:
            raise Interrupted([interrupt.kept]) from None
    for place in places:
        check_can_run(place.target)
    with ThreadPoolExecutor(len(places)) as pool:
        under_way = [pool.submit(one_of_several, place) for place in places]
        try:
            return [measured.result() for measured in under_way]
        except KeyboardInterrupt:
            stopped.set()
            kept = [_kept(measured) for measured in under_way]
    if not any(kept):
        raise KeyboardInterrupt
    raise Interrupted(kept)


def _kept(measured: Future) -> Measurement | None:
    """What a place has measured when all are stopped."""
    try:
        return measured.result()
    except Interrupted as interrupt:
        return interrupt.kept
    except (KeyboardInterrupt, Problem):
        return None


def check_can_run(target: Target) -> None:
    """Raise InputError for an accelerator or a runtime that is not there."""
    from mobile_bench.interpreter import RUNTIMES

    if target.transport == "adb":
        allowed, runtimes = ("cpu", "gpu", "nnapi", "external"), ("auto",)
    else:
        allowed, runtimes = ("cpu", "gpu", "edgetpu", "external"), ("auto", *RUNTIMES)
    if target.accelerator not in allowed:
        raise InputError(
            f"This version does not measure on that accelerator by {target.transport}", received=target.accelerator,
            allowed=", ".join(allowed),
        )  # fmt: skip
    if target.runtime not in runtimes:
        raise unknown_name("runtime", target.runtime, runtimes)
