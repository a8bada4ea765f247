"""What makes a measurement doubtful: the machine's state before and after, and warnings with their numbers.

The two states frame the timed runs and cost nothing while these run: what other processes used between them
is the difference of two readings of /proc.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mobile_bench import device
from mobile_bench.errors import JobFailed

#: Others' use of the processor, in cores; the hypervisor's share of our time; a temperature near throttling.
BUSY_CORES, STEAL_SHARE, HOT_C = 0.1, 0.02, 80.0
#: A frequency that fell by more than this between the two states.
SLOWED = 0.1
_SAVING_GOVERNORS = ("powersave", "ondemand", "conservative", "schedutil")
_SHOWN = 5


@dataclass(frozen=True)
class State:
    """The machine at one moment; what the system does not tell is None. ticks: process -> (name, CPU ticks)."""

    at_s: float
    frequency_mhz: float | None = None
    temperature_c: float | None = None
    power: str = ""
    steal_ticks: int | None = None
    all_ticks: int | None = None
    ticks: dict = field(default_factory=dict)


def read_state(root: str | Path = "/") -> State:
    """Read it from /proc and /sys below `root`."""
    root = Path(root)
    steal, whole = _steal(root)
    return State(
        time.monotonic(), device.describe(root).get("frequency_mhz"), temperature_c(root), _power(root), steal, whole,
        _process_ticks(root),
    )  # fmt: skip


def between(before: State, after: State, own: int | None = None) -> dict:
    """What happened from one state to the other, as plain JSON values; what is not known is absent.

    frequency_mhz and temperature_c as [before, after]; power; steal_share of all processor time; busy: others'
    processes by the cores they used, the busiest first, and busy_cores of all of them together.
    """
    passed_s = max(after.at_s - before.at_s, 1e-9)
    per_second = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    own = os.getpid() if own is None else own
    used = []
    for pid, (name, ticks) in after.ticks.items():
        start = before.ticks.get(pid, (name, 0))[1]
        cores = (ticks - start) / per_second / passed_s
        if pid != own and cores > 0:
            used.append({"name": name, "pid": pid, "cores": round(cores, 3)})
    used.sort(key=lambda process: -process["cores"])
    found = {
        "seconds": round(passed_s, 3),
        "busy": used[:_SHOWN],
        "busy_cores": round(sum(process["cores"] for process in used), 3),
    }
    for name in ("frequency_mhz", "temperature_c"):
        pair = [getattr(before, name), getattr(after, name)]
        if None not in pair:
            found[name] = pair
    if after.power:
        found["power"] = after.power
    if None not in (before.steal_ticks, after.steal_ticks) and after.all_ticks > before.all_ticks:
        share = (after.steal_ticks - before.steal_ticks) / (after.all_ticks - before.all_ticks)
        found["steal_share"] = round(max(0.0, share), 4)
    return found


def warnings_of(
    facts: dict, load_average: float | None, threads: int, during: dict, steady: bool, warmup_runs: int,
    steady_change: float = 0.05,
) -> list[str]:  # fmt: skip
    """Everything doubtful, each with its number, the threshold and what to do.

    facts: device.describe(); during: between().
    """
    cores, governor = facts.get("cores", 1), facts.get("governor", "")
    found = []
    free = cores - threads
    if load_average is not None and load_average > free + 0.5:
        found.append(
            f"the load average was {load_average:.1f} with {threads} thread(s) on {cores} cores (above "
            f"{free + 0.5:g}): other work shares the processor; end it and measure again"
        )
    if threads > cores:
        found.append(f"{threads} threads on {cores} cores wait for each other; measure with --threads {cores}")
    if governor in _SAVING_GOVERNORS:
        found.append(
            f"the CPU governor is {governor!r}, not 'performance': the frequency varies; "
            "set it with: cpupower frequency-set -g performance"
        )
    if not steady:
        found.append(
            f"after {warmup_runs} warm-up runs the times still changed by more than {steady_change:.0%}: "
            "other work or a changing frequency; measure again on a quiet machine"
        )
    if during.get("busy_cores", 0) > BUSY_CORES:
        names = ", ".join(f"{p['name']} (process {p['pid']}: {p['cores']:.2f})" for p in during["busy"][:3])
        found.append(
            f"other processes used {during['busy_cores']:.2f} cores while it was timed (above {BUSY_CORES}): {names}; "
            "end them and measure again"
        )
    if during.get("steal_share", 0) > STEAL_SHARE:
        found.append(
            f"the host of this virtual machine took {during['steal_share']:.1%} of the processor time (above "
            f"{STEAL_SHARE:.0%}): compare files with mobile-bench compare, which bears it, or use real hardware"
        )
    hottest = max(during.get("temperature_c", [0.0]))
    if hottest >= HOT_C:
        found.append(
            f"the processor was at {hottest:.0f} °C (from {HOT_C:.0f} on it may throttle): cool it, and measure again"
        )
    before, after = during.get("frequency_mhz", (0.0, 0.0))
    if after < before * (1 - SLOWED):
        found.append(
            f"the frequency fell from {before:.0f} to {after:.0f} MHz (by more than {SLOWED:.0%}): it throttled; "
            "cool it, or set a fixed frequency, and measure again"
        )
    if during.get("power") == "battery":
        found.append("it ran on its battery, where processors are held back; plug it in and measure again")
    return found


def of_processes(warnings: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The warnings of several processes, each kind once: with the numbers of the first that had it, and how many had.

    A kind is known by its words before the first number.
    """
    kinds: dict[str, list[str]] = {}
    for of_one in warnings:
        for text in of_one:
            kinds.setdefault(re.split(r"\d", text, maxsplit=1)[0], []).append(text)
    times = (
        f" (in {len(texts)} of {len(warnings)} processes)" if len(warnings) > 1 else "" for texts in kinds.values()
    )
    return tuple(texts[0] + count for texts, count in zip(kinds.values(), times))


