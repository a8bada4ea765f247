from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

from tfopt import graph
from tfopt.errors import InputError, ModelRefused
from tfopt.technique import Context, OptimizedModel, Property
from tfopt.techniques.factorize import Factorize
from tfopt.training import TrainConfig

LAYERS = [
    keras.layers.Dense(24, name="x", activation="relu"),
    keras.layers.Conv2D(24, 3, name="x", padding="same"),
    keras.layers.Conv2D(24, 3, strides=2, name="x", padding="valid", use_bias=False),
    keras.layers.Conv2D(24, 1, name="x", activation="relu"),
    keras.layers.Conv2D(24, 3, dilation_rate=2, name="x", padding="same"),
]


def chain(layer, parts):
    new = [part.make(keras) for part in parts]
    replaced = graph.rewrite(layer, {"x": new})
    for part in parts:
        replaced.get_layer(part.name).set_weights(part.weights)
    return replaced


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_full_rank_reproduces_the_layer(layer):
    layer = type(layer).from_config(layer.get_config())
    shape = (16,) if isinstance(layer, keras.layers.Dense) else (9, 9, 16)
    model = keras.Sequential([keras.Input(shape), layer])
    generator = np.random.default_rng(0)
    layer.set_weights([generator.normal(size=w.shape).astype(np.float32) for w in layer.get_weights()])
    _left, values, _right = np.linalg.svd(layer.get_weights()[0].reshape(-1, 24), full_matrices=False)
    full = Factorize(rank_ratio=1.0, only_if_cheaper=False)._plan(layer)
    assert full[0].units_or_filters == len(values)
    image = generator.normal(size=(4, *shape)).astype(np.float32)
    np.testing.assert_allclose(chain(model, full)(image), model(image), rtol=1e-4, atol=1e-4)


def test_rank_is_the_least_that_keeps_the_energy():
    values = np.array([3.0, 2.0, 1.0, 0.0])
    technique = Factorize(energy=13 / 14)
    assert technique._rank(values) == 2
    assert dataclasses.replace(technique, energy=13.01 / 14)._rank(values) == 3
    assert dataclasses.replace(technique, energy=1.0)._rank(values) == 3


def test_a_low_rank_kernel_is_found_and_the_model_really_shrinks(digits, spec, trained, tmp_path):
    model = graph.rewrite(trained.model)
    layer = model.get_layer("stage3_block1_conv2")
    kernel = layer.get_weights()[0]
    left, values, right = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), full_matrices=False)
    layer.set_weights([((left[:, :4] * values[:4]) @ right[:4]).reshape(kernel.shape)])
    technique = Factorize(energy=0.9999, train=TrainConfig(steps=3, learning_rate=1e-4))
    context = Context(digits, tmp_path, teacher=model)
    before = [w.copy() for w in model.get_weights()]
    result, report = technique.apply(OptimizedModel(model, spec), context)
    assert report.properties["ranks"]["stage3_block1_conv2"] == 4
    assert Property.LOW_RANK in result.properties
    assert graph.count_macs(result.model) == report.macs_after < report.macs_before
    assert report.parameters_after == result.model.count_params() < report.parameters_before
    assert {skip.reason for skip in report.skipped} <= {"no gain at this rank", "too small to gain"}
    assert report.training["steps"] == 3
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_excluded_layers_are_reported(digits, spec, trained, tmp_path):
    technique = Factorize(rank_ratio=0.3, exclude=("stage3*",), train=TrainConfig(steps=1))
    _, report = technique.apply(OptimizedModel(trained.model, spec), Context(digits, tmp_path, teacher=trained.model))
    excluded = {skip.layer for skip in report.skipped if skip.reason == "excluded by the recipe"}
    assert "stage3_block1_conv1" in excluded
    assert not any(name.startswith("stage3") for name in report.touched)


def test_nothing_to_gain_is_a_refusal_not_a_copy(digits, spec, trained, tmp_path):
    with pytest.raises(ModelRefused, match="No kernel of the model gets cheaper"):
        Factorize(energy=1.0).apply(
            OptimizedModel(trained.model, spec), Context(digits, tmp_path, teacher=trained.model)
        )


@pytest.mark.parametrize(
    "values", [{"energy": 0}, {"energy": 1.2}, {"energy": "all"}, {"rank_ratio": -1}, {"min_gain": 1}]
)
def test_bad_settings(values):
    with pytest.raises(InputError, match="out of range"):
        Factorize(**values)


def test_recipe_callbacks_and_a_python_loss_take_part(digits, spec, trained, tmp_path):
    log = tmp_path / "log.csv"
    seen = []

    def loss(labels, outputs):
        seen.append(outputs.shape)
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(labels, outputs))

    train = TrainConfig(steps=4, evaluations=2, loss=loss, callbacks=[{"CSVLogger": {"filename": str(log)}}])
    technique = Factorize(rank_ratio=0.3, train=train)
    technique.apply(OptimizedModel(trained.model, spec), Context(digits, tmp_path, teacher=trained.model))
    assert seen and seen[0][-1] == 10
    assert len(log.read_text().splitlines()) == 3 and "val_accuracy" in log.read_text()
