"""Repairs of full-int8 files, on the deployed kernels: a trained classifier of digits, and files broken on purpose."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from mobile_bench.errors import Problem
from mobile_bench.interpreter import open_model
from tfopt import convert, models
from tfopt.cli import app
from tfopt.errors import ModelRefused
from tfopt.rescue import rescue, rescue_file
from tfopt.rescue.equalize import equalize
from tfopt.rescue.graph import Graph
from tfopt.rescue.ladder import Goal, climb
from tfopt.rescue.lift import lift, units
from tfopt.rescue.moments import Moments
from tfopt.rescue.refit import refit, rounded_to_nearest, twins
from tfopt.rescue.rounding import round_dense, round_depthwise
from tfopt.rescue.score import Judge, layer_errors
from tfopt.rescue.training import train_and_judge


@pytest.fixture(scope="module")
def depthwise_file(digits, spec, tmp_path_factory):
    """A small network of depthwise and pointwise layers that reads digits."""
    import keras
    from keras import layers

    from tfopt import training

    keras.utils.set_random_seed(1)
    x = inputs = keras.Input(spec.shape)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(layers.Conv2D(16, 3, padding="same", use_bias=False)(x)))
    for number, width in enumerate((32, 48)):
        x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name=f"depthwise{number}")(x)
        x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
        x = layers.Conv2D(width, 1, use_bias=False, name=f"pointwise{number}")(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Dense(10, activation="softmax", name="classes")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, x)
    config = training.TrainConfig(epochs=12, batch_size=32, learning_rate=5e-3, optimizer="adam")
    training.fit(model, digits["train"], digits["validation"], spec, config, keras=keras)
    path = tmp_path_factory.mktemp("depthwise") / "model.keras"
    models.save(model, path, spec)
    return path


@pytest.fixture(scope="module")
def files(depthwise_file, digits, spec, tmp_path_factory):
    out = tmp_path_factory.mktemp("files")
    made = convert.convert(
        depthwise_file,
        spec,
        ["float32", "int8"],
        out,
        calibration=digits["calibration"],
        calibration_images=64,
        work=out,
    )
    return [one.path.read_bytes() for one in made]


@pytest.fixture
def floats(files):
    return Graph(files[0])


@pytest.fixture
def quantized(files):
    return Graph(files[1])


@pytest.fixture(scope="module")
def images(digits, spec):
    return digits["calibration"].balanced(40).pixels(spec)


@pytest.fixture
def judge(floats, digits, spec):
    choices = digits["validation"].balanced(60)
    return Judge(floats, choices.pixels(spec), choices.labels, spec)


def broken(floats: Graph, quantized: Graph) -> Graph:
    """A file whose biases are off by three steps of the layer's answer: what a bad calibration does."""
    for _, twin in twins(floats, quantized):
        steps = quantized.scale(twin.bias)[0]
        shift = np.round(3 * quantized.scale(twin.output)[0][0] / steps)
        quantized.set_array(twin.bias, quantized.array(twin.bias) + shift)
    return quantized


def test_a_graph_that_was_not_changed_answers_as_before(files, quantized, digits, spec, tmp_path):
    (tmp_path / "a.tflite").write_bytes(files[1])
    (tmp_path / "b.tflite").write_bytes(quantized.pack())
    one, other = open_model(tmp_path / "a.tflite"), open_model(tmp_path / "b.tflite")
    values = spec.normalize(digits["test"].subset(np.arange(3)).pixels(spec))
    for value in values:
        assert np.array_equal(one.invoke(value[None])[0], other.invoke(value[None])[0])


def test_rounding_beats_the_nearest_number_where_inputs_depend_on_each_other():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(2000, 4)) @ random.normal(size=(4, 24)) + 0.05 * random.normal(size=(2000, 24))
    weights = random.normal(size=(16, 24))
    moments = Moments(inputs.mean(0), inputs.mean(0), np.cov(inputs.T, bias=True))
    numbers, scales = round_dense(weights, moments)
    assert numbers.dtype == np.int8 or np.array_equal(numbers, np.round(numbers))
    nearest_scale = np.abs(weights).max(1, keepdims=True) / 127
    nearest = np.round(weights / nearest_scale) * nearest_scale
    error = lambda rounded: np.square(inputs @ (rounded - weights).T).mean()
    assert error(numbers * scales[:, None]) < 0.7 * error(nearest)


