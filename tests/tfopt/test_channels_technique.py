"""The technique `channels`: from settings to a smaller, trained, converted model."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

from mobile_bench.interpreter import open_model
from tfopt import convert, graph, models, recipe
from tfopt.errors import InputError, ModelRefused, Problem
from tfopt.technique import Context, OptimizedModel, Property, make
from tfopt.techniques.narrow import Narrow
from tfopt.training import TrainConfig

SHORT = TrainConfig(steps=4, learning_rate=1e-4, evaluations=1, validation_images=100)


def apply(technique, trained, digits, spec, tmp_path, **changes):
    context = Context(digits, tmp_path, teacher=trained.model, **changes)
    return technique.apply(OptimizedModel(trained.model, spec), context)


def test_the_model_is_smaller_trained_and_converts(digits, spec, trained, tmp_path):
    before = [weight.copy() for weight in trained.model.get_weights()]
    train = TrainConfig(steps=40, learning_rate=1e-3, evaluations=1)
    result, report = apply(Narrow(ratio=0.3, train=train), trained, digits, spec, tmp_path)
    assert result.properties == {Property.NARROW} and result.spec == spec
    assert report.technique == "channels" and report.training["steps"] == 40
    assert report.parameters_after == result.model.count_params() < 0.7 * report.parameters_before
    assert report.macs_after == graph.count_macs(result.model) < 0.7 * report.macs_before
    channels = report.properties["channels"]
    assert set(report.touched) == {name for name, (old, new) in channels.items() if new < old}
    shapes = {
        layer.name: layer.get_weights()[0].shape[-1] for layer in graph.flat_layers(result.model) if layer.weights
    }
    assert all(shapes[name] == new for name, (_, new) in channels.items())
    assert [skip.reason for skip in report.skipped] == ["first or last layer"]
    assert report.properties["rounds"][0]["exactness"] < 1e-5
    # Two thirds of a network that reads digits still read digits after a short training.
    assert report.training["accuracy_after"] > max(0.6, report.properties["accuracy_before_training"])
    for old, new in zip(before, trained.model.get_weights()):
        np.testing.assert_array_equal(old, new)
    models.save(result.model, tmp_path / "small.keras", spec)
    assert models.load(tmp_path / "small.keras").model.count_params() == report.parameters_after
    (made,) = convert.convert(tmp_path / "small.keras", spec, ["float32"], tmp_path / "out", work=tmp_path / "work")
    images = spec.normalize(digits["test"].pixels(spec, slice(0, 8)))
    runner = open_model(made.path)
    answers = np.concatenate([runner.invoke(image[None])[0] for image in images])
    np.testing.assert_allclose(answers, result.model(images, training=False), atol=1e-5)


def test_rounds_end_where_one_cut_does_and_share_the_training(digits, spec, trained, tmp_path):
    seen = []
    progress = lambda step, steps, facts: seen.append((step, steps))
    once, _ = apply(Narrow(ratio=0.5, train=SHORT), trained, digits, spec, tmp_path)
    technique = Narrow(ratio=0.5, rounds=2, train=dataclasses.replace(SHORT, steps=5))
    twice, report = apply(technique, trained, digits, spec, tmp_path, progress=progress)
    assert twice.model.count_params() == pytest.approx(once.model.count_params(), rel=0.15)
    rounds = report.properties["rounds"]
    assert len(rounds) == 2
    assert rounds[0]["parameters"] > rounds[1]["parameters"] == report.parameters_after
    assert report.training["steps"] == 5 and [row["step"] for row in report.training["history"]] == [2, 5]
    assert [step for step, _ in seen] == sorted(step for step, _ in seen) and {steps for _, steps in seen} == {5}
    before, after = report.properties["channels"]["stage3_block1_conv1"]
    assert after == before // 2


@pytest.mark.parametrize("scope", ["uniform", pytest.param("global", marks=pytest.mark.slow)])
def test_a_number_of_macs(digits, spec, trained, tmp_path, scope):
    technique = Narrow(macs=0.5, scope=scope, importance="taylor", multiple=2, rounds=2, train=SHORT)
    _, report = apply(technique, trained, digits, spec, tmp_path)
    assert 0.4 < report.macs_after / report.macs_before <= 0.5


def test_global_ratio_and_own_ratios(digits, spec, trained, tmp_path):
    technique = Narrow(ratio=0.4, scope="global", importance="bn_scale", multiple=1, train=SHORT)
    _, report = apply(technique, trained, digits, spec, tmp_path)
    shares = {1 - new / old for old, new in report.properties["channels"].values()}
    assert len(shares) > 3 and report.macs_after < report.macs_before
    technique = Narrow(ratio=0.0, layers={"stage3_block1_conv1": 0.5}, multiple=1, train=SHORT)
    _, report = apply(technique, trained, digits, spec, tmp_path)
    assert report.touched == ("stage3_block1_conv1",)
    unmoved = {skip.layer: skip.detail for skip in report.skipped if skip.reason == "too small to gain"}
    assert "all 8 channels stay" in unmoved["stage1_block1_conv1"] and "stage3_block1_conv1" not in unmoved


def test_included_and_excluded_layers_are_reported(digits, spec, trained, tmp_path):
    _, report = apply(Narrow(exclude=("stage3*",), train=SHORT), trained, digits, spec, tmp_path)
    excluded = {skip.layer for skip in report.skipped if skip.reason == "excluded by the recipe"}
    assert "stage3_block1_conv1" in excluded
    assert report.touched and not any(name.startswith("stage3") for name in report.touched)
    _, report = apply(Narrow(include="stage2*conv1", multiple=4, train=SHORT), trained, digits, spec, tmp_path)
    assert report.touched == ("stage2_block1_conv1",)


class Odd(keras.layers.Layer):
    def call(self, x):
        return x


def refused(monkeypatch):
    def fit(*args, **kwargs):
        raise AssertionError("trained before the refusal")

    monkeypatch.setattr("tfopt.training.fit", fit)
    monkeypatch.setattr("tfopt.training.recalibrate", fit)


def test_refusals_come_before_any_training(digits, spec, trained, tmp_path, monkeypatch):
    refused(monkeypatch)
    for technique, message in (
        (Narrow(exclude=("*",)), "No layer of the model can lose channels"),
        (Narrow(exclude=("nowhere",)), "There is no layer, type or pattern"),
        (Narrow(layers={"nowhere": 0.5}), "There is no layer, or pattern of layers, that can lose"),
        (Narrow(ratio=0.995), "would be left without a channel"),
        (Narrow(ratio=0.01), "No layer of the model loses a channel"),
        (Narrow(macs=0.001), "So few MACs cannot be reached"),
    ):
        with pytest.raises(Problem, match=message):
            apply(technique, trained, digits, spec, tmp_path)
    image = keras.Input(spec.shape)
    odd = keras.Model(image, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(Odd(name="odd")(image))))
    with pytest.raises(ModelRefused, match="odd of class Odd"):
        Narrow().apply(OptimizedModel(odd, spec), Context(digits, tmp_path, teacher=odd))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"ratio": 1}, "ratio is out of range"), ({"ratio": -0.1}, "ratio is out of range"),
        ({"ratio": "half"}, "ratio is out of range"), ({"ratio": True}, "ratio is out of range"),
        ({"ratio": 0.3, "macs": 0.5}, "more than one way"),
        ({"ratio": 0}, "removes no channel"), ({"macs": 0}, "macs is out of range"),
        ({"macs": 1}, "macs is out of range"), ({"importance": "l3"}, "no importance of that name"),
        ({"scope": "layer"}, "no scope of that name"), ({"multiple": 0}, "multiple is out of range"),
        ({"multiple": 2.5}, "multiple is out of range"), ({"rounds": 0}, "rounds is out of range"),
        ({"layers": [0.3]}, "not a table"), ({"layers": {"a": 2}}, "The ratio of a is out of range"),
        ({"exclude": 3}, "no list of layers"), ({"layers": {"a": 0.2}, "scope": "global"}, "one for all"),
        ({"layers": {"a": 0.2}, "macs": 0.5}, "one for all"),
    ],
)  # fmt: skip
def test_bad_settings(values, message):
    with pytest.raises(InputError, match=message):
        Narrow(**values)


def test_a_recipe_is_read_without_keras(run_python):
    code = (
        "import sys, tfopt.recipe as r; r.load('channels'); print('keras' in sys.modules, 'tensorflow' in sys.modules)"
    )
    assert run_python("-c", code).stdout.split() == ["False", "False"]


def test_recipes_know_it_and_what_may_follow():
    made = recipe.load("channels")
    assert made.steps[0].name == "channels" and made.steps[0].ratio == 0.3
    assert isinstance(make("channels", {"macs": 0.5, "exclude": ["stem"]}), Narrow)
    hybrid = recipe.Recipe("narrow_prune", (Narrow(), make("prune", {})), ("float32",))
    assert hybrid.steps[1].name == "prune"
    with pytest.raises(Problem, match="would lose what prune gained"):
        recipe.Recipe("prune_narrow", (make("prune", {}), Narrow()), ("float32",))
