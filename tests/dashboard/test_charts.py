"""What the charts draw, read from the specifications that the browser gets."""

from __future__ import annotations

import vl_convert

from dashboard import charts, frames
from mobile_bench import stats
from mobile_bench.store import read_study

from .conftest import ODD


def _layers(chart) -> list[dict]:
    spec = chart.to_dict()
    rows = spec["datasets"]
    return [
        {**layer, "rows": rows.get(layer.get("data", spec.get("data", {})).get("name"), [])} for layer in spec["layer"]
    ]


def _marks(chart, kind: str) -> list[dict]:
    return [layer for layer in _layers(chart) if layer["mark"]["type"] == kind]


def _texts(chart) -> list[str]:
    """Everything written on the chart, as it is really drawn."""
    import re

    return re.findall(r"<text[^>]*>([^<]*)</text>", vl_convert.vegalite_to_svg(chart.properties(width=800).to_dict()))


def test_the_trade_off_draws_points_intervals_front_and_deadline(study):
    frame = frames.variants(read_study(study))
    chart = charts.trade_off(frame, 1000 / 30)
    (points,) = _marks(chart, "point")
    measured = frame[frame["median_ms"].notna()]
    assert len(points["rows"]) == len(measured)
    row = next(r for r in points["rows"] if r["name"] == "resnet8 qat-int8")
    expected = measured.loc["resnet8/qat-int8"]
    assert (row["x"], row["top1"]) == (expected.median_ms, expected.top1 * 100)
    assert (row["x_low"], row["x_high"], row["top1_low"]) == (
        expected.median_low_ms, expected.median_high_ms, expected.top1_low * 100,
    )  # fmt: skip
    (line,) = _marks(chart, "line")
    front = stats.pareto(measured[["top1", "median_ms"]].to_numpy().tolist(), ("max", "min"))
    assert sorted(r["x"] for r in line["rows"]) == sorted(measured["median_ms"].iloc[front])
    said = _texts(chart)
    assert "deadline 33.3 ms (30 frames/s)" in said and "Median latency (ms, logarithmic)" in said
    assert "Top-1 accuracy (%, 95% interval)" in said


def test_a_deadline_far_away_says_how_far(study):
    frame = frames.variants(read_study(study))
    quick = frame[frame["model"] == "resnet8"]
    (rule,) = [
        layer["rows"] for layer in _marks(charts.trade_off(quick, 1000 / 30), "rule") if "at" in layer["rows"][0]
    ]
    assert "× the slowest" in rule[0]["label"] and rule[0]["at"] < 2
    (rule,) = [
        layer["rows"]
        for layer in _marks(charts.trade_off(quick, 1000 / 30, whole=True), "rule")
        if "at" in layer["rows"][0]
    ]
    assert rule[0]["at"] == 1000 / 30


def test_other_axes_need_no_measurement(study):
    frame = frames.variants(read_study(study))
    (points,) = _marks(charts.trade_off(frame, 33, "size_bytes"), "point")
    assert f"{ODD} baseline-int8" in [row["name"] for row in points["rows"]]
    assert charts.trade_off(frame[frame["top1"].isna()], 33) is None


def test_the_histogram_counts_every_sample_once(study):
    entry = frames.entry_of(read_study(study), "resnet8/qat-int8")
    (record,) = entry.measurements
    summary = stats.summarize(record)
    chart = charts.latency(record, summary.p99_ms)
    (bars,) = _marks(chart, "bar")
    beyond = sum(value > 1.5 * summary.p99_ms for value in record.latency_ms)
    assert sum(row["runs"] for row in bars["rows"]) + beyond == len(record.latency_ms) and beyond == 3
    said = _texts(chart)
    assert any(text.startswith("median 0.7") for text in said) and any(text.startswith("deadline 0.8") for text in said)
    assert any("3 slower runs" in text for text in said)
    assert any("the deadline of 33.3 ms" in text for text in _texts(charts.latency(record, 1000 / 30)))


def test_runs_and_history_hold_every_point(study):
    entry = frames.entry_of(read_study(study), "resnet8/distill_prune_qat-int8")
    runs = charts.runs(frames.samples_frame(entry.measurements[0])).to_dict()
    (rows,) = runs["datasets"].values()
    assert [row["phase"] for row in rows].count("warm-up") == 30 and len(rows) == 430
    (rows,) = charts.history(frames.history_frame(entry)).to_dict()["datasets"].values()
    assert len(rows) == 15
    assert charts.history(frames.history_frame(frames.entry_of(read_study(study), "resnet8/baseline-int8"))) is None