def test_rounding_of_depthwise_channels_beats_the_nearest_number():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(8, 1000, 1)) + 0.2 * random.normal(size=(8, 1000, 9))
    weights = random.normal(size=(8, 9))
    within = np.stack([np.cov(channel.T, bias=True) for channel in inputs])
    numbers, scales = round_depthwise(weights, Moments(inputs.mean(1), inputs.mean(1), within))
    nearest_scale = np.abs(weights).max(1, keepdims=True) / 127
    nearest = np.round(weights / nearest_scale) * nearest_scale
    error = lambda rounded: np.mean([np.var(x @ d) for x, d in zip(inputs, rounded - weights)])
    assert error(numbers * scales[:, None]) < 0.5 * error(nearest)


def test_refitting_gives_back_what_wrong_biases_took(floats, quantized, images, judge, spec):
    good = judge.score(quantized)
    bad = judge.score(broken(floats, quantized))
    assert bad.divergence > 3 * good.divergence
    refit(floats, quantized, images, spec, rounding=False)
    assert judge.score(quantized).divergence < 0.5 * bad.divergence
    refit(floats, quantized, images, spec, rounding=True)
    assert judge.score(quantized).agreement >= good.agreement - 0.05


def test_nearest_rounding_is_what_the_converter_does(floats, quantized):
    for layer, twin in twins(floats, quantized):
        before = quantized.array(twin.weights).copy()
        rounded_to_nearest(floats, layer, quantized, twin)
        assert np.abs(before.astype(int) - quantized.array(twin.weights)).max() <= 1


def test_equalization_changes_no_float_answer(floats, quantized, images, judge, spec):
    before = judge.score(quantized)
    assert equalize(floats, quantized, images, spec) > 0
    assert judge.score(floats).divergence < 1e-4
    # The tensors between keep their scales, so nothing new is cut off.
    assert judge.score(quantized).divergence < max(3 * before.divergence, 1e-3)


@pytest.mark.parametrize("kind", ["weight8", "float16"])
def test_lifted_layers_compute_in_float(floats, quantized, judge, kind):
    whole = lift(floats, quantized, {unit: kind for unit in units(quantized)})
    assert {whole.op(n) for n in range(len(whole.main.operators))} >= {"DEQUANTIZE"}
    assert "QUANTIZE" not in {whole.op(n) for n in range(len(whole.main.operators))}
    before, after = judge.score(quantized).divergence, judge.score(whole).divergence
    assert after < before
    if kind == "float16":
        assert after < 0.2 * before
    assert len(whole.pack()) > len(quantized.pack())


def test_one_lifted_layer_stands_between_its_int8_neighbours(floats, quantized, judge):
    middle = sorted(units(quantized))[3]
    made = lift(floats, quantized, {middle: "float16"})
    kinds = [made.op(n) for n in range(len(made.main.operators))]
    assert kinds.count("QUANTIZE") == 1 and kinds.count("DEQUANTIZE") == 2
    assert judge.score(made).agreement > 0.8
    with pytest.raises(Problem, match="float15"):
        lift(floats, quantized, {middle: "float15"})


def test_layers_are_named_as_in_keras_with_their_noise(floats, quantized, images, spec, depthwise_file):
    errors = layer_errors(floats, quantized, images[:8], spec)
    names = [layer.name for layer in quantized.layers()]
    known = {layer.name for layer in models.load(depthwise_file).model.layers}
    assert len(errors) == len(names) and set(names) <= known
    assert all(5 < error < 80 for error in errors)
    worse = layer_errors(floats, broken(floats, quantized), images[:8], spec)
    assert sum(worse) < sum(errors)


def test_the_ladder_stops_when_it_is_good_enough(floats, quantized, images, judge, spec):
    found = climb(floats, quantized, images, judge, spec, Goal(min_agreement=0.0, max_drop=1.0))
    assert found.reached and [rung.name for rung in found.rungs] == ["as converted"]


