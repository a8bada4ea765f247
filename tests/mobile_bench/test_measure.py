"""One measurement, by a real worker process on real files."""

import sys
import threading
import time

import numpy as np
import pytest

from mobile_bench import lock, worker
from mobile_bench.errors import InputError, JobFailed, ModelRefused
from mobile_bench.files import sha256_of
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import open_model
from mobile_bench.measure import measure
from mobile_bench.records import Delegate, Target
from mobile_bench.stats import summarize

SPEC = InputSpec(12, 12, 3)


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    """Tests wait only for themselves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_measurement_says_all_that_was_learned(tiny):
    stages = []
    found = measure(tiny.path("int8"), Target(threads=2), spec=SPEC, on_progress=stages.append, seconds=0)
    assert (found.status, found.kind, found.target) == ("ok", "latency", Target(threads=2))
    assert found.sha256 == sha256_of(tiny.path("int8"))
    assert found.input_shape == (1, 12, 12, 3) and found.batch == 1
    assert 50 <= len(found.latency_ms) <= 1000
    assert len(found.warmup_ms) >= 10 and min(found.latency_ms) > 0
    assert found.load_ms > 0 and found.first_inference_ms > 0
    assert found.peak_rss_bytes >= found.base_rss_bytes > 1 << 20
    assert found.device["runtime"] == "ai-edge-litert" and found.device["runtime_version"][0].isdigit()
    assert found.device["cores"] >= 1 and found.device["python"].startswith("3.")
    assert found.started_at.endswith("+00:00") and found.energy_source == "not measured"
    assert [s["stage"] for s in stages if "stage" in s] == ["load", "warm-up", "timing", "round", "round", "round"]
    summary = summarize(found)
    assert summary.rounds == len(found.rounds) == 3 and sum(found.rounds) == summary.samples
    assert summary.median_low_ms < summary.median_ms < summary.median_high_ms


def test_at_least_as_many_runs_as_asked_and_a_batch(tiny):
    found = measure(tiny.path("float32"), batch=4, runs=1000, max_runs=60, seconds=0)
    assert found.rounds == (334, 334, 334) and found.input_shape == (4, 12, 12, 3)


def test_each_measurement_is_another_run(tiny):
    first, second = (measure(tiny.path("float32"), max_runs=50, seconds=0) for _ in range(2))
    assert first.run_id != second.run_id and first.sha256 == second.sha256


@pytest.mark.parametrize(
    ("name", "word"), [("truncated", "truncated"), ("text", "not a TensorFlow"), ("custom_op", "made-up-op")]
)
def test_a_refused_file_is_a_record_with_its_reason(tiny, name, word):
    found = measure(tiny.path(name))
    assert found.status == "refused" and word in found.reason and found.latency_ms == ()


def test_a_crash_is_a_record_with_its_reason(tiny):
    found = measure(tiny.path("self_calling"))
    assert found.status == "failed" and "SIG" in found.reason and "Traceback" not in found.reason


def test_a_worker_that_takes_too_long_is_ended_and_recorded(tiny):
    found = measure(tiny.path("float32"), runs=100_000, timeout_s=0.01)
    assert found.status == "failed" and "0.01 s" in found.reason


def test_what_makes_no_sense_to_try_is_an_error(tiny, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        measure(tmp_path / "none.tflite")
    for target, word in (
        (Target(accelerator="nnapi"), "accelerator"),
        (Target(runtime="x"), "auto"),
    ):
        with pytest.raises(InputError, match=word):
            measure(tiny.path("float32"), target)
    for options in ({"runs": 0}, {"batch": 0}, {"max_runs": -1}, {"rounds": 0}, {"seconds": -1}, {"width": 0}):
        with pytest.raises(InputError, match="out of range"):
            measure(tiny.path("float32"), **options)


class Scripted:
    """A target whose rounds have these medians; an exception is raised in its turn."""

    place = "scripted"

    def __init__(self, *medians_ms):
        self.left, self.jobs = list(medians_ms), []

    __enter__, __exit__ = lambda self: self, lambda self, *_: None

    def run(self, module, job, **_):
        self.jobs.append(job)
        median_ms = self.left.pop(0)
        if isinstance(median_ms, Exception):
            raise median_ms
        return {
            "load_ms": 10 * median_ms, "first_inference_ms": None, "warmup_ms": [9.0],
            "latency_ms": [median_ms] * 5, "peak_rss_bytes": int(1000 * median_ms), "base_rss_bytes": None,
            "device": {"cpu": "C", "runtime": "r", "runtime_version": "1", "during": {"seconds": median_ms}},
            "load_average": None, "warnings": ["5 of it"],
        }  # fmt: skip


@pytest.fixture
def scripted(monkeypatch, tiny):
    def run(*medians_ms, **options):
        target = Scripted(*medians_ms)
        monkeypatch.setattr(sys.modules["mobile_bench.measure"], "transport_for", lambda *_: target)
        return measure(tiny.path("float32"), **options), target

    return run


def test_rounds_go_on_until_the_interval_is_narrow(scripted):
    """The second series' interval is 1.04% wide over 5 rounds and 0.79% over 6."""
    found, _ = scripted(1.0, 1.0001, 1.0002, 1.5, 1.5)
    assert found.rounds == (5, 5, 5)
    found, target = scripted(1.0, 1.01, 1.0, 1.005, 1.005, 1.005, 1.005, 9.0, width=0.01, seconds=60)
    assert len(found.rounds) == 6 and target.left == [1.005, 9.0]
    assert found.load_ms == pytest.approx(10.05) and found.first_inference_ms is None and found.peak_rss_bytes == 1010
    assert len(found.warmup_ms) == 6 and found.warnings == ("5 of it (in 6 of 6 processes)",)
    assert [during["seconds"] for during in found.device["during"]][:2] == [1.0, 1.01]