def check_same_machine(devices: Sequence[dict]) -> None:
    """A target that changes its runtime or its machine between two processes is two targets: JobFailed."""
    names = ("cpu", "machine", "runtime", "runtime_version")
    seen = {tuple(facts.get(name) for name in names) for facts in devices}
    if len(seen) > 1:
        raise JobFailed(
            "The processes of one measurement ran on different machines or runtimes",
            received=" and ".join(", ".join(map(str, facts)) for facts in sorted(seen, key=str)),
            next_step="Name one runtime with --runtime, and measure again",
        )


def temperature_c(root: str | Path = "/") -> float | None:
    """The hottest thermal zone that has anything to do with the processor, else the hottest; None if there is none."""
    zones = []
    for zone in sorted(Path(root).glob("sys/class/thermal/thermal_zone*")):
        text = _text(zone / "temp")
        if text.lstrip("-").isdigit() and -40 < int(text) / 1000 < 150:
            zones.append((_text(zone / "type").lower(), int(text) / 1000))
    processor = [value for kind, value in zones if any(word in kind for word in ("cpu", "soc", "pkg", "core"))]
    return max(processor or [value for _, value in zones], default=None)


def _power(root: Path) -> str:
    """'mains', 'battery', or '' where the system does not say."""
    supplies = sorted(root.glob("sys/class/power_supply/*"))
    if any(_text(supply / "online") == "1" for supply in supplies):
        return "mains"
    return "battery" if any(_text(supply / "status") == "Discharging" for supply in supplies) else ""


def _steal(root: Path) -> tuple[int | None, int | None]:
    """Ticks that the hypervisor took, and all ticks, of all cores since the start (proc(5), /proc/stat)."""
    fields = _text(root / "proc/stat").partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu" or not all(field.isdigit() for field in fields[1:9]):
        return None, None
    return int(fields[8]), sum(int(field) for field in fields[1:9])


def _process_ticks(root: Path) -> dict[int, tuple[str, int]]:
    """Process -> (name, ticks in user and system mode) from /proc/PID/stat."""
    found = {}
    for path in root.glob("proc/[0-9]*/stat"):
        # The name may hold spaces and brackets; what follows the last bracket is fields 3 and on (proc(5)).
        head, bracket, tail = _text(path).rpartition(")")
        fields = tail.split()
        if bracket and len(fields) > 12 and fields[11].isdigit() and fields[12].isdigit():
            found[int(path.parent.name)] = (head.partition("(")[2], int(fields[11]) + int(fields[12]))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
