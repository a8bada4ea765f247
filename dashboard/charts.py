"""DataFrames of dashboard.frames to Altair charts. No streamlit here.

Marks have colors that read on white and on near-black; axes and text take the page's own, so one chart
serves both. Colors are those of Okabe and Ito (2008, Color Universal Design), and whatever a color says
a shape or the tooltip says too.
"""

from __future__ import annotations

import itertools

import altair as alt
import numpy as np
import pandas as pd

from dashboard import text
from mobile_bench import stats
from mobile_bench.records import Measurement

PALETTE = ("#2A85C7", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800", "#8C8C8C")
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
DEADLINE, NEUTRAL, MEDIAN, P99 = "#D1495B", "#8A9099", "#2A85C7", "#E69F00"

#: What the trade-off's horizontal axis can be: column -> (title with unit, factor from the column's unit).
AXES = {
    "median_ms": ("Median latency (ms, logarithmic)", 1.0),
    "size_bytes": ("File size (kB, logarithmic)", 1e-3),
    "gzip_bytes": ("File size after gzip (kB, logarithmic)", 1e-3),
    "macs": ("Multiply-accumulates (millions, logarithmic)", 1e-6),
}
HOW_TO_READ = (
    "Up and left is better. Filled marks: nothing else is more accurate, faster and smaller at once. The stepped line "
    "is the front of the two axes. Thin lines are 95% intervals. The larger the mark, the larger the file."
)
#: A deadline further right than this many times the slowest point stands at the edge and says how far it really is:
#: in its place it would squeeze the points.
REACH = 4.0


def trade_off(
    frame: pd.DataFrame, deadline_ms: float, x: str = "median_ms", *, whole: bool = False, height: int = 440
) -> alt.LayerChart | None:
    """Accuracy against `x`, area by file size, with 95% error bars, the front and the deadline.

    The stepped line is the front of these two axes; a filled mark is on the front of accuracy, latency and
    size together. whole: draw the deadline in its place even where that is far right of every point. None
    where no row has both values.
    """
    title, factor = AXES[x]
    shown = frame[frame["top1"].notna() & frame[x].notna() & (frame[x] > 0)].copy()
    if shown.empty:
        return None
    shown["x"] = shown[x] * factor
    error_bars = x == "median_ms"
    shown["x_low"] = shown["median_low_ms"].clip(lower=1e-6) if error_bars else shown["x"]
    shown["x_high"] = shown["median_high_ms"] if error_bars else shown["x"]
    for column in ("top1", "top1_low", "top1_high"):
        shown[column] = shown[column] * 100
    shown["name"] = shown["model"] + " " + shown["variant"]
    shown["size_kb"] = shown["size_bytes"] / 1e3
    shown["front"] = np.where(shown["on_front"].astype(bool), "on the front", "beaten")
    for column, said in _said(shown).items():
        shown[column] = said

    far = deadline_ms > REACH * shown["x_high"].max() and not whole
    with_deadline = error_bars and not far
    right = max(shown["x_high"].max(), deadline_ms if with_deadline else 0)
    x_scale = alt.Scale(type="log", domain=[shown["x_low"].min() / 1.15, right * 1.15], nice=False)
    x_axis = alt.X("x:Q", title=title, scale=x_scale, axis=_log_axis(shown["x_low"].min() / 1.15, right * 1.15))
    low, high = shown["top1_low"].min(), shown["top1_high"].max()
    room = max(0.2, 0.06 * (high - low))
    y_scale = alt.Scale(domain=[max(0, low - room), high + 3.5 * room], nice=False)
    possible = alt.Axis(labelExpr="datum.value <= 100 ? datum.label : ''", tickCount=8)
    y_axis = alt.Y("top1:Q", title="Top-1 accuracy (%, 95% interval)", scale=y_scale, axis=possible)

    columns = [
        "x", "x_low", "x_high", "top1", "top1_low", "top1_high", "name", "model", "recipe", "size_kb", "front",
        "said_top1", "said_ms", "said_fps", "said_size", "said_agreement", "said_deadline",
    ]  # fmt: skip
    base = alt.Chart(shown[columns].reset_index(drop=True))
    recipes, models = list(dict.fromkeys(shown["recipe"])), list(dict.fromkeys(shown["model"]))
    color = alt.Color(
        "recipe:N", title=None, scale=alt.Scale(domain=recipes, range=_repeat(PALETTE, len(recipes))),
        legend=alt.Legend(orient="bottom", columns=3, symbolType="circle", symbolOpacity=1, symbolStrokeWidth=0),
    )  # fmt: skip
    shape = alt.Shape(
        "model:N", title=None, scale=alt.Scale(domain=models, range=_repeat(SHAPES, len(models))),
        legend=None if len(models) < 2
        else alt.Legend(orient="top", symbolFillColor="transparent", symbolStrokeColor=NEUTRAL, symbolOpacity=1),
    )  # fmt: skip
    bars = base.mark_rule(opacity=0.45).encode(x=x_axis, y=alt.Y("top1_low:Q"), y2="top1_high:Q", color=color)
    layers = [_front_line(shown, x_axis, y_scale), bars]
    if error_bars:
        layers.append(base.mark_rule(opacity=0.45).encode(x=alt.X("x_low:Q"), x2="x_high:Q", y=y_axis, color=color))
    points = base.mark_point(strokeWidth=1.8, opacity=1).encode(
        x=x_axis, y=y_axis, color=color, shape=shape,
        size=alt.Size("size_kb:Q", title="File size (kB)", scale=alt.Scale(range=[60, 420], zero=True), legend=None),
        fill=alt.condition(alt.datum.front == "on the front", color, alt.value("transparent")),
        tooltip=[
            alt.Tooltip("name:N", title="Variant"), alt.Tooltip("said_top1:N", title="Top-1 [95%]"),
            alt.Tooltip("said_size:N", title="Size (gzip)"), alt.Tooltip("said_ms:N", title="Median [95%]"),
            alt.Tooltip("said_fps:N", title="Frames/s"), alt.Tooltip("said_deadline:N", title="Deadline"),
            alt.Tooltip("said_agreement:N", title="Agrees with baseline"), alt.Tooltip("front:N", title="Pareto"),
        ],
    )  # fmt: skip
    layers += [points, *_front_names(shown, x_axis, y_scale)]
    if with_deadline:
        layers += _deadline_rule(deadline_ms, f"deadline {text.rate(deadline_ms)}")
    elif error_bars:
        times = deadline_ms / shown["p90_ms"].max()
        layers += _deadline_rule(
            right * 1.15, f"deadline {text.rate(deadline_ms)} further right, {times:,.0f}× the slowest ▸"
        )
    return alt.layer(*layers).properties(height=height, width="container")


def latency(
    measurement: Measurement, deadline_ms: float, height: int = 200, width: int | str = "container"
) -> alt.LayerChart:
    """How the samples of one measurement are spread: a histogram with median, p99 and deadline.

    The title names what lies too far away to be drawn: samples beyond 1.5 times the 99th percentile, a
    deadline beyond them or below half of the fastest.
    """
    samples = np.asarray(measurement.latency_ms)
    summary = stats.summarize(measurement)
    near = summary.min_ms / 2 <= deadline_ms <= 1.5 * summary.p99_ms
    limit = max(1.5 * summary.p99_ms, 1e-6)
    drawn = samples[samples <= limit]
    left, right = float(drawn.min()), float(drawn.max())
    room = max((right - left) * 0.04, right * 0.002, 1e-6)
    bins = int(np.clip(np.sqrt(len(drawn)) * 1.6, 8, 48))
    counts, edges = np.histogram(drawn, bins, (left - room / 2, right + room / 2))
    frame = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "runs": counts})
    frame["span"] = [f"{text.significant(a)} to {text.ms(b)}" for a, b in itertools.pairwise(edges)]
    frame = frame[frame["runs"] > 0]
    domain = [
        min(left - room, deadline_ms * 0.98 if near else left),
        max(right + room, deadline_ms * 1.02 if near else 0),
    ]
    x = alt.X("low:Q", bin="binned", title="Latency of one inference (ms)", scale=alt.Scale(domain=domain, nice=False))
    bars = (
        alt.Chart(frame)
        .mark_bar(color=NEUTRAL, opacity=0.75, binSpacing=1)
        .encode(
            x=x,
            x2="high:Q",
            y=alt.Y("runs:Q", title="Timed runs", axis=alt.Axis(tickMinStep=1, tickCount=4)),
            tooltip=[alt.Tooltip("span:N", title="Latency"), alt.Tooltip("runs:Q", title="Runs")],
        )
    )
    marks = [("median", summary.median_ms, MEDIAN), ("p99", summary.p99_ms, P99)]
    if near:
        marks.append(("deadline", deadline_ms, DEADLINE))
    rules = pd.DataFrame([{"at": at, "label": f"{name} {text.ms(at)}", "mark": name} for name, at, _ in marks])
    color = alt.Color(
        "label:N", title=None, legend=alt.Legend(orient="top", symbolType="stroke", symbolStrokeWidth=3),
        scale=alt.Scale(domain=list(rules["label"]), range=[color for *_, color in marks]),
    )  # fmt: skip
    dash = alt.StrokeDash(
        "mark:N", legend=None, scale=alt.Scale(domain=["median", "p99", "deadline"], range=[[1, 0], [5, 3], [2, 2]])
    )
    lines = alt.Chart(rules).mark_rule(strokeWidth=2.5).encode(
        x=alt.X("at:Q"), color=color, strokeDash=dash, tooltip=[alt.Tooltip("label:N", title="Mark")]
    )  # fmt: skip
    chart = alt.layer(bars, lines).properties(height=height, width=width)
    hidden, said = len(samples) - len(drawn), []
    if hidden:
        said.append(f"{text.plural(hidden, 'slower run')} up to {text.ms(summary.max_ms)}")
    if not near:
        said.append(f"the deadline of {text.ms(deadline_ms)}")
    if said:
        title = alt.Title(
            f"not drawn: {', '.join(said)}", anchor="end", fontSize=11, fontWeight="normal", color=NEUTRAL
        )
        chart = chart.properties(title=title)
    return chart