def test_without_seconds_there_are_just_the_rounds(scripted):
    found, _ = scripted(*[1.0, 2.0] * 9, rounds=4, seconds=0)
    assert len(found.rounds) == 4
    found, target = scripted(1.0, rounds=1, seconds=0, runs=50)
    assert found.rounds == () and len(found.latency_ms) == 5 and target.jobs[0]["runs"] == 50


def test_what_earlier_rounds_measured_is_kept(scripted):
    found, _ = scripted(1.0, 2.0, JobFailed("The process crashed"))
    assert found.status == "failed" and found.rounds == (5, 5) and "crashed" in found.reason
    assert summarize(found) is None


def test_an_accelerators_job_says_how_to_reach_it(scripted, tiny):
    delegate = Delegate("lib.so", {"a": "b"}, True)
    found, target = scripted(1.0, 1.0, 1.0, target=Target(accelerator="external"), delegate=delegate)
    assert found.status == "ok"
    wanted = {"accelerator": "external", "delegate": "lib.so", "delegate_options": {"a": "b"}, "allow_fallback": True}
    assert wanted.items() <= target.jobs[0].items()
    with pytest.raises(InputError, match=r"--delegate lib\.so, --allow-fallback, --delegate-option a=b"):
        measure(tiny.path("float32"), delegate=delegate)


def test_a_delegate_that_is_not_there_is_a_record(tiny):
    found = measure(tiny.path("float32"), Target(accelerator="external"), delegate=Delegate("/none/such.so"))
    assert found.status == "refused" and "/none/such.so" in found.reason
    found = measure(tiny.path("float32"), Target(accelerator="edgetpu"))
    assert found.status == "refused" and "libedgetpu" in found.reason


def test_peak_memory_is_the_workers_own(tiny):
    """Linux hands ru_maxrss down through fork and exec: a large parent must not show."""
    ballast = np.ones(400 << 20, np.uint8)
    found = measure(tiny.path("float32"), max_runs=50)
    assert ballast[-1] and found.peak_rss_bytes < 300 << 20


def test_the_worker_needs_no_tensorflow(tiny, run_python):
    code = (
        "import sys; from mobile_bench import worker\n"
        "job = dict(tflite=sys.argv[1], threads=1, runtime='auto', batch=1, runs=50, max_runs=50, seed=0, spec=None)\n"
        "worker.measure_latency(job, lambda *a, **k: None)\n"
        "print(sorted({m.split('.')[0] for m in sys.modules}))"
    )
    loaded = run_python("-c", code, tiny.path("float32")).stdout
    assert "numpy" in loaded and "ai_edge_litert" in loaded
    for heavy in ("tensorflow", "keras", "tf_keras", "pandas", "streamlit", "typer", "rich", "PIL"):
        assert f"'{heavy}'" not in loaded


def test_the_other_runtime_stands_behind_the_same_face(tiny):
    pytest.importorskip("tflite_runtime", reason="tflite-runtime is not installed here")
    found = measure(tiny.path("float32"), Target(runtime="tflite-runtime"), max_runs=50)
    assert found.status == "ok", found.reason
    assert found.device["runtime"] == "tflite-runtime"


def test_the_same_seed_gives_the_same_input(tiny):
    model = open_model(tiny.path("int8"))
    first, again, other = (worker.random_inputs(model, SPEC, seed)[0] for seed in (1, 1, 2))
    assert first.dtype == np.int8 and (first == again).all() and (first != other).any()
    assert np.ptp(worker.random_inputs(model, None, 0)[0].astype(int)) > 200, "values from all over the range"


