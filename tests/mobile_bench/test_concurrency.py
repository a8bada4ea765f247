"""Streams at once: each is counted in one common window, and one that fails says why."""

import functools
import json

import pytest

from mobile_bench.cli import app
from mobile_bench.cli_support import exit_code_of
from mobile_bench.concurrency import Streams, _run_until, measure_streams
from mobile_bench.errors import InputError
from mobile_bench.records import Target


@pytest.fixture(autouse=True)
def own_lock(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def run_with_clock(step_s, start, end):
    """Latencies and the last end when each inference takes step_s by a clock that starts at 0."""
    now = [0.0]

    def invoke():
        now[0] += step_s

    return _run_until(invoke, start, end, clock=lambda: now[0])


def test_only_what_ends_within_the_window_counts():
    latency_ms, last = run_with_clock(0.25, 1.0, 2.0)
    assert latency_ms == [250.0] * 4 and last == 2.0


def test_a_window_shorter_than_one_inference_holds_one():
    assert run_with_clock(3.0, 1.0, 2.0) == ([3000.0], 3.0)


def test_each_stream_is_a_process_with_latencies_of_its_own(tiny):
    found = measure_streams(tiny.path("int8"), 2, seconds=0.3)
    measurement = found.measurement
    assert measurement.status == "ok" and measurement.kind == "stream" and len(measurement.rounds) == 2
    rows = found.per_stream()
    assert sum(row["count"] for row in rows) == len(measurement.latency_ms)
    assert found.fps == pytest.approx(sum(row["fps"] for row in rows))
    for row in rows:
        assert 0 < row["median_ms"] <= row["p99_ms"] and row["fps"] > 0
    assert measurement.peak_rss_bytes > 0 and measurement.device["runtime"]


def test_efficiency_is_the_share_of_as_many_single_streams(tiny):
    measurement = measure_streams(tiny.path("int8"), 1, seconds=0.1).measurement
    assert Streams(measurement, 4, (10.0, 20.0, 20.0, 10.0)).efficiency(30.0) == pytest.approx(0.5)


@pytest.mark.parametrize("name, status", [("text", "refused"), ("self_calling", "failed")])
def test_a_file_that_cannot_run_is_a_record_with_its_reason(tiny, name, status):
    found = measure_streams(tiny.path(name), 2, seconds=0.1)
    assert found.measurement.status == status and found.measurement.reason
    assert found.fps == 0 and found.per_stream() == []


def test_what_makes_no_sense_is_refused_at_once(tiny):
    for streams in (0, 65, 1.5):
        with pytest.raises(InputError, match="streams"):
            measure_streams(tiny.path("int8"), streams)
    with pytest.raises(InputError, match="no Python"):
        measure_streams(tiny.path("int8"), 1, Target(transport="adb", address="serial"))


def test_the_sweep_shows_streams_only_when_asked(tiny, monkeypatch, capsys):
    brief = functools.partial(measure_streams, seconds=0.3)
    monkeypatch.setattr("mobile_bench.concurrency.measure_streams", brief)

    def sweep(*args):
        assert exit_code_of(lambda **_: app(["sweep", str(tiny.path("int8")), *args], standalone_mode=False)) == 0
        return capsys.readouterr().out

    points = json.loads(sweep("--threads", "1", "--batch", "2", "--streams", "1,2", "--json"))["points"]
    one, two = (point["streams"] for point in points)
    assert (one["streams"], two["streams"]) == (1, 2) and len(two["per_stream"]) == 2
    assert one["efficiency"] == 1 and two["efficiency"] == pytest.approx(two["fps"] / (2 * one["fps"]))
    assert points[1]["summary"]["rounds"] == 2 and points[1]["measurement"]["batch"] == 2
    shown = sweep("--threads", "1", "--batch", "2", "--streams", "1")
    assert all(word in shown for word in ("Streams", "Efficiency", "p99"))
