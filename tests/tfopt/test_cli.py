"""The command line as a person or a script meets it, in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest


def tfopt(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "tfopt.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "COLUMNS": "200"}, timeout=500,
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(trained_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    done = tfopt("study", "-m", trained_file, "--data", "digits", "-r", "baseline", "--out", folder / "s", "--json")
    assert done.returncode == 0, done.stderr
    return folder / "s", json.loads(done.stdout), done.stderr


def test_study_prints_one_object_and_progress_elsewhere(study):
    folder, printed, stderr = study
    assert printed["schema_version"] == 1 and printed["study"] == str(folder)
    assert [row["variant"] for row in printed["variants"]] == [
        "baseline-float32", "baseline-float16", "baseline-dynamic", "baseline-int8",
    ]  # fmt: skip
    for row in printed["variants"]:
        assert 0 < row["top1_95"][0] < row["top1"] < row["top1_95"][1] <= 1
        assert row["median_ms"] > 0 and row["fps"] == pytest.approx(1000 / row["median_ms"])
        assert isinstance(row["meets_deadline"], bool)
    assert "baseline-int8" in stderr
    assert "oneDNN" not in stderr, "native chatter reaches the user"


def test_evaluate_reproduces_the_shown_accuracy(study):
    _, printed, _ = study
    row = printed["variants"][-1]
    done = tfopt("evaluate", row["path"], "--data", "digits", "--json")
    found = json.loads(done.stdout)
    assert found["top1"] == row["top1"] and found["agreement"] == row["agreement"] and found["images"] == row["images"]
    other = json.loads(tfopt("evaluate", row["path"], "--data", "digits:validation", "--json").stdout)
    assert other["split"] == "validation" and other["images"] != found["images"]


def test_second_run_imports_no_tensorflow(study, trained_file):
    folder, printed, _ = study
    code = (
        "import sys; from tfopt import cli; sys.argv = ['tfopt', 'study', '-m', sys.argv[1], '--data', 'digits', '-r', "
        "'baseline', '--out', sys.argv[2], '--json']\n"
        "try:\n    cli.main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'tensorflow' not in sys.modules, 'a finished study needs no TensorFlow'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, trained_file, folder], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["variants"] == printed["variants"]


def test_what_failed_before_does_not_fail_this_run(study, trained_file):
    from mobile_bench import store
    from mobile_bench.records import Variant

    folder, _, _ = study
    old = store.variant_folder(folder, trained_file.stem, "old-int8")
    store.write_variant(old, Variant(
        name="old-int8", model=trained_file.stem, recipe="old", scheme="int8", status="failed", reason="It broke",
        created_at="2026-01-01T00:00:00Z", tools={},
    ))  # fmt: skip
    try:
        done = tfopt("study", "-m", trained_file, "--data", "digits", "-r", "baseline", "--out", folder)
    finally:
        shutil.rmtree(old)
    assert done.returncode == 0, done.stderr
    assert "old-int8" in done.stdout and "It broke" not in done.stdout


def test_an_interrupted_study_says_what_it_keeps(trained_file, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-m", "tfopt.cli", "study", "-m", trained_file, "--data", "digits", "-r", "baseline",
         "--out", tmp_path / "s"], stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    heard = []
    for line in child.stderr:
        heard.append(line)
        if "loading" in line and not any("loading" in other for other in heard[:-1]):
            child.send_signal(signal.SIGTERM)  # once: while Python ends, a second one would kill
    assert child.wait(120) == 130
    assert "keeps what is finished" in " ".join("".join(heard).split())


def test_report_is_one_html_file(study):
    folder, _, _ = study
    done = tfopt("report", folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "report.html").read_text()
    assert json.loads(tfopt("report", folder, "--json").stdout)["size_bytes"] == (folder / "report.html").stat().st_size
    assert "baseline-int8" in page and page.lstrip().lower().startswith("<!doctype html")


def test_convert_writes_a_file_that_evaluate_can_read(trained_file, tmp_path):
    out = tmp_path / "own.tflite"
    done = tfopt("convert", trained_file, "--scheme", "dynamic", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    expected = {"schema_version": 1, "path": str(out), "scheme": "dynamic", "size_bytes": out.stat().st_size}
    assert expected.items() <= printed.items() and len(printed["files"]) == 1
    assert "does not say how its images are scaled" not in done.stderr
    found = json.loads(tfopt("evaluate", out, "--data", "digits", "--reference", trained_file, "--json").stdout)
    assert found["top1"] > 0.8 and found["agreement"] > 0.95


def test_train_writes_model_and_card(tmp_path):
    out = tmp_path / "m"
    done = tfopt(
        "train", "resnet8", "--data", "digits", "--width", 0.25, "--train", "epochs=1,batch_size=32", "--out", out
    )
    assert done.returncode == 0, done.stderr
    card = json.loads((out / "card.json").read_text())
    low, high = card["test_top1_95"]
    assert low <= card["test_top1"] <= high and card["test_images"] == 360
    assert card["data"]["name"] == "digits" and card["seed"] == 0 and card["command"].startswith("tfopt train resnet8")
    assert card["keras_bytes"] == (out / "model.keras").stat().st_size
    assert card["training"]["epochs"] == 1


def test_train_does_not_replace_a_model_unasked(trained_file, tmp_path):
    there = tmp_path / "model.keras"
    there.write_bytes(trained_file.read_bytes())
    done = tfopt("train", "resnet8", "--data", "digits", "--train", "steps=1", "--out", tmp_path)
    assert done.returncode == 2 and "--force" in done.stderr
    assert there.read_bytes() == trained_file.read_bytes()


def test_a_bad_reference_is_an_error_like_any_bad_model(study, tmp_path):
    _, printed, _ = study
    (tmp_path / "text.keras").write_text("not a model")
    for name, message in (("text.keras", "damaged"), ("nope.keras", "does not exist")):
        done = tfopt("evaluate", printed["variants"][0]["path"], "--data", "digits", "--reference", tmp_path / name)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_help_teaches_every_command():
    commands = ("train", "optimize", "study", "demo", "convert", "evaluate", "report", "recipes", "sensitivity")
    printed = tfopt("--help").stdout
    assert all(command in printed for command in commands)
    assert "distill_prune_qat" in tfopt("recipes").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "missing.tflite", "--data", "digits"], "does not exist"),
        (["evaluate", "text.tflite", "--data", "digits", "--input-spec", "scaling=unit,size=8"], "text.tflite"),
        (["evaluate", "text.keras", "--data", "digits"], "damaged, cut short or not a Keras 3 file"),
        (["evaluate", "text.keras", "--data", "digitz"], "Did you mean digits"),
        (["evaluate", "text.keras", "--data", "digits:tset"], "Did you mean test"),
        (["sensitivity", "text.keras", "--data", "digits", "--picture", "layers.png"], "a name that ends in .svg"),
        (["convert", "text.keras", "--scheme", "int4"], "There is no scheme of that name"),
        (["convert", "text.keras", "--scheme", "int8"], "needs images to calibrate on"),
        (["convert", "text.keras", "--scheme", "float32", "--calibration-ranges", "mse"], "mse, with float32"),
        (["convert", "keras:ResNet5", "--scheme", "float32"], "Did you mean ResNet50"),
        (["study", "-m", "text.keras", "--data", "digits", "-r", "prun", "--out", "o"], "Did you mean prune"),
        (["study", "-m", "text.keras", "--data", "digits", "--train", "stepz=3", "--out", "o"], "Did you mean steps"),
        (
            ["study", "-m", "text.keras", "--data", "digits", "--train", "prun.steps=3", "--out", "o"],
            "Did you mean prune",
        ),
        (["study", "-m", "text.keras", "--data", "empty", "--out", "o"], "no class folders"),
        (["optimize", "text.keras", "--data", "digits", "--train", "steps=0"], "out of range"),
        (["optimize", "text.keras", "--data", "digits", "--train", "prune.sparsity=0.5"], "'- prune: {sparsity: 0.5}'"),
        (["optimize", "text.keras", "--data", "nowhere"], "no data set, folder or .npz file of that name"),
        (["optimize", "text.keras", "--data", "digits", "--seed", "-1"], "The seed is out of range"),
        (["optimize", "text.keras", "--data", "digits", "--train-images", "-5"], "train images is out of range"),
        (["evaluate", "text.keras", "--data", "digits", "--test-images", "0"], "test images is out of range"),
        (["train", "resnet8", "--data", "digits", "--out", "text.keras/x"], "text.keras is a file"),
        (["train", "resnet9", "--data", "digits", "--out", "o"], "Did you mean resnet8"),
        (["train", "resnet8", "--data", "digits", "--out", "o", "--train", "learning_rate=fast"], "learning_rate"),
        (["report", "empty"], "not a study"),
        (["demo", "--data", "nowhere"], "nowhere"),
        (["study", "-m", "x.keras"], "Missing option"),
    ],
)
def test_bad_input_is_one_error_and_exit_code_2(arguments, message, tmp_path):
    (tmp_path / "text.tflite").write_text("not a model")
    (tmp_path / "text.keras").write_text("not a model")
    (tmp_path / "empty").mkdir()
    done = tfopt(*arguments, cwd=tmp_path)
    plain = " ".join(done.stderr.split())
    assert done.returncode == 2, done.stderr
    assert message in plain
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").rglob("*.tflite"))


def test_advice_of_tensorflow_does_not_reach_the_terminal(run_python):
    code = (
        "{}import tensorflow as tf\n"
        "number = tf.function(lambda x: x)\n"
        "for n in range(12): number(n)\n"
    )  # fmt: skip
    loud = run_python("-c", code.format(""))
    quiet = run_python("-c", code.format("from tfopt.quiet import native_chatter_to_log as q; q()\n"))
    assert loud.returncode == quiet.returncode == 0
    assert "retracing" in loud.stderr and not quiet.stderr
