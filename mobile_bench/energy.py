"""Energy from what can really be read: RAPL's counters, a battery's gauge, the log of an external meter.

    source = find_source("auto")                  # None where nothing can be read: 'not measured'
    readings = [source.read(), ..., source.read()]
    source.joules_between(readings)

A latency says nothing of energy, so nothing here is estimated from one. `root` is where /sys is looked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Protocol

from mobile_bench.errors import InputError

NOT_MEASURED = "not measured"
CHOICES = ("auto", "rapl", "battery", "none")
_LOG_LAG_S, _LOG_LIVE_S = 10.0, 60.0
_POWERCAP, _SUPPLIES = "sys/class/powercap", "sys/class/power_supply"


@dataclass(frozen=True)
class Reading:
    """What a source said at one moment. at_s: the monotonic clock; wall_s: Unix time, for logs made elsewhere.

    values: microjoules, one a counter; or watts; or the joules left; () for a log.
    """

    at_s: float
    wall_s: float
    values: tuple[float, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "values", tuple(self.values))


class SourceClosed(InputError):
    """A source that is there and cannot be used now; its message says what to do."""


class Source(Protocol):
    name: str

    @property
    def facts(self) -> dict:
        """What another machine needs to add up its readings: see `told`."""

    def read(self) -> Reading:
        """What it says now; InputError where it has nothing to say any more."""

    def joules_between(self, readings: Sequence[Reading]) -> float:
        """Joules from the first to the last of `readings`, which are in order; InputError where they do not tell."""


@dataclass(frozen=True)
class Energy:
    """What a run used. gross_j: all of it; idle_w: what the machine draws without it, measured before the run.

    idle_w is None where it was not measured; net_j, which is gross_j less idle_w for as long, is None then too.
    """

    source: str
    seconds: float
    inferences: int
    gross_j: float
    idle_w: float | None = None

    @property
    def net_j(self) -> float | None:
        return None if self.idle_w is None else self.gross_j - self.idle_w * self.seconds

    @property
    def gross_mj(self) -> float:
        """Millijoules per inference."""
        return 1000 * self.gross_j / self.inferences

    @property
    def net_mj(self) -> float | None:
        """Millijoules per inference above idling; below 0 where the machine drew less than while it idled."""
        return None if self.net_j is None else 1000 * self.net_j / self.inferences


def fields_of(energy: Energy | None) -> dict:
    """The two fields of a records.Measurement: energy_mj, gross per inference, and energy_source."""
    if energy is None:
        return {"energy_mj": None, "energy_source": NOT_MEASURED}
    return {"energy_mj": energy.gross_mj, "energy_source": energy.source}


def find_source(choice: str = "auto", root: str | Path = "/") -> Source | None:
    """The source of that name: 'auto' (RAPL, else the battery), 'rapl', 'battery', 'none', or a meter's .csv file.

    None for 'none', and for 'auto' where no source can be read. Raises InputError where a source that was named
    cannot be used, with what to do; closed_sources says that for 'auto'.
    """
    if choice == "none":
        return None
    if choice == "auto":
        return next((source for source in (_or_none(kind, root) for kind in (Rapl, Battery)) if source), None)
    if choice in CHOICES:
        return (Rapl if choice == "rapl" else Battery)(root)
    if choice.lower().endswith(".csv"):
        return MeterLog(choice)
    raise InputError(
        "There is no such source of energy", received=repr(choice), allowed=f"{', '.join(CHOICES)}, FILE.csv"
    )


def closed_sources(root: str | Path = "/") -> list[str]:
    """What to do for each source that is there and that 'auto' cannot use."""
    found = []
    for kind in (Rapl, Battery):
        try:
            kind(root)
        except SourceClosed as error:
            found.append(str(error))
        except InputError:
            continue
    return found


@dataclass(frozen=True)
class Told:
    """A source on another machine: it is read there, and added up here from what it says of itself."""

    name: str
    kind: str
    ranges: tuple[float, ...] = ()

    def joules_between(self, readings: Sequence[Reading]) -> float:
        return _ADD_UP[self.kind](_at_least_two(readings), self.ranges)


def told(facts: dict) -> Told:
    """The source that another process described by its `facts`."""
    return Told(facts["name"], facts["kind"], tuple(facts["ranges"]))


def _counted(readings: Sequence[Reading], ranges: Sequence[float]) -> float:
    """Joules by counters of microjoules, which start again at 0 after their range."""
    steps = (
        after - before if after >= before else after - before + limit
        for one, next_one in pairwise(readings)
        for before, after, limit in zip(one.values, next_one.values, ranges)
    )
    return sum(steps) / 1e6


def _left(readings: Sequence[Reading], ranges: Sequence[float]) -> float:
    """Joules by what a battery holds."""
    return readings[0].values[0] - readings[-1].values[0]


def _drawn(readings: Sequence[Reading], ranges: Sequence[float]) -> float:
    """Joules by watts."""
    return _trapezoid([(reading.at_s, reading.values[0]) for reading in readings])


_ADD_UP = {"counters": _counted, "joules left": _left, "watts": _drawn}


class Rapl:
    """The processor's own energy counters, by Linux's powercap (kernel document power/powercap).

    Packages and their DRAM are added up: DRAM is no part of a package. Cores and graphics are parts of it, and
    'psys' holds it, so they would count twice. A counter starts again at 0 after max_energy_range_uj, which
    takes a minute at the least: read more often than that.
    """

    def __init__(self, root: str | Path = "/"):
        zones = sorted((Path(root) / _POWERCAP).glob("intel-rapl:*"))
        names = {zone: _text(zone / "name") for zone in zones}
        self._counters = [z for z in zones if names[z].startswith("package") or names[z] == "dram"]
        if not self._counters:
            raise InputError(
                "The processor has no energy counters (RAPL) here", received=f"none in {Path(root) / _POWERCAP}",
                next_step="Measure on real hardware, or with a meter: --energy FILE.csv",
            )  # fmt: skip
        self._ranges = [float(_whole(zone / "max_energy_range_uj")) for zone in self._counters]
        self.name = "RAPL " + " + ".join(names[zone] for zone in self._counters)
        self.read()

    def read(self) -> Reading:
        return _now(_whole(zone / "energy_uj") for zone in self._counters)

    @property
    def facts(self) -> dict:
        return {"name": self.name, "kind": "counters", "ranges": self._ranges}

    def joules_between(self, readings: Sequence[Reading]) -> float:
        return told(self.facts).joules_between(readings)


class Battery:
    """What the batteries give, by their gauges in sysfs (kernel document ABI/testing/sysfs-class-power).

    Watts from current_now and voltage_now, or power_now, integrated by trapezoids; where a gauge has neither, the
    fall of energy_now or charge_counter, which is coarse. It is the whole device, screen and radio included, and
    gauges are renewed every second to half a minute: let it run for minutes. Only while it discharges.
    """

    def __init__(self, root: str | Path = "/"):
        supplies = sorted((Path(root) / _SUPPLIES).glob("*"))
        self._batteries = [supply for supply in supplies if _text(supply / "type") == "Battery"]
        if not self._batteries:
            raise InputError(
                "There is no battery here", received=f"none in {Path(root) / _SUPPLIES}",
                next_step="Measure with a meter: --energy FILE.csv",
            )  # fmt: skip
        self._counting = any(_watts(battery) is None for battery in self._batteries)
        self.name = "battery " + " + ".join(battery.name for battery in self._batteries)
        self.read()

    def read(self) -> Reading:
        states = {battery.name: _text(battery / "status") for battery in self._batteries}
        if "Discharging" not in states.values() or "Charging" in states.values():
            raise SourceClosed(
                "The battery says what is used only while it discharges",
                received=", ".join(f"{name}: {state or 'no status'}" for name, state in states.items()),
                next_step="Unplug the charger, and measure again",
            )
        if self._counting:
            return _now([sum(_joules_left(battery) for battery in self._batteries)])
        return _now([sum(_watts(battery) or 0.0 for battery in self._batteries)])

    @property
    def facts(self) -> dict:
        return {"name": self.name, "kind": "joules left" if self._counting else "watts", "ranges": ()}

    def joules_between(self, readings: Sequence[Reading]) -> float:
        return told(self.facts).joules_between(readings)


class Clock:
    """No meter, only the time: for a meter's log that lies on another machine."""

    name = "a meter's log"
    facts: ClassVar[dict] = {}

    def read(self) -> Reading:
        return _now(())


