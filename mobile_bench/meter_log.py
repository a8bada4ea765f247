"""The log of a power meter: a CSV file to (Unix seconds, watts)."""

from __future__ import annotations

import csv
import math
import re
from datetime import datetime
from pathlib import Path

from mobile_bench.errors import InputError

#: What each column may be called, in lower case and without its unit in brackets.
_NAMES = {
    "time": ("time", "timestamp", "time_s", "datetime"),
    "power": ("power", "power_w", "watts", "watt", "w"),
    "volts": ("volts", "voltage", "voltage_v", "volt", "v"),
    "amps": ("amps", "current", "current_a", "ampere", "amperes", "a"),
}
_UNITS = {"time": ("s", ""), "power": ("w", ""), "volts": ("v", ""), "amps": ("a", "")}
#: The year 5138; what is above it are milliseconds.
_LATEST = 1e11
_COLUMNS = "time (Unix seconds or ISO 8601), and power in W, or volts and amps"


def read_log(path: str | Path) -> list[tuple[float, float]]:
    """The samples of a log in their order. Raises InputError with the line and what it holds where one is wrong.

    What follows the last line's end is left out: it may still be being written.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError("The meter's log cannot be read", received=f"{path} ({error})") from error
    lines = text[: text.rfind("\n") + 1].splitlines()
    delimiter = max(",;\t", key=(lines[0] if lines else "").count)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    samples: list[tuple[float, float]] = []
    try:
        places = _columns(path, next(rows, []))
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            where = f"line {rows.line_num} of {path}"
            if len(row) <= max(places.values()):
                raise InputError("The meter's log has a line that is cut short", received=f"{row} in {where}")
            values = {name: row[place].strip() for name, place in places.items()}
            seconds = _seconds(values["time"], where)
            if samples and seconds <= samples[-1][0]:
                raise InputError(
                    "The times in the meter's log do not rise", received=f"{values['time']!r} in {where}",
                    allowed=f"later than {samples[-1][0]:.3f} s, the time before it",
                )  # fmt: skip
            numbers = {name: _number(name, value, where) for name, value in values.items() if name != "time"}
            samples.append((seconds, numbers["power"] if "power" in numbers else numbers["volts"] * numbers["amps"]))
    except csv.Error as error:
        raise InputError("The meter's log is not CSV", received=f"line {rows.line_num} of {path} ({error})") from error
    return samples


def _columns(path: str | Path, header: list[str]) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, cell in enumerate(header):
        name, unit = re.fullmatch(r"(.*?)\s*(?:[\[(](.*)[\])])?", cell.strip().lower()).groups(default="")
        for column, names in _NAMES.items():
            if name in names and unit in _UNITS[column]:
                places.setdefault(column, place)
    if "time" not in places or not ("power" in places or {"volts", "amps"} <= set(places)):
        raise InputError(
            "The meter's log has not the columns it needs", received=f"line 1 of {path}: {','.join(header)[:200]!r}",
            allowed=_COLUMNS,
        )  # fmt: skip
    return {name: place for name, place in places.items() if name in ("time", "power")} if "power" in places else places


def _seconds(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        try:
            value = datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError):
            value = math.nan
    if not 0 <= value < _LATEST:
        raise InputError(
            "The meter's log has a time that cannot be read", received=f"{text!r} in {where}",
            allowed="Unix seconds, or ISO 8601 such as 2025-05-01T12:00:00+00:00",
        )  # fmt: skip
    return value


def _number(name: str, text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise InputError(
            f"The meter's log has a value of {name} that cannot be used", received=f"{text!r} in {where}",
            allowed="a number from 0 on",
        )  # fmt: skip
    return value