def runs(samples: pd.DataFrame, height: int = 260) -> alt.Chart:
    """Every run in the order it happened (frames.samples_frame): drift and outliers show here."""
    shown = samples.assign(latency_ms=samples["latency_ms"].map(lambda v: float(f"{v:.5g}")))
    return (
        alt.Chart(shown)
        .mark_circle(size=16, opacity=0.7)
        .encode(
            x=alt.X("run:Q", title="Run, in order", scale=alt.Scale(nice=False)),
            y=alt.Y("latency_ms:Q", title="Latency (ms)", scale=alt.Scale(zero=False)),
            color=alt.Color(
                "phase:N", title=None, legend=alt.Legend(orient="top"),
                scale=alt.Scale(domain=["warm-up", "timed"], range=[P99, MEDIAN]),
            ),
            tooltip=[
                alt.Tooltip("phase:N", title="Phase"), alt.Tooltip("run:Q", title="Run"),
                alt.Tooltip("latency_ms:Q", title="Latency (ms)"),
            ],
        )
        .properties(height=height, width="container")
    )  # fmt: skip


def history(frame: pd.DataFrame, height: int = 280) -> alt.Chart | None:
    """Validation accuracy over all training steps (frames.history_frame); None below two points."""
    shown = frame[frame["accuracy"].notna()].assign(percent=lambda f: f["accuracy"] * 100)
    if len(shown) < 2:
        return None
    names = list(dict.fromkeys(shown["technique"]))
    return (
        alt.Chart(shown)
        .mark_line(point=alt.OverlayMarkDef(filled=True, size=55), strokeWidth=2)
        .encode(
            x=alt.X("training_step:Q", title="Training steps, all stages", scale=alt.Scale(nice=False)),
            y=alt.Y("percent:Q", title="Validation top-1 (%)", scale=alt.Scale(zero=False)),
            color=alt.Color(
                "technique:N", title=None, legend=alt.Legend(orient="top"),
                scale=alt.Scale(domain=names, range=_repeat(PALETTE, len(names))),
            ),
            tooltip=[
                alt.Tooltip("technique:N", title="Stage"), alt.Tooltip("training_step:Q", title="Step"),
                alt.Tooltip("percent:Q", title="Validation top-1 (%)", format=".2f"),
                alt.Tooltip("loss:Q", title="Training loss", format=".4f"),
            ],
        )
        .properties(height=height, width="container")
    )  # fmt: skip


