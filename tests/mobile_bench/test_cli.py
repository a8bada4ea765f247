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
        (["run", "{float32}", "--width", "-1"], "received: -1%"),
        (["run", "{float32}", "--allow-fallback", "--reference", "a.tflite"], "--allow-fallback, --reference a.tflite"),
        (["compare", "{float32}", "{float32}", "--out", "/proc/none.json"], "/proc/none.json"),
        (["sustained", "{float32}", "--out", "{folder}"], "Is a directory"),
        (["sustained", "{float32}", "--picture", "/proc/none.svg"], "/proc/none.svg"),
        (["stream", "{float32}", "--source", ".", "--out", "/dev/null/x.json"], "/dev/null/x.json"),
        (["roofline", "{float32}", "--picture", "/proc/none.svg"], "/proc/none.svg"),
        (["roofline", "{float32}", "--runs", "0"], "1 to 100000"),
        (["roofline", "{float32}", "--threads", "99"], "more threads than cores"),
        (["run", "{pipe}"], "a device, pipe or socket"),
        (["compare", "{pipe}", "{float32}"], "a device, pipe or socket"),
        (["xray", "{pipe}", "--delegate", "gpu"], "not a file"),
        (["evaluate", "{float32}", "--sample", "{pipe}", "--input-spec", "scaling=signed"], "a device, pipe or socket"),
        (["compare", "{float32}", "{int8}", "--target", "pi", "--target", "desk"], "received: pi, desk"),
        (["run", "{float32}", "--input-spec", "scaling=raw,scaling=unit"], "scaling=raw and scaling=unit"),
        (["stream", "{float32}", "--source", ".", "--no-drop", "--queue", "3"], "--queue 3"),
        (["stream", "{float32}", "--source", "", "--input-spec", "scaling=unit"], "received: ''"),
        (["run", "{open_size}"], "--input-spec size="),
        (["run"], "FILE"),
        (["walk"], "walk"),
        (["evaluate", "{float32}"], "--sample"),
        (["evaluate", "{float32}", "--sample", "{sample}"], "scaling="),
        (["evaluate", "{float32}", "--sample", "{text}", "--input-spec", "scaling=signed"], "is no .npz"),
        (["evaluate", "{float32}", "--sample", "{array}", "--input-spec", "scaling=signed"], "numpy: np.savez("),
        (["evaluate", "{truncated}", "--sample", "{sample}"], "is damaged"),
        (
            ["evaluate", "{float32}", "--sample", "{gray}", "--input-spec", "scaling=signed"],
            "takes RGB images (3 channels), and the input spec describes gray images",
        ),
        (
            ["evaluate", "{text}", "--sample", "{sample}", "--input-spec", "scaling=signed"],
            "not a TensorFlow Lite file",
        ),
        (["evaluate", "{float32}", "--sample", "{sample}", "--input-spec", "scaling=signed,size=9"], "(1, 9, 9, 3)"),
        (
            ["evaluate", "{float32}", "--sample", "{sample}", "--input-spec", "scaling=signed", "--workers", "0"],
            "1 to 256",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_words(tiny, args, word, monkeypatch, capsys, tmp_path):
    np.save(tmp_path / "array.npy", tiny.images)
    np.savez(tmp_path / "gray.npz", images=tiny.images[..., :1], labels=tiny.labels)
    os.mkfifo(tmp_path / "pipe")
    made = {
        "pipe": tmp_path / "pipe",
        "sample": tiny.sample,
        "folder": tmp_path,
        "array": tmp_path / "array.npy",
        "gray": tmp_path / "gray.npz",
    }
    place = lambda name: str(made.get(name) or tiny.path(name))
    args = [place(arg[1:-1]) if arg.startswith("{") else arg for arg in args]
    monkeypatch.setattr(sys, "argv", ["mobile-bench", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and word in said.err and said.out == ""
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("args", "part", "word"),
    [
        (["compare", "a\x1b[2J.tflite", "b.tflite"], "received", "a\x1b[2J.tflite"),
        (["profile", "none.tflite", "--runs", "many"], "what", "--runs"),
    ],
)
def test_an_error_is_an_object_too_for_those_who_ask_for_one(args, part, word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mobile-bench", *args, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert ended.value.code == 2 and word in found["error"][part] and found["schema_version"]
    assert "\x1b[2J" not in said.err, "a file's name would clear the screen"


@pytest.mark.parametrize("command", ["evaluate", "compare", "profile"])
def test_a_file_that_crashes_the_runtime_exits_1_in_words(bench, tiny, command):
    options = {"evaluate": ("--sample", tiny.sample, "--input-spec", "scaling=signed"), "compare": (tiny.path("int8"),)}
    done = bench(command, tiny.path("self_calling"), *options.get(command, ()))
    assert done.returncode == 1 and "SIG" in done.stderr and "Traceback" not in done.stderr


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


def test_images_that_are_made_to_fit_are_a_warning(bench, tiny, tmp_path):
    large = np.repeat(np.repeat(tiny.images[:20], 2, axis=1), 2, axis=2)
    np.savez(tmp_path / "large.npz", images=large, labels=tiny.labels[:20])
    options = ("--input-spec", "scaling=signed,size=12")
    done = bench("evaluate", tiny.path("float32"), "--sample", tmp_path / "large.npz", *options)
    assert done.returncode == 0 and "takes images of 12x12 RGB, the sample's are 24x24 RGB" in done.stderr
    assert "warning" not in bench("evaluate", tiny.path("float32"), "--sample", tiny.sample, *options).stderr


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
def test_a_name_that_is_not_utf_8_is_a_name(bench, tiny, tmp_path):
    file = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tflite")
    Path(file).write_bytes(tiny.path("float32").read_bytes())
    done = bench("run", file, "--rounds", 1, "--seconds", 0)
    assert done.returncode == 0 and "caf\\udce9.tflite" in done.stdout, done.stderr
    sample = ("--sample", tiny.sample, "--input-spec", "scaling=signed")
    done = bench("evaluate", file, *sample, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["images"] == 300, done.stderr
    done = bench("sustained", file, "--seconds", 1, "--out", tmp_path / "out.json", "--energy", "none", "--json")
    assert done.returncode == 0 and json.loads((tmp_path / "out.json").read_bytes()), done.stderr


def test_brackets_in_a_files_name_are_no_markup(bench, tiny, tmp_path):
    file = tmp_path / "x[" / "b].tflite"
    file.parent.mkdir()
    file.write_bytes(tiny.path("float32").read_bytes())
    short = ("--rounds", 1, "--seconds", 0)
    sample = ("--sample", tiny.sample, "--input-spec", "scaling=signed")
    for arguments, codes in (
        (("run", file, *short), {0}),
        (("evaluate", file, *sample), {0}),
        (("sweep", file, "--threads", 1, "--batch", 1, "--runs", 5), {0}),
        (("compare", file, file, "--seconds", 1, "--rounds", 6), {0}),
        (("gate", file, "--against", file, "--seconds", 1), {0, 3}),
    ):
        done = bench(*arguments)
        assert done.returncode in codes and "Traceback" not in done.stderr, done.stderr
        assert "x[/b].tflite" in "".join(done.stdout.split()), arguments[0]


def test_one_process_claims_no_interval(bench, tiny):
    assert "95% interval" not in bench("run", tiny.path("float32"), "--rounds", 1, "--seconds", 0).stdout


def test_what_is_read_is_not_overwritten(bench, tiny, tmp_path):
    file = tmp_path / "model.tflite"
    file.write_bytes(content := tiny.path("float32").read_bytes())
    for arguments in (("compare", file, tiny.path("int8")), ("sustained", file, "--seconds", 1)):
        done = bench(*arguments, "--out", file)
        assert done.returncode == 2 and "would overwrite what is read" in done.stderr and file.read_bytes() == content


def test_a_target_named_twice_is_measured_once(bench, tiny):
    done = bench("run", tiny.path("float32"), "--target", "local", "--target", "local", "--rounds", 1, "--seconds", 0)
    assert done.returncode == 0 and "local was asked for more than once" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's redirections")
def test_an_output_that_nobody_gets_is_no_success(tiny, tmp_path):
    command = f"{sys.executable} -m mobile_bench evaluate {tiny.path('float32')} --sample {tiny.sample} --json"
    shell = lambda text: subprocess.run(["bash", "-c", text], cwd=ROOT, capture_output=True, text=True)
    closed = shell(f"{command} --input-spec scaling=signed >&-")
    assert closed.returncode == 2 and "Standard output is closed" in closed.stderr
    cut = shell(f"{command} --input-spec scaling=signed | true; exit ${{PIPESTATUS[0]}}")
    assert cut.returncode == 1 and "Traceback" not in cut.stderr and "Broken" not in cut.stderr
    if Path("/dev/full").exists():
        full = shell(f"{command} --input-spec scaling=signed >/dev/full")
        assert full.returncode == 2 and "No space left" in full.stderr and "Traceback" not in full.stderr


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


@pytest.mark.skipif(sys.platform == "win32", reason="needs its signals")
def test_an_interrupt_inside_a_destructor_is_not_lost():
    code = """if True:
        import os, signal, time, typer
        from mobile_bench.cli_support import run_app
        class Last:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
        app = typer.Typer()
        @app.command()
        def main():
            last = Last()
            del last
            time.sleep(60)
            print("went on")
        run_app(app)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs its signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_an_end_by_signal_keeps_what_was_measured_and_leaves_no_folder(tiny, tmp_path, name):
    command = [sys.executable, "-m", "mobile_bench", "run", str(tiny.path("float32"))]
    options = ["--json", "--seconds", "600", "--width", "0.00001", "--rounds", "50"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "work")}
    (tmp_path / "work").mkdir()
    child = subprocess.Popen(
        [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while "process 1: median" not in (line := child.stderr.readline()):
        assert line, "it ended by itself"
    child.send_signal(getattr(signal, name))
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and "Traceback" not in err, err
    found = json.loads(out)
    assert found["interrupted"] is True and found["summary"]["samples"] > 0
    assert any("interrupted after" in warning for warning in found["measurement"]["warnings"])
    assert list((tmp_path / "work").iterdir()) == []
