"""The classic picture of a roofline: speed over intensity, both logarithmic, as an SVG that needs no library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from mobile_bench.roofline import Attained, Peak

_WIDTH, _HEIGHT = 1240, 620
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 780, 56, 560
_COLORS = {"float32": "#0b62a4", "int8": "#c2410c"}
#: Rows of the legend, below which the rest is counted only.
_MOST = 16
_LINE = 20
_SMALLEST = 1e-3
_HALO = 'font-weight="600" paint-order="stroke" stroke="#ffffff" stroke-width="4"'


def picture(title: str, rows: Sequence[Attained], peak: Peak) -> str:
    """An SVG document: the roofs with their figures, and a numbered dot for each row that has arithmetic.

    rows: in the order of their numbers; those without arithmetic or without figures have no place in it and are
    counted below the legend.
    """
    drawn = [row for row in rows if row.gflops and row.intensity]
    x, y = _scales(drawn, peak)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="system-ui, sans-serif" font-size="13" fill="#1f2933">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_LEFT, 32, title, 'font-size="17" font-weight="600"'),
        *_axes(x, y),
        *sorted((*_roofs(peak, x, y), *_dots(drawn, x, y)), key=lambda part: part.startswith("<text")),
        *_legend(drawn, len(rows) - len(drawn)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Scale:
    """A logarithmic axis from `low` to `high`, both powers of ten, on the pixels from `start` to `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        self.low = 10.0 ** math.floor(math.log10(min(values)))
        self.high = 10.0 ** math.ceil(math.log10(max(values) * 1.05))
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        part = math.log10(value / self.low) / math.log10(self.high / self.low)
        return self._start + part * (self._end - self._start)

    def decades(self) -> Iterator[float]:
        yield from (self.low * 10.0**n for n in range(round(math.log10(self.high / self.low)) + 1))


def _scales(rows: Sequence[Attained], peak: Peak) -> tuple[_Scale, _Scale]:
    tops = [peak.gflops, peak.compute("int8")]
    ridges = [top / slope for top in tops for slope in (peak.gbytes_s, peak.cache_gbytes_s)]
    intensities = [max(row.intensity, _SMALLEST) for row in rows] + [min(ridges) / 5, max(ridges) * 3]
    x = _Scale(intensities, _LEFT, _RIGHT)
    speeds = [max(row.gflops, _SMALLEST) for row in rows] + tops
    return x, _Scale([min(*speeds, min(tops) / 5), *speeds], _BOTTOM, _TOP)


def _axes(x: _Scale, y: _Scale) -> Iterator[str]:
    for value in x.decades():
        yield _segment(x(value), _BOTTOM, x(value), _TOP, "#e4e7eb", 1)
        yield _text(x(value), _BOTTOM + 20, _decade(value), 'text-anchor="middle"')
    for value in y.decades():
        yield _segment(_LEFT, y(value), _RIGHT, y(value), "#e4e7eb", 1)
        yield _text(_LEFT - 8, y(value) + 4, _decade(value), 'text-anchor="end"')
    yield _text((_LEFT + _RIGHT) / 2, _BOTTOM + 44, "intensity: FLOP a byte", 'text-anchor="middle"')
    middle = (_TOP + _BOTTOM) / 2
    yield _text(24, middle, "speed: GFLOP/s", f'text-anchor="middle" transform="rotate(-90 24 {middle:g})"')


def _roofs(peak: Peak, x: _Scale, y: _Scale) -> Iterator[str]:
    tops = {"float32": peak.gflops, **({"int8": peak.gops_int8} if peak.gops_int8 else {})}
    highest = max(tops.values())
    for kind, top in tops.items():
        start = max(x.low, top / peak.cache_gbytes_s)
        yield _segment(x(start), y(top), _RIGHT, y(top), _COLORS[kind], 2.5)
        label = f"{kind}: {top:.3g} G{'FLOP' if kind == 'float32' else 'OP'}/s"
        yield _text(_RIGHT - 6, y(top) - 7, label, f'text-anchor="end" fill="{_COLORS[kind]}" {_HALO}')
    # Where the roofs of memory and cache are nearly one, the second label would lie on the first.
    apart = peak.cache_gbytes_s > 1.15 * peak.gbytes_s
    for name, slope, dash in (("cache", peak.cache_gbytes_s, "7 5"), ("memory", peak.gbytes_s, "")):
        first, last = max(x.low, y.low / slope), min(x.high, highest / slope)
        points = x(first), y(first * slope), x(last), y(last * slope)
        yield _segment(*points, "#52606d", 2, dash)
        if name == "memory" or apart:
            angle = math.degrees(math.atan2(points[3] - points[1], points[2] - points[0]))
            along, sign = 0.06, -1 if name == "cache" else 1
            at = points[0] + along * (points[2] - points[0]), points[1] + along * (points[3] - points[1])
            yield _text(
                *at, f"{name}: {slope:.3g} GB/s",
                f'fill="#3e4c59" {_HALO} dy="{8 * sign + 5 * (sign > 0)}" '
                f'transform="rotate({angle:.2f} {at[0]:.1f} {at[1]:.1f})"',
            )  # fmt: skip


def _dots(rows: Sequence[Attained], x: _Scale, y: _Scale) -> Iterator[str]:
    taken: list[tuple[float, float]] = []
    for number, row in enumerate(rows[:_MOST], 1):
        at = x(row.intensity), y(row.gflops)
        yield _marker(*at, row.kind)
        place = next(
            (at[0] + dx, at[1] + dy)
            for dx, dy in ((9, 4), (-21, 4), (-4, -10), (-4, 19), (9, -9), (9, 17), (-21, -9), (-21, 17), (24, 4))
            if (dx, dy) == (24, 4) or not any(abs(at[0] + dx - a) < 15 and abs(at[1] + dy - b) < 12 for a, b in taken)
        )
        taken += [place, (at[0] - 5, at[1] + 5)]
        yield _text(*place, str(number), f'font-size="12" {_HALO}')


def _legend(rows: Sequence[Attained], left_out: int) -> Iterator[str]:
    top = _TOP + 12
    for number, row in enumerate(rows[:_MOST], 1):
        line = top + (number - 1) * _LINE
        yield _text(_RIGHT + 46, line, str(number), 'font-weight="600" text-anchor="end"')
        yield _marker(_RIGHT + 58, line - 4, row.kind)
        name = row.layer or row.name
        name = name if len(name) <= 34 else f"{name[:15]}…{name[-18:]}"
        yield _text(_RIGHT + 70, line, name)
        yield _text(_WIDTH - 16, line, f"{row.time_ms:.3g} ms, {row.share:.0%}", 'text-anchor="end"')
    line = top + min(len(rows), _MOST) * _LINE
    notes = ["circles: float32, squares: int8; time of an inference and share of its roof"]
    if len(rows) > _MOST:
        notes.append(f"{len(rows) - _MOST} more are not drawn")
    if left_out:
        notes.append(f"{left_out} without arithmetic or figures cannot be drawn")
    for number, note in enumerate(notes):
        yield _text(_RIGHT + 34, line + 8 + number * 17, note, 'font-size="11.5" fill="#52606d"')


def _marker(x: float, y: float, kind: str) -> str:
    style = f'fill="{_COLORS[kind]}" stroke="#ffffff" stroke-width="1"'
    if kind == "int8":
        return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" {style}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" {style}/>'


def _segment(x1: float, y1: float, x2: float, y2: float, color: str, width: float, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width:g}"'
        f"{dashed}/>"
    )


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _decade(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:.6f}".rstrip("0")
