"""What a device says about itself in its shell: Android's properties, /proc, /sys and dumpsys battery."""

from __future__ import annotations

import time

from mobile_bench.trust import State, between

_DISCHARGING = "3"
#: One command for all; what the device lacks prints an empty value.
COMMAND = """\
for p in ro.product.model ro.soc.model ro.build.version.release; do echo "$p=$(getprop $p 2>/dev/null)"; done
c=/sys/devices/system/cpu/cpu0/cpufreq
echo "governor=$(cat $c/scaling_governor 2>/dev/null)"; echo "khz=$(cat $c/scaling_cur_freq 2>/dev/null)"
for z in /sys/class/thermal/thermal_zone*; do echo "zone $(cat $z/type 2>/dev/null)=$(cat $z/temp 2>/dev/null)"; done
dumpsys battery 2>/dev/null | sed -n 's/^ *\\([A-Za-z ]*\\): */battery \\1=/p'
echo "current=$(cat /sys/class/power_supply/battery/current_now 2>/dev/null)"
echo "load=$(cat /proc/loadavg 2>/dev/null)"; echo "cores=$(nproc 2>/dev/null)"
echo "memory=$(sed -n 's/^MemTotal: *//p' /proc/meminfo 2>/dev/null)"
echo "machine=$(uname -m 2>/dev/null)"; echo "kernel=$(uname -sr 2>/dev/null)"
"""


def read(text: str) -> tuple[State, dict]:
    """The device's state, and its facts under the names of device.describe, from what COMMAND printed.

    Also battery_temperature_c and load_average; what cannot be read is absent.
    """
    said = _pairs(text)
    release, khz = said.get("ro.build.version.release", ""), _number(said.get("khz", ""))
    battery_c, memory = _number(said.get("battery temperature", "")), _number(said.get("memory", "").partition(" ")[0])
    facts = {
        "board": said.get("ro.product.model", ""),
        "cpu": said.get("ro.soc.model", ""),
        "os": f"Android {release}" if release else "",
        "cores": int(_number(said.get("cores", "")) or 0) or None,
        "governor": said.get("governor", ""),
        "frequency_mhz": khz / 1000 if khz else None,
        "memory_bytes": int(memory * 1024) if memory else None,
        "machine": said.get("machine", ""),
        "kernel": said.get("kernel", ""),
        "battery_temperature_c": battery_c / 10 if battery_c is not None else None,
        "load_average": _number(said.get("load", "").partition(" ")[0]),
    }
    state = State(time.monotonic(), facts["frequency_mhz"], _temperature_c(said), _power(said))
    return state, {name: value for name, value in facts.items() if value not in ("", None)}


def battery(text: str) -> tuple[dict, tuple[float, ...], str]:
    """A battery's gauge from what COMMAND printed: (what adds it up, its values, '' or why it cannot be used).

    The first two are those of mobile_bench.energy.Told and Reading: the joules left by the charge counter, or the
    watts where only the current is known. `dumpsys battery` gives millivolts and microampere-hours; status 3 is
    discharging (android.os.BatteryManager).
    """
    said = {name.lower(): value for name, value in _pairs(text).items()}
    millivolts = _number(said.get("battery voltage", ""))
    charge, current = _number(said.get("battery charge counter", "")), _number(said.get("current", ""))
    if millivolts is None:
        return {}, (), "dumpsys battery does not tell the voltage"
    if said.get("battery status") != _DISCHARGING:
        return (
            {},
            (),
            (
                "the battery is not discharging: what it gives is known only without a charger. Connect by Wi-Fi (adb "
                "tcpip 5555, then adb connect ADDRESS) and unplug it"
            ),
        )
    if charge:
        left_j = charge * millivolts * 3600 / 1e9
        return {"name": "Android's charge counter", "kind": "joules left", "ranges": ()}, (left_j,), ""
    if current:
        watts = abs(current) * millivolts / 1e9
        return {"name": "Android's battery current", "kind": "watts", "ranges": ()}, (watts,), ""
    return {}, (), "this phone tells neither its charge counter nor its battery's current"


def changes(before: State, after: State) -> dict:
    """trust.between without what is not known here: the work of other processes."""
    found = between(before, after)
    return {name: value for name, value in found.items() if not name.startswith("busy")}


def free_bytes(df: str) -> int | None:
    """What `df -k FOLDER` calls available, or None."""
    fields = df.split("\n", 1)[-1].split()
    return int(fields[3]) * 1024 if len(fields) > 3 and fields[3].isdigit() else None


def _pairs(text: str) -> dict[str, str]:
    return dict(line.strip().split("=", 1) for line in text.splitlines() if "=" in line)


def _temperature_c(said: dict[str, str]) -> float | None:
    zones = [
        (name.removeprefix("zone ").lower(), value / 1000)
        for name, text in said.items()
        if name.startswith("zone") and (value := _number(text)) is not None and -40 < value / 1000 < 150
    ]
    processor = [value for kind, value in zones if any(word in kind for word in ("cpu", "soc", "core"))]
    return max(processor or [value for _, value in zones], default=None)


def _power(said: dict[str, str]) -> str:
    plugs = [value for name, value in said.items() if name.startswith("battery ") and name.endswith(" powered")]
    return "mains" if "true" in plugs else "battery" if plugs else ""


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < 1e18 else None
