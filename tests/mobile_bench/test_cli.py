"""`mobile-bench` as a person or a script meets it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mobile_bench import store
from mobile_bench.cli import main
from mobile_bench.files import sha256_of
from mobile_bench.inputs import InputSpec
from mobile_bench.records import Measurement, Variant, from_dict

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bench(run_python):
    return lambda *args, **options: run_python("-m", "mobile_bench", *args, **options)


@pytest.fixture
def variant(tiny, tmp_path):
    """A study variant's folder around a real file."""
    folder = tmp_path / "study" / "net" / "baseline-int8"
    folder.mkdir(parents=True)
    (folder / "model.tflite").write_bytes(tiny.path("int8").read_bytes())
    sha256 = sha256_of(folder / "model.tflite")
    store.write_variant(
        folder, Variant("baseline-int8", "net", "baseline", "int8", sha256=sha256, spec=InputSpec(12, 12, 3))
    )
    return folder


def assert_clear_error(done, *words, code=2):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_run_shows_what_a_person_asks_for(bench, tiny):
    done = bench("run", tiny.path("int8"), "--deadline-fps", 60)
    assert done.returncode == 0, done.stderr
    for word in ("Median", "95% interval", "p90", "p99", "Load", "First inference", "Peak memory", "Frames per second"):
        assert word in done.stdout
    assert "Meets 60 fps" in done.stdout and "deadline 16.67 ms" in done.stdout and "yes" in done.stdout
    assert "XNNPACK" not in done.stdout + done.stderr
    assert "NO" in bench("run", tiny.path("int8"), "--deadline-fps", 1e9).stdout


def test_run_json_is_one_object_with_the_raw_samples(bench, tiny):
    done = bench("run", tiny.path("float32"), "--json", "--threads", 2, "--batch", 2)
    found = json.loads(done.stdout)
    assert set(found) == {"schema_version", "measurement", "summary"} and found["schema_version"] == 1
    measurement = from_dict(Measurement, found["measurement"])
    assert measurement.status == "ok" and measurement.target.threads == 2 and measurement.batch == 2
    assert len(measurement.latency_ms) == found["summary"]["samples"] >= 50
    assert found["summary"]["median_ms"] == pytest.approx(np.median(measurement.latency_ms))
    assert found["summary"]["fps"] == pytest.approx(2000 / found["summary"]["median_ms"])


def test_a_variants_measurement_is_stored_with_it(bench, variant):
    assert bench("run", variant / "model.tflite").returncode == 0
    assert bench("run", variant / "model.tflite", "--no-save").returncode == 0
    entry = store.read_entry(variant)
    assert len(entry.measurements) == 1 and entry.measurements[0].sha256 == entry.variant.sha256


def test_another_file_than_the_record_speaks_of_is_not_stored(bench, variant, tiny):
    (variant / "model.tflite").write_bytes(tiny.path("float32").read_bytes())
    done = bench("run", variant / "model.tflite")
    assert done.returncode == 0 and "not stored" in done.stderr
    assert store.read_entry(variant).measurements == ()
    assert_clear_error(bench("run", variant / "model.tflite", "--save"), "another file")


def test_save_needs_a_variant(bench, tiny):
    assert_clear_error(bench("run", tiny.path("float32"), "--save"), "variant.json")


def test_a_refused_file_exits_2_with_its_record(bench, tiny):
    done = bench("run", tiny.path("custom_op"), "--json")
    assert_clear_error(done, "made-up-op")
    found = json.loads(done.stdout)
    assert found["measurement"]["status"] == "refused" and found["summary"] is None


