"""Latency over time as an SVG that needs no library: the median and p99 of every window, and where it throttled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from xml.sax.saxutils import escape

from mobile_bench.sustained import Sustained, SustainedSummary

_WIDTH, _HEIGHT = 960, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 890, 60, 350
_MEDIAN, _P99, _HEAT, _ONSET = "#0b62a4", "#9fb3c8", "#c2410c", "#b91c1c"


def picture(title: str, found: Sustained, summary: SustainedSummary) -> str:
    """An SVG document. Latency from 0 up on the left; the temperature, where it is known, on the right."""
    windows = found.windows
    middles = [window.start_s + window.seconds / 2 for window in windows]
    end_s = max(windows[-1].start_s + windows[-1].seconds, 1e-9)
    # A single hiccup in the 99th percentile must not flatten the medians.
    tails = [(middle, window.p99_ms) for middle, window in zip(middles, windows) if window.p99_ms is not None]
    top_ms = _round_up(
        max([1.5 * summary.worst_ms, *sorted(p99 for _, p99 in tails)[: max(1, len(windows) * 9 // 10)]])
    )
    x = lambda seconds: _LEFT + seconds / end_s * (_RIGHT - _LEFT)
    y = lambda value: _BOTTOM - min(value / top_ms, 1.0) * (_BOTTOM - _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="system-ui, sans-serif" font-size="13" fill="#1f2933">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_LEFT, 28, title, 'font-size="17" font-weight="600"'),
        *_axes(x, y, end_s, top_ms, bool(tails)),
        *([_line([(x(s), y(p99)) for s, p99 in tails], _P99, 1.2)] if tails else []),
        _line([(x(s), y(w.median_ms)) for s, w in zip(middles, windows)], _MEDIAN, 2),
        *_temperature(found, x, middles),
    ]
    if summary.onset:
        at = x(summary.onset.at_s)
        parts.append(
            f'<path d="M{at:.1f} {_TOP}V{_BOTTOM}" stroke="{_ONSET}" stroke-width="1.5" stroke-dasharray="5 4"/>'
        )
        anchor, side = ("end", -6) if at > (_LEFT + _RIGHT) / 2 else ("start", 6)
        label = f"{summary.onset.slower:.0%} slower from {summary.onset.at_s:.0f} s on"
        parts.append(_text(at + side, _TOP + 14, label, f'text-anchor="{anchor}" fill="{_ONSET}" font-weight="600"'))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(x: Callable, y: Callable, end_s: float, top_ms: float, tails: bool) -> Iterator[str]:
    for step in range(5):
        value, moment = top_ms * step / 4, end_s * step / 4
        yield f'<path d="M{_LEFT} {y(value):.1f}H{_RIGHT}" stroke="#e4e7eb"/>'
        yield _text(_LEFT - 8, y(value) + 4, f"{value:.4g}", 'text-anchor="end"')
        yield _text(x(moment), _BOTTOM + 20, f"{moment:.4g}", 'text-anchor="middle"')
    yield _text((_LEFT + _RIGHT) / 2, _BOTTOM + 42, "seconds", 'text-anchor="middle"')
    middle = (_TOP + _BOTTOM) / 2
    yield _text(22, middle, "latency, ms", f'text-anchor="middle" transform="rotate(-90 22 {middle:g})"')
    yield _text(_LEFT, 48, "median of each window", f'fill="{_MEDIAN}"')
    if tails:
        yield _text(_LEFT + 170, 48, "its 99th percentile", 'fill="#627d98"')


def _temperature(found: Sustained, x: Callable, middles: list[float]) -> Iterator[str]:
    known = [(s, w.temperature_c) for s, w in zip(middles, found.windows) if w.temperature_c is not None]
    if not known:
        return
    low, high = min(t for _, t in known) - 1, max(t for _, t in known) + 1
    y = lambda value: _BOTTOM - (value - low) / (high - low) * (_BOTTOM - _TOP)
    yield _line([(x(s), y(t)) for s, t in known], _HEAT, 1.2)
    for value in (low, high):
        yield _text(_RIGHT + 8, y(value) + 4, f"{value:.0f} °C", f'fill="{_HEAT}"')
    yield _text(_LEFT + 316, 48, "temperature", f'fill="{_HEAT}"')


def _line(points: list[tuple[float, float]], color: str, width: float) -> str:
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"/>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-6)))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value)


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
