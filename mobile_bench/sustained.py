"""Minutes of inferences: does it stay as fast, when does it throttle, and what energy does an inference take?

A fresh process (mobile_bench.sustained_worker) reports every second what it did in it; the parent keeps that, so an
interrupt or a crash costs only what had not been measured yet. Times are by the monotonic clock; the wall clock says
when it began, and finds the run in the log of a meter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from mobile_bench import energy as energies
from mobile_bench.energy import Energy, MeterLog, Reading, Told
from mobile_bench.errors import InputError, JobFailed, Problem, TransportError
from mobile_bench.files import sha256_of
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import check_is_tflite
from mobile_bench.jobs import OnProgress
from mobile_bench.lock import one_at_a_time
from mobile_bench.records import Connection, Target
from mobile_bench.transports import transport_for

#: Throttled: medians that stay above the first ones by more than this, in nine windows of ten from then on.
EFFECT, STAYS = 0.03, 0.9
#: The chance of finding a change where there is none, and how often the order is drawn anew to see that.
LEVEL, _DRAWS = 0.01, 999
#: Windows at the start and at the end that are summed up, and the fewest that a change can be seen in.
EDGE, FEWEST = 10, 12
_LOCAL = Target()


@dataclass(frozen=True)
class Window:
    """About a second of the run. start_s: since it began. Times in ms of `count` inferences, without their inputs.

    missed: turns of a paced run that passed while an inference was still under way. temperature_c and frequency_mhz
    are None where the system does not say, p99_ms and max_ms where a phone's tool does not.
    """

    start_s: float
    seconds: float
    count: int
    median_ms: float
    p99_ms: float | None
    max_ms: float | None
    missed: int = 0
    temperature_c: float | None = None
    frequency_mhz: float | None = None


@dataclass(frozen=True)
class Sustained:
    """One run. status: 'ok'; 'interrupted' or 'failed' (with its reason), with the windows until then.

    fps: the pace, or None for back to back. energy is None where it was not measured.
    """

    sha256: str
    target: Target
    seconds: float
    fps: float | None
    status: str
    windows: tuple[Window, ...]
    reason: str = ""
    energy: Energy | None = None
    device: dict = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    started_at: str = ""

    def __post_init__(self):
        object.__setattr__(self, "windows", tuple(w if isinstance(w, Window) else Window(**w) for w in self.windows))
        object.__setattr__(self, "warnings", tuple(self.warnings))


@dataclass(frozen=True)
class Onset:
    """When it began to throttle: the window, the second, and how much slower it is from then on (0.2: by a fifth)."""

    window: int
    at_s: float
    slower: float
    p_value: float


@dataclass(frozen=True)
class SustainedSummary:
    """A Sustained in numbers. first_ms and last_ms: the median of the medians of the first and last ten windows;
    worst_ms: the largest median, at worst_at_s. onset: None where it did not throttle, and where `judged` is False
    because the run is too short to say. energy_mj is gross, net_mj above idling, both per inference.
    """

    windows: int
    inferences: int
    measured_s: float
    per_second: float
    missed: int
    first_ms: float
    last_ms: float
    change: float
    worst_ms: float
    worst_at_s: float
    judged: bool
    onset: Onset | None
    energy_mj: float | None
    net_mj: float | None
    energy_source: str
    temperature_c: tuple[float, float] | None
    frequency_mhz: tuple[float, float] | None


def sustain(
    tflite: str | Path, *, seconds: float = 300.0, target: Target = _LOCAL, connection: Connection | None = None,
    fps: float | None = None, energy: str = "auto", idle_s: float = 3.0, spec: InputSpec | None = None, seed: int = 0,
    on_progress: OnProgress | None = None, wait_s: float = 3600, root: str | Path = "/",
) -> Sustained:  # fmt: skip
    """Run a file on a target for `seconds`, back to back or `fps` times a second.

    energy: see mobile_bench.energy.find_source, of the target, but for a meter's log, which lies here; where there is
    a source, the idle machine is measured for idle_s before. on_progress also gets each window, as {'kind':
    'progress', 'window': {...}}. root: where /sys and /proc are there. A KeyboardInterrupt, a crash or a lost
    connection gives what was measured so far, if that is a window at least. Raises InputError, ModelRefused,
    JobFailed or TransportError where there is nothing to give.
    """
    if not 1 <= seconds <= 86_400:
        raise InputError("seconds is out of range", received=seconds, allowed="1 to 86400")
    if fps is not None and not 0 < fps <= 10_000:
        raise InputError("fps is out of range", received=fps, allowed="above 0, up to 10000")
    if not 0 <= idle_s <= 3600:
        raise InputError("idle_s is out of range", received=idle_s, allowed="0 to 3600")
    if target.accelerator != "cpu":
        raise InputError(
            "Sustained runs are made on the CPU", received=target.accelerator,
            next_step="Leave --accelerator out, or set accelerator = \"cpu\" for this target in the inventory",
        )  # fmt: skip
    if target.transport == "adb" and fps is not None:
        raise InputError(
            "A phone's tool runs back to back only", received=f"{fps:g} inferences a second",
            next_step="Leave --fps out",
        )  # fmt: skip
    check_is_tflite(tflite)
    logged = energy.lower().endswith(".csv")
    # A source that is named and cannot be used here is refused before anything runs.
    here = energies.find_source(energy, root) if logged or target.transport == "local" else None
    job = {
        "seconds": seconds, "fps": fps, "energy": "clock" if logged else energy, "idle_s": idle_s, "root": str(root),
        "threads": target.threads, "runtime": target.runtime, "seed": seed, "spec": spec.to_dict() if spec else None,
    }  # fmt: skip
    transport = transport_for(target, connection)
    heard = _Heard(on_progress)
    status, reason, ending = "ok", "", {}
    sha256 = sha256_of(tflite)
    with one_at_a_time(transport.place, wait_s=wait_s, on_progress=on_progress):
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            with transport:
                ending = transport.run(
                    "mobile_bench.sustained_worker", job, files={"tflite": Path(tflite)}, on_progress=heard,
                    timeout_s=2 * seconds + idle_s + 900,
                )  # fmt: skip
        except (KeyboardInterrupt, JobFailed, TransportError) as error:
            if not heard.windows:
                raise
            interrupted = isinstance(error, KeyboardInterrupt)
            status, reason = ("interrupted", "by Ctrl-C") if interrupted else ("failed", str(error))
    used, warnings = _energy_of(here if logged else heard.source, heard)
    return Sustained(
        sha256=sha256, target=target, seconds=seconds, fps=fps, status=status, reason=reason, windows=heard.windows,
        energy=used, device={**heard.facts, **ending.get("device", {})}, started_at=started_at,
        warnings=[*ending.get("warnings", ()), *warnings],
    )  # fmt: skip


def summarize_sustained(found: Sustained) -> SustainedSummary:
    """The numbers of a Sustained with a window at least."""
    windows = found.windows
    medians = [window.median_ms for window in windows]
    measured_s = sum(window.seconds for window in windows)
    inferences = sum(window.count for window in windows)
    first, last = statistics.median(medians[:EDGE]), statistics.median(medians[-EDGE:])
    worst = max(windows, key=lambda window: window.median_ms)
    judged, onset = find_onset(medians)
    if onset is not None:
        onset = Onset(onset.window, windows[onset.window].start_s, onset.slower, onset.p_value)
    fields = energies.fields_of(found.energy)
    return SustainedSummary(
        windows=len(windows), inferences=inferences, measured_s=measured_s, per_second=inferences / measured_s,
        missed=sum(window.missed for window in windows), first_ms=first, last_ms=last,
        change=last / first - 1 if first else 0.0, worst_ms=worst.median_ms, worst_at_s=worst.start_s,
        judged=judged, onset=onset, energy_mj=fields["energy_mj"], energy_source=fields["energy_source"],
        net_mj=found.energy.net_mj if found.energy else None,
        temperature_c=_ends(windows, "temperature_c"), frequency_mhz=_ends(windows, "frequency_mhz"),
    )  # fmt: skip


def find_onset(medians: Sequence[float], effect: float = EFFECT, level: float = LEVEL) -> tuple[bool, Onset | None]:
    """Whether there are windows enough to judge, and the Onset (at_s is its window's number) or None.

    Two means are fitted to the logarithms of the medians, smoothed over three windows, by least squares with one
    change between them (Bai 1994, Journal of Time Series Analysis 15:453). The change counts if it is one to
    slower, and if its sum of squares is larger than in all but `level` of the runs with the order drawn anew, by
    blocks because neighbours are alike (Antoch and Huskova 2001, Statistics & Probability Letters 53:37; blocks:
    Kirch 2007, Journal of Statistical Planning and Inference 137:2453). The onset is then the earliest window from
    which on nine of ten are slower than the first ones by more than `effect`: slow drifts have no one step, and what
    recovers is no throttling.
    """
    count = len(medians)
    if count < FEWEST:
        return False, None
    logs = _smoothed(np.log(np.maximum(np.asarray(medians, float), 1e-9)))
    found = _gain(logs[None])[0]
    if found <= 0:
        return True, None
    baseline = float(np.median(logs[: min(EDGE, count // 4)]))
    slow = logs > baseline + math.log1p(effect)
    stays = np.cumsum(slow[::-1])[::-1] / np.arange(count, 0, -1) >= STAYS
    # The last windows alone are no lasting change.
    candidates = np.flatnonzero(slow & stays)
    candidates = candidates[candidates <= count - max(3, count // 20)]
    if not len(candidates):
        return True, None
    drawn = _gain(_shuffled(logs, np.random.default_rng(0)))
    p_value = (1 + int((drawn >= found * (1 - 1e-9)).sum())) / (1 + len(drawn))
    if p_value > level:
        return True, None
    window = int(candidates[0])
    slower = math.exp(float(np.median(logs[window:])) - baseline) - 1
    return True, Onset(window, float(window), slower, p_value)


class _Heard:
    """What the child has said so far."""

    def __init__(self, on_progress: OnProgress | None):
        self.windows: list[Window] = []
        self.idle: list[Reading] = []
        self.readings: list[Reading] = []
        self.facts: dict = {}
        self.source: Told | None = None
        self.trouble = ""
        self._on_progress = on_progress

    def __call__(self, message: dict) -> None:
        if "facts" in message:
            self.facts = message["facts"]
        if message.get("source"):
            self.source = energies.told(message["source"])
        if "trouble" in message:
            self.trouble = message["trouble"]
        if message.get("idle"):
            self.idle.append(Reading(**message["idle"]))
        if "window" in message:
            self.windows.append(Window(**message["window"]))
        if message.get("reading"):
            self.readings.append(Reading(**message["reading"]))
        if self._on_progress:
            self._on_progress(message)


def _energy_of(source: Told | MeterLog | None, heard: _Heard) -> tuple[Energy | None, list[str]]:
    """The energy of the windows, and what is to be said where there is none."""
    if source is None:
        return None, []
    try:
        if heard.trouble:
            return None, [f"energy: {heard.trouble}"]
        gross_j = source.joules_between(heard.readings)
    except Problem as problem:
        return None, [f"energy: {problem}"]
    idle_w, warnings = None, []
    if len(heard.idle) == 2:
        try:
            idle_w = source.joules_between(heard.idle) / (heard.idle[1].at_s - heard.idle[0].at_s)
        except Problem as problem:
            warnings.append(f"idle power was not measured: {problem}")
    seconds = heard.readings[-1].at_s - heard.readings[0].at_s
    # A reading ends each window and one begins the first.
    inferences = sum(window.count for window in heard.windows[: len(heard.readings) - 1])
    return Energy(source.name, seconds, inferences, gross_j, idle_w), warnings


def _ends(windows: Sequence[Window], name: str) -> tuple[float, float] | None:
    known = [value for value in (getattr(window, name) for window in windows) if value is not None]
    return (known[0], known[-1]) if known else None


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The running median of three: one disturbed second is nothing."""
    padded = np.concatenate((values[:1], values, values[-1:]))
    return np.median(np.stack((padded[:-2], padded[1:-1], padded[2:])), axis=0)


def _gain(rows: np.ndarray) -> np.ndarray:
    """How much two means explain more than one, at the best change to a larger mean: (rows, windows) to (rows,)."""
    count = rows.shape[1]
    before = np.arange(3, count - 2)
    sums = np.cumsum(rows, axis=1)
    left = sums[:, before - 1] / before
    right = (sums[:, -1:] - sums[:, before - 1]) / (count - before)
    gains = np.where(right > left, (right - left) ** 2, 0.0) * (before * (count - before) / count)
    return gains.max(axis=1)


def _shuffled(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Runs with the order of blocks drawn anew: (draws, windows)."""
    length = max(1, len(values) // 10)
    blocks = [values[start : start + length] for start in range(0, len(values), length)]
    return np.stack([np.concatenate([blocks[i] for i in random.permutation(len(blocks))]) for _ in range(_DRAWS)])
