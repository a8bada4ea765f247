"""Numbers as people read them: one way for the pages, the report and the README's table."""

from __future__ import annotations

import math
import re

NONE = "–"


def percent(fraction: float | None, digits: int = 2) -> str:
    """0.91237 -> '91.24%'"""
    return NONE if _gone(fraction) else f"{100 * fraction:.{digits}f}%"


def interval(low: float | None, high: float | None) -> str:
    """The bounds of a fraction: '90.68 – 91.78'"""
    return NONE if _gone(low) or _gone(high) else f"{100 * low:.2f} – {100 * high:.2f}"


def points(value: float | None) -> str:
    """A difference in percentage points: '−0.31'"""
    if _gone(value):
        return NONE
    return "±0.00" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", "−")


def size(count: float | None) -> str:
    """Bytes in decimal units: '38.4 kB', '1.72 MB'"""
    if _gone(count):
        return NONE
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def count(value: float | None) -> str:
    """78_666 -> '78.7 k', 12_300_000 -> '12.3 M'"""
    if _gone(value):
        return NONE
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:g}"


def ms(value: float | None) -> str:
    """Milliseconds with three digits that mean something, never below a microsecond: '0.081 ms', '33.3 ms'."""
    return NONE if _gone(value) else f"{round(value, 3):.3f} ms" if value < 1 else f"{significant(value)} ms"


def significant(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def fps(value: float | None) -> str:
    return NONE if _gone(value) else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def times(value: float | None) -> str:
    """A ratio: '3.6×'"""
    return NONE if _gone(value) else f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def rate(deadline_ms: float) -> str:
    """A deadline in both of its forms: '33.3 ms (30 frames/s)'"""
    return f"{significant(deadline_ms)} ms ({_short(1000 / deadline_ms)} frames/s)"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def markdown(value: object) -> str:
    """Text as it is, whatever Markdown and its extensions would make of it."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>$:~&^])", r"\\\1", str(value))


def setting(value: object) -> str:
    """A recipe's setting: floats short, lists joined, nothing as a dash."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(setting(v) for v in value) or NONE
    if isinstance(value, dict):
        return ", ".join(f"{k} {setting(v)}" for k, v in value.items()) or NONE
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gone(value) -> bool:
    return value is None or value != value or (isinstance(value, float) and math.isinf(value))