def test_the_ladder_keeps_only_what_helps(floats, quantized, images, judge, spec):
    size = len(quantized.pack())
    found = climb(
        floats, broken(floats, quantized), images, judge, spec, Goal(min_agreement=1.0, max_drop=0.0, max_size=1.3)
    )
    kept = [rung.score.divergence for rung in found.rungs if rung.kept]
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.3 * kept[0]
    assert len(kept) >= 2 and [rung.name for rung in found.rungs[:2]] == ["as converted", "equalization"]
    assert len(found.graph.pack()) <= 1.3 * size
    assert judge.score(found.graph).divergence == pytest.approx(kept[-1])


def test_the_ladder_mends_biases_where_nothing_else_does(floats, quantized, images, judge, spec, monkeypatch):
    monkeypatch.setattr("tfopt.rescue.ladder.equalize", lambda *_: 0)
    goal = Goal(min_agreement=1.0, max_drop=0.0, mixed=False)
    found = {rung.name: rung for rung in climb(floats, broken(floats, quantized), images, judge, spec, goal).rungs}
    assert "equalization" not in found and found["bias correction"].kept
    assert found["bias correction"].score.divergence < 0.3 * found["as converted"].score.divergence


def test_named_layers_are_kept_in_float_whatever_it_brings(floats, quantized, images, judge, spec):
    goal = Goal(min_agreement=0.0, max_drop=1.0, mixed=False, keep={"depthwise1": "float16"})
    found = climb(floats, quantized, images, judge, spec, goal)
    assert [(one.layer, one.kind) for one in found.lifted] == [("depthwise1", "float16")] and found.rungs[-1].kept
    with pytest.raises(Problem, match="depthwise1"):
        climb(floats, quantized, images, judge, spec, Goal(keep={"depthwise9": "float16"}))
    with pytest.raises(Problem, match="float12"):
        climb(floats, quantized, images, judge, spec, Goal(keep={"depthwise1": "float12"}))


def test_the_command_writes_file_and_report(depthwise_file, tmp_path):
    out = tmp_path / "r.tflite"
    seen = []
    report = rescue_file(
        str(depthwise_file), "digits", out, on_progress=seen.append, calibration_images=32, choice_images=40,
        test_images=60, min_agreement=0.5, max_drop=1.0,
    )  # fmt: skip
    assert report["reached"] and out.stat().st_size == report["size_bytes"]
    assert report["test"]["images"] == 60 and report["test"]["agree"] >= 40
    assert any("rung" in message for message in seen)
    assert open_model(out).inputs[0].dtype == "int8"
    json.dumps(report)


@pytest.fixture
def last_rung(files, depthwise_file, digits, spec, tmp_path):
    """Calls the training rung after a ladder whose best file has a divergence of so much."""
    arrays = {"choices": digits["validation"].balanced(60), "test": digits["test"].balanced(50)}
    job = {"float32": str(tmp_path / "float32.tflite"), "out": str(tmp_path / "out.tflite"), "spec": spec.to_dict()}
    for name, labels in (("choices", "choice_labels"), ("test", "test_labels")):
        for key, value in ((name, arrays[name].pixels(spec)), (labels, arrays[name].labels)):
            np.save(tmp_path / f"{key}.npy", value)
            job[key] = str(tmp_path / f"{key}.npy")
    (tmp_path / "float32.tflite").write_bytes(files[0])
    (tmp_path / "out.tflite").write_bytes(files[1])

    def call(divergence, **goal):
        job["goal"] = {"min_agreement": 1.0, "max_drop": 0.0, **goal}
        best = {"name": "rounding", "kept": True, "score": {"divergence": divergence}}
        found = {"rungs": [best], "float": {"agreement": 1.0, "top1": 0.97, "divergence": 0.0}, "reached": False}
        found |= {"lifted": ["a layer"], "test": "of the repaired file"}
        return train_and_judge(models.load(depthwise_file), digits, tmp_path, job, found, 30)

    return call