def test_a_float_input_is_scaled_as_the_spec_says(tiny):
    model = open_model(tiny.path("float32"))
    (pixels,) = worker.random_inputs(model, SPEC.with_scaling("raw"), 0)
    assert pixels.max() > 200 and (pixels == np.rint(pixels)).all()
    (unknown,) = worker.random_inputs(model, None, 0)
    assert -1 <= unknown.min() < -0.5 and 0.5 < unknown.max() <= 1


def test_the_clock_stands_around_the_bare_invoke_only(monkeypatch):
    """A scripted clock: each run takes its own number of nanoseconds, in order."""
    now = [0]

    class Fake:
        calls = 0

        def bare_invoke(self):
            self.calls += 1
            now[0] += 1_000_000 * self.calls

    def clock():
        return now[0]

    monkeypatch.setattr(worker.time, "perf_counter_ns", clock)
    assert worker.time_runs(Fake(), 4) == [1.0, 2.0, 3.0, 4.0]


def test_warm_up_goes_on_until_the_times_are_steady(monkeypatch):
    now = [0]

    class Fake:
        calls = 0

        def run(self):
            self.calls += 1
            now[0] += int(1e6 * max(10, 100 - 4 * self.calls))  # settles at 10 ms

    monkeypatch.setattr(worker.time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0] / 1e9)
    times_ms, steady = worker.warm_up(Fake())
    assert steady and times_ms[0] == 96 and times_ms[-1] == 10 and worker.is_steady(times_ms)
    assert not worker.is_steady(times_ms[:12])


def test_warm_up_gives_up_on_times_that_never_settle(monkeypatch):
    now = [0]

    class Fake:
        calls = 0

        def run(self):
            self.calls += 1
            now[0] += int(1e6 * (10 if (self.calls // 5) % 2 else 20))

    monkeypatch.setattr(worker.time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0] / 1e9)
    monkeypatch.setattr(worker, "is_steady", lambda times_ms, window=5: False)
    times_ms, steady = worker.warm_up(Fake())
    assert not steady and 3000 <= sum(times_ms) < 3100


@pytest.mark.parametrize(("times_s", "steady"), [((4,), True), ((2, 2), True), ((2, 1), False)])
def test_a_slow_model_is_judged_by_the_few_runs_there_are(monkeypatch, times_s, steady):
    now, left = [0], list(times_s)

    class Fake:
        def run(self):
            now[0] += int(1e9 * left.pop(0))

    monkeypatch.setattr(worker.time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0] / 1e9)
    assert worker.warm_up(Fake()) == ([1000 * t for t in times_s], steady)


def test_planned_runs_fill_a_second_within_limits():
    assert worker.planned_runs(typical_ms=5.0, runs=50, max_runs=1000) == 200
    assert worker.planned_runs(typical_ms=0.05, runs=50, max_runs=1000) == 1000
    assert worker.planned_runs(typical_ms=400.0, runs=50, max_runs=1000) == 50
    assert worker.planned_runs(typical_ms=0.05, runs=5000, max_runs=1000) == 5000
    assert worker.planned_runs(typical_ms=5.0, runs=17, max_runs=333, timed_s=1 / 3) == 66


def test_an_input_that_cannot_be_made_up_is_refused(tiny):
    model = open_model(tiny.path("float32"))
    model.inputs = (type(model.inputs[0])("text", (1,), "str"),)
    with pytest.raises(ModelRefused, match="made up"):
        worker.random_inputs(model, None, 0)


def test_one_measurement_at_a_time(tiny):
    """A measurement started while another holds the machine says so, waits, and then runs."""
    said, done = [], []
    with lock.one_at_a_time("local", wait_s=0):
        thread = threading.Thread(
            target=lambda: done.append(measure(tiny.path("float32"), max_runs=50, on_progress=said.append))
        )
        thread.start()
        deadline = time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
        assert "Waiting for the measurement on local" in said[0]["text"] and not done
        assert not any("stage" in message for message in said), "the worker must not have started"
    thread.join(60)
    assert done[0].status == "ok"


def test_waiting_has_an_end(tiny):
    with lock.one_at_a_time("local", wait_s=0), pytest.raises(InputError, match="Another measurement"):
        measure(tiny.path("float32"), wait_s=0)


def test_other_places_are_not_locked():
    with lock.one_at_a_time("local", wait_s=0), lock.one_at_a_time("ssh-pi@board", wait_s=0):
        assert lock.lock_path("local") != lock.lock_path("ssh-pi@board")
    assert "/" not in lock.lock_path("a/../b").name


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_process_leaves_no_lock(run_python):
    code = (
        "import os, signal; from mobile_bench.lock import one_at_a_time\n"
        "with one_at_a_time('local', wait_s=0): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run_python("-c", code).returncode == -9
    with lock.one_at_a_time("local", wait_s=0):
        pass
