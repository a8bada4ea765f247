"""The straight line, from a model and data to a study folder, on digits."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import keras
import pytest

import tfopt
from mobile_bench import interrupts, store
from mobile_bench.errors import Problem
from mobile_bench.records import Target
from tfopt import commands, models, plan, schemes, steps

RECIPE = """
name: small
steps:
  - factorize: {rank_ratio: 0.5, exclude: [stem, classes], train: {steps: 60, batch_size: 32, learning_rate: 3.0e-3}}
schemes: [float32, int8]
"""


@pytest.fixture(scope="module")
def made(trained_file, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE)
    events = []
    result = tfopt.run_study([trained_file], digits, ["baseline", recipe], out=folder / "out", on_event=events.append)
    return result, events, recipe


def test_every_promised_variant_is_there_and_whole(made):
    result, _, _ = made
    assert not result.missing and not result.problems
    names = [f"{e.variant.model}/{e.variant.name}" for e in result.entries]
    assert names == list(result.record.expected)
    assert len(names) == 6
    for entry in result.entries:
        assert entry.variant.status == "ok", entry.variant.reason
        content = entry.tflite.read_bytes()
        assert entry.variant.size_bytes == len(content)
        assert entry.quality().images == 360 and 0.8 < entry.quality().top1 <= 1
        assert entry.quality().agreement > 0.9
        (measurement,) = entry.measurements
        assert measurement.status == "ok" and len(measurement.latency_ms) >= 50
        assert (entry.folder / "model.keras").is_file()


def test_the_record_says_how_a_variant_came_to_be(made):
    result, _, _ = made
    entry = next(e for e in result.entries if e.variant.name == "small-int8")
    (step,) = entry.variant.steps
    assert step.technique == "factorize" and step.training["steps"] == 60 and step.training["images_seen"] == 1920
    assert entry.variant.macs == step.macs_after < step.macs_before
    assert entry.variant.inputs[0].dtype == "int8" and entry.variant.inputs[0].scale > 0
    assert entry.variant.properties == {"low rank": True, "float_tensors": []}
    facts = result.record.models[entry.variant.model]
    assert facts["spec_from"] == "the model file" and facts["validation_top1"] > 0.8


def test_baseline_float32_agrees_fully_with_its_model(made):
    result, _, _ = made
    quality = result.entries[0].quality()
    assert result.entries[0].variant.name == "baseline-float32"
    assert quality.agreement == quality.baseline_agreement == 1.0
    assert quality.keras_top1 == quality.top1


def test_shown_accuracy_is_reproduced_to_the_digit(made, digits, monkeypatch):
    result, _, _ = made
    for entry in result.entries:
        again = commands.evaluate_one(entry.tflite, "digits", None, None, None, False)
        assert again["top1"] == entry.quality().top1
        assert again["agreement"] == entry.quality().agreement
        assert again["fingerprint"] == entry.quality().fingerprint


def test_a_second_run_makes_nothing_anew(made, trained_file, digits):
    result, _, recipe = made
    stamps = {p: p.stat().st_mtime_ns for p in result.folder.rglob("*") if p.is_file() and p.name != "study.json"}
    events = []
    again = tfopt.run_study([trained_file], digits, ["baseline", recipe], out=result.folder, on_event=events.append)
    assert {e.kind for e in events} == {"plan", "variant"}
    assert all(e.text == "already there" for e in events if e.kind == "variant")
    assert {
        p: p.stat().st_mtime_ns for p in again.folder.rglob("*") if p.is_file() and p.name != "study.json"
    } == stamps


def test_what_is_lost_is_made_again_from_the_kept_steps(made, trained_file, digits):
    result, _, recipe = made
    lost = result.folder / "digits-resnet" / "small-int8"
    shutil.rmtree(lost)
    damaged = result.folder / "digits-resnet" / "small-float32" / "model.tflite"
    damaged.write_bytes(b"half")
    events = []
    again = tfopt.run_study([trained_file], digits, ["baseline", recipe], out=result.folder, on_event=events.append)
    assert not again.missing
    made_anew = {e.name for e in events if e.kind == "variant" and e.text != "already there"}
    assert made_anew == {"small-int8", "small-float32"}
    assert "step" not in {e.kind for e in events}, "the factorized model was kept, nothing should be trained again"


def test_a_worker_that_is_killed_leaves_a_study_that_goes_on(trained_file, digits, tmp_path):
    """Killed from outside in the middle of clustering: a row with the signal, and the step before it is kept."""
    recipe = tmp_path / "pair.yaml"
    train = "train: {steps: 20, batch_size: 16, evaluations: 1, validation_images: 50}"
    recipe.write_text(
        f"name: pair\nschemes: [float32]\n"
        f"steps:\n  - factorize: {{rank_ratio: 0.5, {train}}}\n  - cluster: {{{train}}}\n"
    )
    out, killed = tmp_path / "out", []

    def kill(event):
        if event.kind == "step" and "cluster" in event.name and event.done >= 10 and not killed:
            (job,) = out.rglob("exchange-*/..")  # the worker's own folder
            for place in Path("/proc").glob("[0-9]*/cmdline"):
                command = place.read_bytes().split(b"\0") if place.exists() else []
                if str(job.resolve() / "job.json").encode() in command:
                    killed.append(int(place.parent.name))
                    os.kill(killed[0], signal.SIGKILL)

    first = tfopt.run_study([trained_file], digits, [recipe], out=out, targets=(), on_event=kill)
    (failed,) = first.entries
    assert killed and failed.variant.status == "failed" and "SIGKILL" in failed.variant.reason
    events = []
    again = tfopt.run_study([trained_file], digits, [recipe], out=out, targets=(), on_event=events.append)
    (entry,) = again.entries
    assert entry.variant.status == "ok", entry.variant.reason
    assert not any("factorize" in event.name for event in events if event.kind == "step"), "that step was finished"
    weights = entry.variant.properties["weights"]
    assert weights["most_channel_values"] <= 16 and all(0 < row["keras_values"] <= 16 for row in weights["layers"])
    assert not weights["not_found"] and not entry.variant.warnings
    assert {row["layer"] for row in weights["layers"]} >= {"stem_v", "classes_v"}


def test_a_failing_recipe_is_a_row_with_its_reason_and_the_others_go_on(trained_file, digits, tmp_path):
    impossible = tmp_path / "impossible.yaml"
    impossible.write_text("name: impossible\nsteps:\n  - factorize: {energy: 1.0}\nschemes: [float32]\n")
    result = tfopt.run_study([trained_file], digits, [impossible, "baseline"], out=tmp_path / "out", targets=())
    failed, *others = result.entries
    assert failed.variant.status == "failed"
    assert "No kernel of the model gains" in failed.variant.reason
    assert [e.variant.status for e in others] == ["ok"] * 4
    assert commands.rows(result)[0]["reason"] == failed.variant.reason
    hidden = [p for p in (tmp_path / "out").rglob("*") if p.name.startswith(".") and p.name != plan.STEPS_FOLDER]
    assert not hidden, "work folders are left behind"


def test_optimize_takes_a_model_in_memory_and_warns_of_a_file_that_is_far_from_it(
    trained, digits, tmp_path, monkeypatch
):
    monkeypatch.setitem(schemes._TOLERANCE, "float16", 1e-9)
    recipe = tfopt.recipe.Recipe("plain", (), ("float32", "float16"))
    near, far = tfopt.optimize(trained.model, digits, recipe, out=tmp_path / "o", input_spec="scaling=signed")
    assert near.variant.name == "plain-float32" and near.quality().top1 > 0.8 and not near.measurements
    assert not near.variant.warnings
    (warning,) = far.variant.warnings
    assert re.fullmatch(
        r"Outputs are up to 0\.\d% of their range from Keras's on 32 images; float16 tolerates 0\.0%", warning
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "fashion"}, "Did you mean fashion_mnist"),
        ({"recipes": "prune_all"}, "There is no recipe of that name"),
        ({"models": []}, "No model was given"),
        ({"models": ["nowhere.keras"]}, "does not exist"),
        ({"deadline_fps": 0}, "above 0"),
        ({"training": {"*": {"epoch": 3}}}, "Did you mean epochs"),
        ({"seed": -1}, "The seed is out of range"),
        ({"out": 5}, "not a path"),
        ({"data": ([1], [2])}, "from_arrays"),
        ({"training": {"steps": 2}}, "not given by technique"),
        ({"training": {"prun": {"steps": 2}}}, "Did you mean prune"),
        ({"input_spec": "scaling=unity"}, "Did you mean unit"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(change, message, trained_file, digits, tmp_path):
    asked = {"models": [trained_file], "data": digits, "recipes": "lowrank", "out": tmp_path / "out", **change}
    with pytest.raises(Problem, match=message) as caught:
        tfopt.run_study(**asked)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists(), "something was left behind"


def test_a_model_for_other_classes_is_refused(digits, tmp_path):
    inputs = keras.Input((8, 8, 1))
    keras.Model(inputs, keras.layers.Dense(7, activation="softmax")(keras.layers.Flatten()(inputs))).save(
        tmp_path / "seven.keras"
    )
    with pytest.raises(Problem, match="7 outputs for 10 classes"):
        tfopt.run_study([tmp_path / "seven.keras"], digits, "baseline", out=tmp_path / "out")


def test_another_data_set_does_not_mix_into_a_study(made, trained_file, digits):
    result, _, _ = made
    with pytest.raises(Problem, match=r"holds a study of other data.*360 test images.*asked for"):
        tfopt.run_study([trained_file], digits.limited(train=100), "baseline", out=result.folder)


def test_two_studies_at_once_in_one_folder_are_refused(trained_file, digits, tmp_path):
    out, seen = tmp_path / "out", []

    def second(event):
        if not seen:
            with pytest.raises(Problem, match="being made in this folder right now") as caught:
                tfopt.run_study([trained_file], digits, "baseline", out=out, targets=())
            seen.append(caught.value.exit_code)

    recipe = tfopt.recipe.Recipe("plain", (), ("float32",))
    first = tfopt.run_study([trained_file], digits, recipe, out=out, targets=(), on_event=second)
    assert seen == [2] and first.entries[0].variant.status == "ok"


def test_study_json_is_plain_and_versioned(made):
    result, _, _ = made
    values = json.loads((result.folder / "study.json").read_text())
    assert values["schema_version"] == 1
    assert values["data"]["images"]["test"] == 360
    assert values["machine"]
    assert store.read_study(result.folder).record.finished_at


def test_threads_are_another_target(made, trained_file, digits):
    result, _, _recipe = made
    again = tfopt.run_study([trained_file], digits, ["baseline"], out=result.folder, targets=[Target(threads=2)])
    measured = {m.target.threads for e in again.entries if e.variant.recipe == "baseline" for m in e.measurements}
    assert measured == {1, 2}
    assert all(e.measurements for e in again.entries)


def test_an_error_that_an_interrupt_became_ends_the_study(trained_file, digits, tmp_path, monkeypatch):
    def lost(*_, **__):
        interrupts._asked.set()
        raise SystemError("bad argument to internal function")

    monkeypatch.setattr(steps, "run", lost)
    try:
        with pytest.raises(KeyboardInterrupt):
            tfopt.run_study([trained_file], digits, ["prune"], out=tmp_path / "out", targets=())
    finally:
        interrupts._asked.clear()
    assert not any(entry.variant for entry in store.read_study(tmp_path / "out").entries)


def test_variants_of_another_model_of_the_name_are_told_of(trained_file, digits, tmp_path):
    few, events = digits.limited(100, 60), []
    recipes = [tmp_path / f"{name}.yaml" for name in "ab"]
    for recipe in recipes:
        recipe.write_text(f"name: {recipe.stem}\nschemes: [float32]\n")
    tfopt.run_study([trained_file], few, [recipes[0]], out=tmp_path / "out", targets=())
    other = keras.models.load_model(trained_file)
    other.layers[-1].set_weights([array * 0.5 for array in other.layers[-1].get_weights()])
    (tmp_path / "other").mkdir()
    models.save(other, tmp_path / "other" / trained_file.name, models.load(trained_file).spec)
    again = [tmp_path / "other" / trained_file.name]
    tfopt.run_study(again, few, [recipes[1]], out=tmp_path / "out", targets=(), on_event=events.append)
    (told,) = [event.text for event in events if "another model of this name" in event.text]
    assert "a-float32" in told and "b-float32" not in told


def test_the_log_of_a_failed_job_stays(trained_file, digits, tmp_path):
    (tmp_path / "r.yaml").write_text("name: r\nsteps: [prune]\nschemes: [float32]\n")
    made = tfopt.run_study(
        [trained_file], digits, [tmp_path / "r.yaml"], out=tmp_path / "out", targets=(), step_minutes=0.01
    )
    reason = made.entries[0].variant.reason
    assert "longer than its limit" in reason
    assert Path(re.search(r"The whole log is (\S+\.log)", reason)[1]).is_file()


def test_what_a_killed_process_left_is_removed(trained_file, digits, tmp_path):
    left = tmp_path / "out" / ".steps" / ".work-abc"
    left.mkdir(parents=True)
    (left / "images.npy").write_bytes(b"0")
    tfopt.run_study([trained_file], digits.limited(20, 20), ["baseline"], out=tmp_path / "out", targets=())
    assert not left.exists()