@pytest.mark.slow
def test_training_is_the_last_rung_and_kept_where_it_is_nearer(last_rung, files, tmp_path):
    found = last_rung(10.0)
    rung = found["rungs"][-1]
    assert rung["name"] == "training for int8" and rung["note"] == "30 steps" and rung["kept"]
    assert rung["score"]["agreement"] > 0.8 and rung["score"]["top1"] > 0.8
    assert found["test"]["images"] == 50 and found["test"]["agree"] > 35 and found["lifted"] == []
    content = (tmp_path / "out.tflite").read_bytes()
    assert content != files[1] and len(content) == rung["size_bytes"]
    assert open_model(tmp_path / "out.tflite").inputs[0].dtype == "int8"


def test_a_trained_file_that_is_no_nearer_is_dropped_unless_it_reaches_the_goal(
    last_rung, floats, quantized, files, tmp_path, monkeypatch
):
    other = broken(floats, quantized).pack()
    monkeypatch.setattr("tfopt.rescue.training._trained", lambda *_: _written(tmp_path / "other.tflite", other))
    found = last_rung(0.0)
    assert not found["reached"] and not found["rungs"][-1]["kept"] and found["test"] == "of the repaired file"
    assert (tmp_path / "out.tflite").read_bytes() == files[1]
    found = last_rung(0.0, min_agreement=0.1, max_drop=1.0)
    assert found["reached"] and found["rungs"][-1]["kept"] and found["test"]["images"] == 50
    assert (tmp_path / "out.tflite").read_bytes() == other


def _written(path, content):
    path.write_bytes(content)
    return path


def test_a_model_that_cannot_be_trained_keeps_its_repaired_file(last_rung, files, tmp_path, monkeypatch):
    def refuse(*_):
        raise ModelRefused("Layer stem cannot be rebuilt for TFMOT")

    monkeypatch.setattr("tfopt.techniques.quantize.QuantizeAware.apply", refuse)
    found = last_rung(10.0)
    assert "Layer stem" in found["training_refused"] and len(found["rungs"]) == 1
    assert (tmp_path / "out.tflite").read_bytes() == files[1]


def test_training_begins_only_where_repairs_are_not_enough(depthwise_file, tmp_path):
    report = rescue_file(
        str(depthwise_file), "digits", tmp_path / "r.tflite", calibration_images=32, choice_images=40, test_images=60,
        min_agreement=0.5, max_drop=1.0, qat_steps=30,
    )  # fmt: skip
    assert report["reached"] and [rung["name"] for rung in report["rungs"]] == ["as converted"]


@pytest.mark.parametrize(
    ("change", "word"),
    [({"qat_steps": -1}, "training steps"),
     ({"max_drop": 5}, "max_drop"), ({"min_agreement": -1}, "min_agreement"), ({"max_size": 0.5}, "max_size"),
     ({"spend": "money"}, "money"), ({"choice_images": 0}, "choice images"),
     ({"keep": {"dense": "weight8"}, "mixed": False}, "keep dense, without mixed")],
)  # fmt: skip
def test_bad_options_are_named_before_any_work(change, word):
    with pytest.raises(Problem, match=word):
        rescue(None, None, **change)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--min-agreement", "0.98"), "50 to 100 percent"), (("--max-drop", "-1"), "0 to 100 points"),
        (("--qat-steps", "10"), "without --qat"), (("--qat", "--qat-steps", "0"), "1 and above"),
    ],
)  # fmt: skip
def test_the_command_speaks_of_its_own_options(depthwise_file, args, words):
    with pytest.raises(Problem, match=words):
        app(["rescue", str(depthwise_file), "--data", "digits", *args], standalone_mode=False)


def test_too_few_images_decide_nothing(depthwise_file, digits):
    few = dataclasses.replace(digits, splits={**digits.splits, "validation": digits["validation"].balanced(4)})
    with pytest.raises(Problem, match="too few images for the choice set"):
        rescue(models.load(depthwise_file), few)


def test_files_of_different_models_are_refused(floats, trained_file, digits, spec, tmp_path):
    (other,) = convert.convert(
        trained_file, spec, ["int8"], tmp_path, calibration=digits["calibration"], calibration_images=8, work=tmp_path
    )
    with pytest.raises(Problem, match="other layers"):
        twins(floats, Graph(other.path.read_bytes()))