def operations(frame: pd.DataFrame, places: tuple[str, str], height: int = 210) -> alt.Chart:
    """The operations of a file in order, a cell each, colored by where they run (frames.operations_frame).

    places: the names of the delegate and of what is left to, as they stand in the column 'place'. Cells left to the
    CPU are also lower, so that the picture can be read without its colors.
    """
    shown = frame.assign(start=frame["index"] - 0.5, end=frame["index"] + 0.5)
    shown["top"] = np.where(shown["place"] == places[0], 1.0, 0.62)
    return (
        alt.Chart(shown)
        .mark_rect(stroke="white", strokeWidth=0 if len(shown) > 150 else 0.6)
        .encode(
            x=alt.X("start:Q", title="Operation, in the order they run", axis=alt.Axis(tickMinStep=1, format="d"),
                    scale=alt.Scale(domain=[-0.5, float(shown["index"].max()) + 0.5], nice=False)),
            x2="end:Q",
            y=alt.Y("top:Q", axis=None, scale=alt.Scale(domain=[0, 1])),
            y2=alt.Y2Datum(0),
            color=alt.Color(
                "place:N", title=None, legend=alt.Legend(orient="top", symbolType="square"),
                scale=alt.Scale(domain=list(places), range=[PALETTE[0], PALETTE[3]]),
            ),
            tooltip=[
                alt.Tooltip("index:Q", title="Operation", format="d"), alt.Tooltip("op:N", title="Kind"),
                alt.Tooltip("layer:N", title="Layer"), alt.Tooltip("place:N", title="Runs on"),
                alt.Tooltip("reason:N", title="Why not on the delegate"), alt.Tooltip("fix:N", title="Fix"),
            ],
        )
        .properties(height=height, width="container")
    )  # fmt: skip


