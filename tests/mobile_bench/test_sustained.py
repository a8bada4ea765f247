"""Minutes in seconds: windows of a real run, what is left of one that ends early, and when throttling is seen."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from mobile_bench import sustained_worker
from mobile_bench.commands.sustained import chart
from mobile_bench.energy import Energy
from mobile_bench.errors import InputError, ModelRefused
from mobile_bench.records import Target
from mobile_bench.sustained import Onset, Sustained, Window, find_onset, summarize_sustained, sustain
from mobile_bench.sustained_picture import picture

COMMAND = """
import typer
from mobile_bench.cli_support import run_app
from mobile_bench.commands.sustained import sustained
app = typer.Typer()
app.command()(sustained)
run_app(app)
"""


@pytest.fixture(scope="module", autouse=True)
def own_lock(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def windows_of(medians, **fields):
    return tuple(Window(float(n), 1.0, 10, m, 1.2 * m, 1.5 * m, **fields) for n, m in enumerate(medians))


def run_of(medians, **fields):
    values = {"seconds": float(len(medians)), "fps": None, "status": "ok", **fields}
    return Sustained(sha256="0" * 64, target=Target(), windows=windows_of(medians), **values)


def noisy(shape, seed=0, noise=0.01):
    return np.asarray(shape, float) * np.exp(np.random.default_rng(seed).normal(0, noise, len(shape)))


def test_a_step_is_found_where_it_is():
    for seed in range(5):
        judged, onset = find_onset(noisy([10.0] * 60 + [12.0] * 60, seed))
        assert judged and abs(onset.window - 60) <= 2
        assert onset.slower == pytest.approx(0.2, abs=0.02) and onset.p_value <= 0.01


def test_a_slow_drift_begins_where_it_leaves_the_first_seconds_by_3_percent():
    ramp = 10 * np.concatenate([np.ones(50), np.linspace(1, 1.5, 100), np.full(50, 1.5)])
    _, onset = find_onset(noisy(ramp, noise=0.003))
    assert 50 < onset.window < 65 and onset.slower > 0.2


@pytest.mark.parametrize(
    "shape",
    [
        [10.0] * 120,
        [10.0] * 60 + [10.2] * 60,
        [10.0] * 60 + [9.0] * 60,
        [10.0] * 40 + [13.0] * 20 + [10.0] * 60,
        [10.0] * 118 + [15.0] * 2,
        [10.0] * 30 + [30.0] + [10.0] * 50 + [25.0] + [10.0] * 38,
    ],
    ids=["steady", "2 percent", "faster", "recovers", "the very end", "two hiccups"],
)
def test_what_is_no_throttling_is_not_called_that(shape):
    for seed in range(5):
        assert find_onset(noisy(shape, seed)) == (True, None)


def test_noise_alone_is_hardly_ever_throttling():
    """Neighbours that are alike (AR(1), 0.6) are where a test that takes windows for independent goes wrong."""
    random, found = np.random.default_rng(1), 0
    for _ in range(60):
        noise = random.normal(0, 0.02, 120)
        for n in range(1, 120):
            noise[n] += 0.6 * noise[n - 1]
        found += find_onset(10 * np.exp(noise))[1] is not None
    assert found <= 1


def test_few_windows_are_not_judged():
    assert find_onset([10.0] * 5 + [20.0] * 6) == (False, None)
    assert find_onset([0.0] * 20) == (True, None)
    assert find_onset([10.0] * 12) == (True, None)


def test_the_summary_is_of_the_edges_and_the_worst():
    found = run_of([10.0] * 20 + [11.0, 40.0, 11.0] + [12.0] * 20)
    summary = summarize_sustained(found)
    assert (summary.first_ms, summary.last_ms, summary.worst_ms, summary.worst_at_s) == (10.0, 12.0, 40.0, 21.0)
    assert summary.change == pytest.approx(0.2) and summary.inferences == 430 and summary.per_second == 10
    assert summary.onset.at_s == summary.onset.window == 20
    assert (summary.energy_mj, summary.energy_source, summary.net_mj) == (None, "not measured", None)
    assert summary.temperature_c is None and summary.frequency_mhz is None


def test_the_chart_is_as_high_as_the_latency_and_marks_the_onset():
    found = run_of([10.0] * 100 + [20.0] * 100)
    lines = chart(found.windows, summarize_sustained(found), columns=40).splitlines()
    top, bottom = (line.partition("│")[2] for line in (lines[0], lines[5]))
    assert top == " " * 20 + "█" * 20 and bottom == "█" * 40
    assert lines[0].split()[0] == "20" and lines[6].endswith("200 s")
    assert lines[7].index("▲") - lines[5].index("│") - 1 == 20 and "slower from 100 s on" in lines[7]
    steady = run_of([10.0] * 30)
    assert "▲" not in chart(steady.windows, summarize_sustained(steady))


def test_the_picture_is_an_svg_with_the_onset_and_the_temperature():
    found = run_of([10.0] * 100 + [20.0] * 100)
    drawn = picture("a <b>", found, summarize_sustained(found))
    root = ElementTree.fromstring(drawn)
    lines = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 2 and len(lines[0].attrib["points"].split()) == 200
    assert "100% slower from 100 s on" in drawn and "a &lt;b&gt;" in drawn and "°C" not in drawn
    warm = Sustained("", Target(), 3.0, None, "ok", windows_of([1.0] * 3, temperature_c=70.0))
    assert "71 °C" in picture("", warm, summarize_sustained(warm))


class Clock:
    """Time that passes only when something is done."""

    def __init__(self):
        self.now_ns = 10**12

    def perf_counter_ns(self):
        return self.now_ns

    def sleep(self, seconds):
        self.now_ns += max(1, round(seconds * 1e9))


@pytest.fixture
def run_windows(monkeypatch):
    def run(costs_s, seconds, fps=None):
        clock, costs, found = Clock(), iter(costs_s), []
        monkeypatch.setattr(sustained_worker, "time", clock)
        model = SimpleNamespace(bare_invoke=lambda: clock.sleep(next(costs)))
        sustained_worker.run_windows(model, seconds, fps, found.append)
        assert found[0] is None
        return found[1:]

    return run


def test_windows_end_with_the_first_inference_after_a_second(run_windows):
    first, second, third = run_windows([0.3] * 4 + [0.6] * 2 + [0.5] * 9, 3.3)
    assert (first.start_s, first.seconds, first.count, first.median_ms) == pytest.approx((0, 1.2, 4, 300))
    assert (second.start_s, second.seconds, second.count, second.median_ms) == pytest.approx((1.2, 1.2, 2, 600))
    assert (third.start_s, third.seconds, third.count) == pytest.approx((2.4, 1.0, 2))


def test_a_short_rest_is_left_out_and_a_slow_model_has_windows_all_the_same(run_windows):
    assert [w.count for w in run_windows([0.25] * 99, 2.25)] == [4, 4]
    assert [w.count for w in run_windows([0.25] * 99, 2.75)] == [4, 4, 3]
    assert [w.seconds for w in run_windows([5.0] * 9, 7)] == pytest.approx([5, 5])


def test_a_paced_run_keeps_its_turns_and_counts_those_it_misses(run_windows):
    (paced,) = run_windows([0.01] * 99, 1, fps=10)
    assert paced.count == 10 and paced.missed == 0 and paced.median_ms == pytest.approx(10)
    found = run_windows([0.25] * 99, 2, fps=10)
    # Of 20 turns it serves those at 0, 0.2 (at 0.25), 0.5, 0.7 (at 0.75), ...
    assert sum(w.count for w in found) == 8 and sum(w.missed for w in found) == 12
    (slow,) = run_windows([9.0], 2, fps=10)
    assert (slow.count, slow.missed) == (1, 19), "turns after the end are not missed"


def test_a_real_run_has_windows_the_machines_state_and_energy(tiny, machine):
    said = []
    found = sustain(
        tiny.path("int8"), seconds=2.2, fps=100, target=Target(threads=2), idle_s=0.4, root=machine,
        on_progress=said.append,
    )  # fmt: skip
    summary = summarize_sustained(found)
    assert found.status == "ok" and 1 <= len(found.windows) <= 2 and found.fps == 100
    assert all(w.count >= 1 and 0 < w.median_ms <= w.p99_ms <= w.max_ms for w in found.windows)
    assert summary.temperature_c == (61.0, 61.0) and summary.frequency_mhz == (1500.0, 1500.0)
    assert found.device["runtime"] == "ai-edge-litert" and found.started_at.endswith("+00:00")
    used = found.energy
    assert used.source == summary.energy_source == "RAPL package-0"
    assert used.inferences == summary.inferences == sum(w.count for w in found.windows)
    assert used.gross_j > 0 and used.gross_j % 2 == 0 and used.idle_w > 0
    assert summary.energy_mj == pytest.approx(1000 * used.gross_j / summary.inferences)
    assert summary.net_mj == pytest.approx(1000 * (used.gross_j - used.idle_w * used.seconds) / summary.inferences)
    assert sum("window" in message for message in said) == len(found.windows)


def test_an_interrupt_keeps_what_was_measured(tiny, machine):
    def interrupt(message):
        if message.get("window"):
            raise KeyboardInterrupt

    found = sustain(tiny.path("float32"), seconds=600, idle_s=0, root=machine, on_progress=interrupt)
    assert found.status == "interrupted" and len(found.windows) == 1
    assert found.energy.inferences == found.windows[0].count and found.energy.idle_w is None

    def at_once(message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sustain(tiny.path("float32"), seconds=600, energy="none", on_progress=at_once)


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="finds the child in /proc")
def test_a_crash_on_the_way_keeps_what_was_measured(tiny, tmp_path):
    def kill(message):
        if message.get("window"):
            for child in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split():
                if b"sustained_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)

    found = sustain(tiny.path("float32"), seconds=600, root=tmp_path, on_progress=kill)
    assert found.status == "failed" and "SIGKILL" in found.reason and found.windows
    assert found.energy is None and summarize_sustained(found).energy_source == "not measured"


def test_a_charger_that_is_plugged_in_on_the_way_costs_the_energy_alone(tiny, tmp_path):
    supply = tmp_path / "sys/class/power_supply/BAT0"
    supply.mkdir(parents=True)
    for name, text in (("type", "Battery"), ("current_now", "1000000"), ("voltage_now", "4000000")):
        (supply / name).write_text(text)
    (supply / "status").write_text("Discharging")

    def plug_in(message):
        if message.get("window"):
            (supply / "status").write_text("Charging")

    found = sustain(tiny.path("float32"), seconds=2.2, idle_s=0, root=tmp_path, on_progress=plug_in)
    assert found.status == "ok" and len(found.windows) == 2 and found.energy is None
    assert any("Unplug the charger" in warning for warning in found.warnings)


def test_a_meters_log_is_read_when_the_run_is_over(tiny, tmp_path):
    log, now = tmp_path / "m.csv", time.time()
    rows = "".join(f"{now + n},4\n" for n in range(-5, 60))
    log.write_text("time,power\n" + rows)
    found = sustain(tiny.path("float32"), seconds=1.2, idle_s=0.3, energy=str(log), root=tmp_path)
    assert found.energy.source == "meter m.csv"
    assert found.energy.gross_j == pytest.approx(4 * found.energy.seconds) and found.energy.idle_w == pytest.approx(4)
    assert abs(found.energy.net_j) < 1e-3
    log.write_text("time,power\n1,4\n2,4\n")
    found = sustain(tiny.path("float32"), seconds=1, idle_s=0, energy=str(log), root=tmp_path)
    assert found.energy is None and any("does not span" in warning for warning in found.warnings)


def test_what_makes_no_sense_is_refused(tiny, tmp_path):
    nan = float("nan")
    for options in ({"seconds": 0}, {"seconds": nan}, {"fps": 0}, {"fps": -1}, {"fps": nan}, {"idle_s": -1}):
        with pytest.raises(InputError, match="out of range"):
            sustain(tiny.path("float32"), root=tmp_path, **options)
    with pytest.raises(InputError, match="no energy counters"):
        sustain(tiny.path("float32"), energy="rapl", root=tmp_path)
    with pytest.raises(ModelRefused, match="made-up-op"):
        sustain(tiny.path("custom_op"), seconds=1, root=tmp_path)


def test_the_command_shows_it_and_writes_it(run_python, tiny, tmp_path):
    out, drawn = tmp_path / "out.json", tmp_path / "latency.svg"
    done = run_python(
        "-c", COMMAND, tiny.path("int8"), "--seconds", 1.2, "--energy", "none", "--out", out, "--picture", drawn
    )
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout and "too short to say" in done.stdout and "█" in done.stdout
    whole = json.loads(out.read_text())
    assert set(whole) == {"schema_version", "sustained", "summary"}
    assert Sustained(**{**whole["sustained"], "target": Target(**whole["sustained"]["target"])}).windows[0].count > 0
    assert ElementTree.fromstring(drawn.read_text()).tag.endswith("svg")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--energy", "coffee"), "coffee"),
        (("--energy", "none.csv"), "none.csv"),
        (("--picture", "latency.png"), ".svg"),
        (("--seconds", "nan"), "seconds is out of range"),
        (("--seed", "-1"), "seed is out of range"),
    ],
)
def test_the_command_refuses_in_a_sentence(run_python, tiny, options, word):
    done = run_python("-c", COMMAND, tiny.path("int8"), *options)
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_energy_reads_as_gross_net_and_source():
    from mobile_bench.commands.sustained import _energy

    text = _energy(run_of([1.0] * 3, energy=Energy("RAPL package-0", 10.0, 1000, 50.0, 2.0)), "auto")
    assert re.search(r"50 mJ an inference, 30 mJ above idling \(2 W\); 50 J at 5 W on average \(RAPL package-0\)", text)
    assert _energy(run_of([1.0]), "none") == "not measured"
    assert "not measured: no RAPL" in _energy(run_of([1.0]), "auto")
    assert Onset(1, 1.0, 0.1, 0.01).slower == 0.1
