"""What computes in float in an int8 file: foreseen before training, left out by choice, and listed afterwards."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
from keras import layers

from mobile_bench.errors import JobFailed
from mobile_bench.flatbuffer import read_model
from mobile_bench.inputs import InputSpec
from tfopt import attest, models, residual
from tfopt.cli import app
from tfopt.errors import InputError, ModelRefused
from tfopt.rescue.graph import Graph
from tfopt.technique import Context, Limits, OptimizedModel
from tfopt.techniques.prune import Prune
from tfopt.techniques.quantize import QuantizeAware
from tfopt.tfmot import client, foresight
from tfopt.training import TrainConfig, classify

from .own_layers import Scaled

BRIEF = TrainConfig(steps=4, batch_size=16, learning_rate=1e-4, evaluations=1, validation_images=20)


def softplus_inside():
    """A layer that the converter has no integers for, between two that it has."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="softplus", name="soft")(image)
    x = layers.Conv2D(6, 3, activation="relu", name="after")(x)
    return keras.Model(image, layers.Dense(4, activation="softmax", name="scores")(layers.Flatten()(x)), name="plus")


def by_layer(found):
    return {one.layer: one for one in found.layers}


def test_a_strict_step_refuses_before_it_trains(digits, tmp_path):
    model, spec = softplus_inside(), InputSpec(8, 8, 3)
    stages = []
    context = Context(digits, tmp_path, model, progress=lambda *facts: stages.append(facts))
    with pytest.raises(ModelRefused, match="soft"):
        QuantizeAware(strict=True, train=BRIEF).apply(OptimizedModel(model, spec), context)
    assert not stages
    with pytest.raises(InputError, match="strict"):
        QuantizeAware(strict="yes")


def test_a_registered_layer_of_the_users_is_foreseen():
    image = keras.Input((8, 8, 3))
    x = Scaled(0.5, name="own")(keras.layers.Conv2D(4, 3, name="first")(image))
    model = keras.Model(image, keras.layers.Dense(3, name="last")(keras.layers.Flatten()(x)))
    found = by_layer(foresight.foresee(model, InputSpec(8, 8, 3)))
    assert [found[name].becomes for name in ("first", "own", "last")] == ["int8"] * 3


def test_leaving_out_every_layer_is_refused(spec, trained):
    with pytest.raises(ModelRefused, match="Every layer with a kernel is left out"):
        QuantizeAware(exclude=["*"], train=BRIEF).check_layers(trained.model, spec)


@pytest.mark.slow
def test_layers_left_out_by_choice_stay_in_float(trained_file, digits, spec, tmp_path):
    loaded = models.load(trained_file)
    chosen = "stage2_*conv1"
    found = by_layer(foresight.foresee(loaded.model, spec, (chosen,)))
    left = [layer for layer, one in found.items() if one.why == "left out by choice"]
    assert len(left) >= 1 and all(found[layer].becomes == "float" for layer in left)
    assert found["stem"].becomes == "int8"
    result, report = QuantizeAware(exclude=chosen, train=BRIEF).apply(
        OptimizedModel(loaded.model, spec), Context(digits, tmp_path / "work", loaded.model)
    )
    assert sorted(skip.layer for skip in report.skipped) == sorted(left)
    out, test = tmp_path / "int8.tflite", digits["test"].balanced(200)
    outputs = client.export_quantized(result.quantized, spec, out=out, split=test)
    tensors = residual.float_tensors(out, client.sources(result.quantized))
    assert set(left) <= set(residual.layers(tensors)) and "stem" not in residual.layers(tensors)
    stored = [t for t in read_model(out).main.tensors if t.dtype == "float16" and t.constant_bytes]
    assert len(stored) == len(left)
    answers = attest.answers(out, attest.save_split(test, spec, tmp_path), spec, tmp_path)
    assert np.mean(answers.predictions == classify(outputs, spec)) >= 0.98


def test_a_gate_left_out_computes_what_it_did(digits, spec, tmp_path):
    """The converter folds the 3 of a hard sigmoid into the bias before it in a float file, and in an int8 file not."""
    image = keras.Input(spec.shape)
    x = keras.layers.Conv2D(8, 5, strides=2, activation="relu", name="stem")(image)
    gate = keras.layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = keras.layers.Conv2D(8, 1, activation="hard_sigmoid", name="gate")(gate)
    x = keras.layers.Flatten()(keras.layers.Multiply()([x, gate]))
    model = keras.Model(image, keras.layers.Dense(10, activation="softmax", name="classes")(x))
    result, _ = QuantizeAware(exclude="gate", train=BRIEF).apply(
        OptimizedModel(model, spec), Context(digits, tmp_path / "work", model)
    )
    out = tmp_path / "int8.tflite"
    client.export_quantized(result.quantized, spec, out=out)
    graph = Graph(out.read_bytes())
    (number,) = (
        number for number, one in enumerate(graph.main.operators)
        if graph.op(number) == "CONV_2D" and graph.dtype(int(one.inputs[2])) == np.float32
    )  # fmt: skip
    bias = graph.array(int(graph.main.operators[number].inputs[2]))
    np.testing.assert_allclose(bias, result.model.get_layer("gate").get_weights()[1], atol=1e-3)
    assert [graph.op(n) for n in (number + 1, number + 2)] == ["ADD", "MUL"], "the 3 and the sixth are their own"


@pytest.mark.parametrize(
    ("exclude", "word"),
    [(("stm",), "stem"), (("stem_bn",), "with a kernel"), (("BatchNormalization",), "with a kernel")],
)
def test_only_kernel_layers_can_be_left_out(trained_file, digits, spec, tmp_path, exclude, word):
    model = models.load(trained_file).model
    with pytest.raises(InputError, match=word):
        QuantizeAware(exclude=exclude).apply(OptimizedModel(model, spec), Context(digits, tmp_path, model))


def test_the_precheck_command(trained_file, tmp_path, capsys):
    """What will be float is said, layer by layer, before any training."""
    app(["precheck", str(trained_file)], standalone_mode=False)
    assert "none in float" in capsys.readouterr().out
    softplus_inside().save(tmp_path / "plus.keras")
    code = app(
        ["precheck", str(tmp_path / "plus.keras"), "--input-spec", "scaling=unit", "--json"], standalone_mode=False
    )
    said = json.loads(capsys.readouterr().out)
    found = {one["layer"]: one for one in said["layers"]}
    assert code == 1 and {tensor["layer"] for tensor in said["float_tensors"]} >= {"soft"}
    assert found["soft"]["becomes"] == "float" and "converter" in found["soft"]["why"]
    assert found["after"]["becomes"] == found["scores"]["becomes"] == "int8" and "CONV_2D" in found["after"]["ops"]


@pytest.mark.parametrize(
    ("limits", "word"), [(Limits(minutes=0.02), "its limit of 1.2 s"), (Limits(memory_gb=0.15), "memory")]
)
def test_a_step_that_takes_too_much_is_ended(trained_file, digits, spec, tmp_path, limits, word):
    model = models.load(trained_file).model
    with pytest.raises(JobFailed, match=word):
        Prune(train=BRIEF).apply(OptimizedModel(model, spec), Context(digits, tmp_path, model, limits=limits))


@pytest.mark.parametrize("limits", [{"minutes": 0}, {"memory_gb": -1}, {"minutes": "5"}])
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(InputError, match="above 0"):
        Limits(**limits)
