"""The machine that a measurement was made on, from what the system lets anyone read."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe(root: str | Path = "/") -> dict:
    """Facts about this machine; a fact that cannot be read is absent.

    cpu (its model), cores (usable here), governor, frequency_mhz (now), memory_bytes, os, kernel, machine
    (x86_64, aarch64), board (of a single-board computer), python. root: where /proc and /sys are.
    """
    root = Path(root)
    policy = root / "sys/devices/system/cpu/cpu0/cpufreq"
    cpuinfo = _fields(root / "proc/cpuinfo")
    meminfo = _fields(root / "proc/meminfo")
    khz, megahertz = _text(policy / "scaling_cur_freq"), cpuinfo.get("cpu mhz", "")
    facts = {
        "cpu": cpuinfo.get("model name") or cpuinfo.get("hardware") or platform.processor(),
        "cores": usable_cores(root),
        "governor": _text(policy / "scaling_governor"),
        "frequency_mhz": float(khz) / 1000 if khz.isdigit() else _number(megahertz),
        "memory_bytes": _kibibytes(meminfo.get("memtotal", "")),
        "os": _fields(root / "etc/os-release", "=").get("pretty_name", platform.system()).strip('"'),
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "board": _text(root / "proc/device-tree/model").rstrip("\0"),
        "python": platform.python_version(),
    }
    return {name: value for name, value in facts.items() if value not in ("", None)}


def usable_cores(root: str | Path = "/") -> int:
    """Cores that this process may use: its affinity, less where a container's quota allows fewer."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        cores = os.cpu_count() or 1
    quota, _, period = _text(Path(root) / "sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def load_average() -> float | None:
    """Processes that wanted a core over the last minute, or None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def peak_rss_bytes() -> int | None:
    """The most memory this process has held since it was started.

    Not getrusage where that can be avoided: on Linux its figure is inherited through fork and exec, and a
    small worker would report the size of the large program that started it.
    """
    peak = _kibibytes(_fields(Path("/proc/self/status")).get("vmhwm", ""))
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _fields(path: Path, separator: str = ":") -> dict[str, str]:
    """'Key : value' lines, keys in lower case; the first of each, which is core 0's in /proc/cpuinfo."""
    found: dict[str, str] = {}
    for line in _text(path).splitlines():
        key, there, value = line.partition(separator)
        if there:
            found.setdefault(key.strip().lower(), value.strip())
    return found


def _kibibytes(text: str) -> int | None:
    number = text.split()[0] if text.split() else ""
    return int(number) * 1024 if number.isdigit() else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