def test_a_crash_of_the_runtime_exits_1_with_its_record(bench, tiny):
    done = bench("run", tiny.path("self_calling"), "--json")
    assert_clear_error(done, "SIG", code=1)
    assert json.loads(done.stdout)["measurement"]["status"] == "failed"


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["run", "none.tflite"], "none.tflite"),
        (["run", "{truncated}"], "truncated"),
        (["run", "{text}"], "not a TensorFlow Lite file"),
        (["run", "{empty}"], "empty"),
        (["run", "{float32}", "--nonsense"], "--nonsense"),
        (["run", "{float32}", "--threads", "0"], "1 to 256"),
        (["run", "{float32}", "--threads", "two"], "--threads"),
        (["run", "{float32}", "--runs", "-1"], "1 to"),
        (["run", "{float32}", "--deadline-fps", "0"], "positive"),
        (["run", "{float32}", "--target", "adb:A1"], "benchmark_model"),
        (["run", "{float32}", "--target", "ssh://-o@board"], "address"),
        (["run", "{float32}", "--runtime", "tflite-runtme"], "tflite-runtime"),
        (["run", "{open_size}"], "--input-spec size="),
        (["run"], "FILE"),
        (["walk"], "walk"),
        (["evaluate", "{float32}"], "--sample"),
        (["evaluate", "{float32}", "--sample", "{sample}"], "scaling="),
        (["evaluate", "{float32}", "--sample", "{text}", "--input-spec", "scaling=signed"], "sample"),
        (
            ["evaluate", "{text}", "--sample", "{sample}", "--input-spec", "scaling=signed"],
            "not a TensorFlow Lite file",
        ),
        (["evaluate", "{float32}", "--sample", "{sample}", "--input-spec", "scaling=signed,size=9"], "(1, 9, 9, 3)"),
        (
            ["evaluate", "{float32}", "--sample", "{sample}", "--input-spec", "scaling=signed", "--workers", "0"],
            "1 to 256",
        ),
        (["evaluate", "{self_calling}", "--sample", "{sample}", "--input-spec", "scaling=signed"], "SIG"),
    ],
)
def test_what_cannot_be_used_is_said_in_words(tiny, args, word, monkeypatch, capsys):
    place = lambda name: str(tiny.sample if name == "sample" else tiny.path(name))
    args = [place(arg[1:-1]) if arg.startswith("{") else arg for arg in args]
    monkeypatch.setattr(sys, "argv", ["mobile-bench", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and word in said.err and said.out == ""
    assert "Traceback" not in said.err


def test_an_open_size_can_be_said(bench, tiny):
    done = bench("run", tiny.path("open_size"), "--input-spec", "size=16", "--json")
    assert json.loads(done.stdout)["measurement"]["input_shape"] == [1, 16, 16, 3]


def test_evaluate_counts_what_the_file_gets_right(bench, tiny):
    done = bench("evaluate", tiny.path("float32"), "--sample", tiny.sample, "--input-spec", "scaling=signed", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = tiny.keras["softmax"].argmax(axis=1)
    correct = int((expected == tiny.labels).sum())
    assert (found["images"], found["correct"], found["top1"]) == (300, correct, correct / 300)
    assert found["predictions"] == expected.tolist()
    assert found["top1_low"] < found["top1"] < found["top1_high"] and found["schema_version"] == 1
    shown = bench("evaluate", tiny.path("float32"), "--sample", tiny.sample, "--input-spec", "scaling=signed").stdout
    assert f"{correct / 300:.2%}" in shown and f"{correct} of 300" in shown


def test_a_variants_own_spec_is_used(bench, variant, tiny):
    done = bench("evaluate", variant / "model.tflite", "--sample", tiny.sample, "--json")
    assert done.returncode == 0, done.stderr


def test_help_teaches(bench):
    for args, words in (
        (["--help"], ["mobile-bench run model.tflite", "evaluate"]),
        (["run", "--help"], ["--threads", "--json", "jq", "Exit code"]),
        (["evaluate", "-h"], ["--sample", "scaling=signed,head=logits"]),
    ):
        done = bench(*args)
        assert done.returncode == 0
        for word in words:
            assert word in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_an_interrupt_exits_130_in_one_line(tiny):
    command = [
        sys.executable,
        "-m",
        "mobile_bench",
        "run",
        str(tiny.path("float32")),
        "--runs",
        "100000",
        "--batch",
        "4096",
    ]
    # A test run in the background of a shell inherits an ignored SIGINT, and a child would keep ignoring it.
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=listen,
    )
    assert "loading" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and out == "" and "interrupted" in err and "Traceback" not in err