class MeterLog:
    """The log of a meter between the device and its supply: a CSV file with a line of column names.

    It needs `time`, in Unix seconds or ISO 8601 (local time where it names no zone), in rising order, and either
    `power` in watts or `volts` and `amps`; other columns are left alone. The log is read when the run is over, and
    must then span it; the meter's clock and this machine's must agree.
    """

    facts: ClassVar[dict] = {}

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self.name = f"meter {self._path.name}"
        self._samples()  # a wrong log is refused before minutes have passed

    def read(self) -> Reading:
        return _now(())

    def joules_between(self, readings: Sequence[Reading]) -> float:
        first, *_, last = _at_least_two(readings)
        # The wall clock may be set while the run goes on; the monotonic one says how long it took.
        start, end = first.wall_s, first.wall_s + last.at_s - first.at_s
        samples = self._samples()
        while samples and end - _LOG_LIVE_S < samples[-1][0] < end and time.time() < end + _LOG_LAG_S:
            time.sleep(0.2)  # a log that is being written lags behind
            samples = self._samples()
        if len(samples) < 2 or samples[0][0] > start or samples[-1][0] < end:
            span = f"{_utc(samples[0][0])} to {_utc(samples[-1][0])}" if samples else "no samples"
            raise InputError(
                "The meter's log does not span the run",
                received=f"{self._path} with {span}, for a run from {_utc(start)} to {_utc(end)}",
                next_step="Let the meter log from before the run until after it, with the clocks set alike",
            )
        gap = max(b - a for (a, _), (b, _) in pairwise(samples) if b > start and a < end)
        if gap > max(2.0, 0.1 * (end - start)):
            raise InputError(
                "The meter's log has a gap during the run", received=f"{gap:.1f} s without a sample in {self._path}",
                allowed=f"up to {max(2.0, 0.1 * (end - start)):.1f} s",
            )  # fmt: skip
        inside = [(at, watts) for at, watts in samples if start < at < end]
        return _trapezoid([(start, _at(samples, start)), *inside, (end, _at(samples, end))])

    def _samples(self) -> list[tuple[float, float]]:
        from mobile_bench.meter_log import read_log

        return read_log(self._path)