def _front_line(shown: pd.DataFrame, x_axis: alt.X, y_scale: alt.Scale) -> alt.Chart:
    """The front of the two axes as a staircase: below and right of it everything is beaten."""
    line = shown.iloc[_front_of(shown)].sort_values("x")[["x", "top1"]]
    return (
        alt.Chart(line.reset_index(drop=True))
        .mark_line(interpolate="step-after", strokeWidth=1.5, strokeDash=[4, 3], color=NEUTRAL)
        .encode(x=x_axis, y=alt.Y("top1:Q", title="Top-1 accuracy (%, 95% interval)", scale=y_scale))
    )


def _front_names(shown: pd.DataFrame, x_axis: alt.X, y_scale: alt.Scale) -> list[alt.Chart]:
    """The names of the variants on the line, above their error bars and turned towards the middle."""
    front = _apart(shown.iloc[_front_of(shown)], shown)
    middle = np.exp(np.log(shown["x"]).agg(["min", "max"]).mean())
    layers = []
    for align, part in (("left", front[front["x"] <= middle]), ("right", front[front["x"] > middle])):
        if len(part):
            data = part[["x", "top1_high", "name"]].reset_index(drop=True)
            layers.append(
                alt.Chart(data)
                .mark_text(
                    align=align, baseline="bottom", dx=-4 if align == "left" else 4, dy=-3, fontSize=11, color=NEUTRAL
                )
                .encode(x=x_axis, y=alt.Y("top1_high:Q", scale=y_scale), text="name:N")
            )
    return layers


def _apart(front: pd.DataFrame, shown: pd.DataFrame) -> pd.DataFrame:
    """Those of the front whose names do not lie on each other, the more accurate first."""
    wide = float(np.log(shown["x"].max() / shown["x"].min())) or 1.0
    high = float(shown["top1_high"].max() - shown["top1_low"].min()) or 1.0
    kept: list[pd.Series] = []
    for _, row in front.sort_values("top1", ascending=False).iterrows():
        near = [
            k
            for k in kept
            if abs(np.log(row["x"] / k["x"])) < 0.3 * wide and k["top1_high"] - row["top1_high"] < 0.12 * high
        ]
        if not near:
            kept.append(row)
    return pd.DataFrame(kept)


def _front_of(shown: pd.DataFrame) -> list[int]:
    return stats.pareto(shown[["top1", "x"]].to_numpy().tolist(), ("max", "min"))


def _deadline_rule(at: float, label: str) -> list[alt.Chart]:
    data = pd.DataFrame([{"at": at, "label": label}])
    rule = alt.Chart(data).mark_rule(color=DEADLINE, strokeWidth=2, strokeDash=[6, 3]).encode(
        x=alt.X("at:Q"), tooltip=[alt.Tooltip("label:N", title="Limit")]
    )  # fmt: skip
    label = alt.Chart(data).mark_text(color=DEADLINE, align="right", dx=-6, baseline="top", fontSize=12).encode(
        x=alt.X("at:Q"), y=alt.value(4), text="label:N"
    )  # fmt: skip
    return [rule, label]


def _log_axis(low: float, high: float) -> alt.Axis:
    """Ticks at 1, 2 and 5 of every decade in range, or the plain ones where that gives too few."""
    ticks = [m * 10.0**e for e in range(-6, 10) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return alt.Axis(values=ticks, format="~g") if len(ticks) >= 3 else alt.Axis(tickCount=5, format="~g")


def _said(shown: pd.DataFrame) -> dict[str, list[str]]:
    """What the tooltips say, already in words."""
    rows = [row for _, row in shown.iterrows()]
    timed = [row["median_ms"] == row["median_ms"] for row in rows]
    return {
        "said_top1": [f"{r['top1']:.2f}% [{r['top1_low']:.2f}, {r['top1_high']:.2f}]" for r in rows],
        "said_ms": [
            f"{text.ms(r['median_ms'])} [{', '.join(map(text.significant, (r['median_low_ms'], r['median_high_ms'])))}]"
            if t else "not measured" for r, t in zip(rows, timed)
        ],
        "said_fps": [text.fps(r["fps"]) for r in rows],
        "said_size": [f"{text.size(r['size_bytes'])} ({text.size(r['gzip_bytes'])})" for r in rows],
        "said_agreement": [text.percent(r["baseline_agreement"]) for r in rows],
        "said_deadline": ["unknown" if pd.isna(r["meets"]) else "met" if r["meets"] else "missed" for r in rows],
    }  # fmt: skip


def _repeat(values: tuple[str, ...], count: int) -> list[str]:
    return [values[number % len(values)] for number in range(count)]