def _or_none(kind: type, root: str | Path) -> Source | None:
    try:
        return kind(root)
    except InputError:
        return None


def _now(values: Iterable[float]) -> Reading:
    return Reading(time.monotonic(), time.time(), tuple(values))


def _at_least_two(readings: Sequence[Reading]) -> Sequence[Reading]:
    if len(readings) < 2:
        raise InputError("Energy needs a reading at the start and one at the end", received=len(readings))
    return readings


def _trapezoid(points: Sequence[tuple[float, float]]) -> float:
    """Joules from (seconds, watts) in order of time."""
    return sum((b - a) * (before + after) / 2 for (a, before), (b, after) in pairwise(points))


def _at(samples: Sequence[tuple[float, float]], moment: float) -> float:
    """The watts at a moment within the samples, by the straight line between its neighbours."""
    for (a, before), (b, after) in pairwise(samples):
        if a <= moment <= b:
            return before + (after - before) * (moment - a) / (b - a)
    raise AssertionError(moment)


def _watts(battery: Path) -> float | None:
    """A battery's power now; the sign of current_now differs between drivers."""
    current, voltage = _number(battery / "current_now"), _number(battery / "voltage_now")
    if current is not None and voltage is not None:
        return abs(current) * voltage / 1e12
    power = _number(battery / "power_now")
    return None if power is None else abs(power) / 1e6


def _joules_left(battery: Path) -> float:
    energy_uwh = _number(battery / "energy_now")
    if energy_uwh is not None:
        return energy_uwh * 3600 / 1e6
    for counter in ("charge_counter", "charge_now"):
        charge_uah, voltage_uv = _number(battery / counter), _number(battery / "voltage_now")
        if charge_uah is not None and voltage_uv is not None:
            return charge_uah * voltage_uv * 3600 / 1e12
    raise InputError(
        "The battery's gauge does not say what it gives", received=battery,
        allowed="current_now and voltage_now, power_now, energy_now, or charge_counter and voltage_now",
        next_step="Measure with a meter: --energy FILE.csv",
    )  # fmt: skip


def _whole(path: Path) -> int:
    """A counter's value; InputError where it cannot be read, with what to do."""
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise SourceClosed(
            "The processor's energy counters may be read by the superuser only", received=path,
            next_step=f"Run it as root, or allow it until the next start: sudo chmod a+r {path}",
        ) from error  # fmt: skip
    except (OSError, ValueError) as error:
        raise InputError("An energy counter cannot be read", received=f"{path} ({error})") from error


def _number(path: Path) -> float | None:
    try:
        return float(int(path.read_text()))
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
