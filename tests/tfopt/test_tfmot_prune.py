"""Pruning by TFMOT in its worker, on a classifier of real digits."""

from __future__ import annotations

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from tfopt import models, training
from tfopt.errors import InputError, ModelRefused, RecipeError, TrainingError
from tfopt.technique import Context, OptimizedModel, Property, make
from tfopt.techniques import prune
from tfopt.techniques.prune import Prune
from tfopt.training import TrainConfig

SHORT = TrainConfig(steps=47, batch_size=32, learning_rate=1e-3, evaluations=1)


@pytest.fixture(scope="module")
def outcome(digits, spec, trained_file, tmp_path_factory):
    """One pruning, looked at from several sides: (model before, its weights, result, report, progress)."""
    model = models.load(trained_file).model
    weights, seen = [array.copy() for array in model.get_weights()], []
    work = tmp_path_factory.mktemp("prune") / "not there yet"
    context = Context(digits, work, teacher=model, progress=lambda *facts: seen.append(facts))
    technique = Prune(sparsity=0.6, exclude=("stage1_*", "classes"), train=SHORT)
    result, report = technique.apply(OptimizedModel(model, spec, frozenset({Property.NARROW})), context)
    return model, weights, result, report, seen, work


def test_the_model_that_comes_back_is_sparse(outcome):
    model, weights, result, report, _, _ = outcome
    assert result.properties == {Property.SPARSE, Property.NARROW} and result.quantized is None
    assert result.model is not model
    assert all(np.array_equal(old, new) for old, new in zip(weights, model.get_weights()))
    kernels = {layer.name: layer.get_weights()[0] for layer in result.model.layers if hasattr(layer, "kernel")}
    assert set(report.touched) == {name for name in kernels if not name.startswith(("stage1", "classes"))}
    for name, kernel in kernels.items():
        zeros = np.mean(kernel == 0)
        if name in report.touched:
            assert abs(zeros - 0.6) <= 1.5 / kernel.size, name
            assert report.properties["layer_sparsity"][name] == pytest.approx(zeros, abs=1e-6)
        else:
            assert zeros == 0, name
    assert report.properties["sparsity"] == pytest.approx(0.6, abs=0.005)
    assert report.properties["zeros"] == sum(int(np.sum(kernel == 0)) for kernel in kernels.values())
    assert report.parameters_before == report.parameters_after and report.macs_before == report.macs_after > 0


def test_it_was_trained_on_the_way(outcome, digits, spec):
    _, _, result, report, seen, work = outcome
    assert report.training["steps"] == 47 and report.training["accuracy_before"] > 0.8
    # The accuracy that the worker measured is that of the model that came back.
    validation = digits["validation"]
    assert training.accuracy(result.model, validation, spec) == pytest.approx(
        report.training["accuracy_after"], abs=0.02
    )
    assert report.training["accuracy_after"] > 0.7
    assert [step for step, _, _ in seen][:4] == [10, 20, 30, 40] and seen[-1][:2] == (47, 47)
    assert all(np.isfinite(facts["loss"]) for _, _, facts in seen) and 0 <= seen[-1][2]["validation"] <= 1
    assert not list(work.glob("exchange-*")), "the images are still there"
    assert (work / "log.txt").exists()


def test_what_was_left_alone_says_why(outcome):
    report = outcome[3]
    reasons = {skip.layer: skip.reason for skip in report.skipped}
    assert reasons["classes"] == reasons["stage1_block1_conv1"] == "excluded by the recipe"
    assert reasons["stem_bn"] == "not a kernel layer"
    assert not set(reasons) & set(report.touched)


def test_tfmot_stays_in_its_own_process(outcome):
    assert "tensorflow_model_optimization" not in sys.modules and "tf_keras" not in sys.modules
    assert "TF_USE_LEGACY_KERAS" not in os.environ


def test_no_layer_to_prune_is_an_error(digits, spec, trained, tmp_path):
    with pytest.raises(ModelRefused, match="No layer of the model can be pruned"):
        Prune(exclude=("*",), train=SHORT).apply(
            OptimizedModel(trained.model, spec), Context(digits, tmp_path, trained.model)
        )


def test_callbacks_cannot_cross(digits, spec, trained, tmp_path):
    context = Context(digits, tmp_path, trained.model, callbacks=[keras.callbacks.TerminateOnNaN()])
    with pytest.raises(RecipeError, match="TerminateOnNaN"):
        Prune(train=SHORT).apply(OptimizedModel(trained.model, spec), context)


def test_a_loss_from_python_cannot_cross(digits, spec, trained, tmp_path):
    technique = Prune(train=TrainConfig(steps=2, loss=lambda labels, outputs: 0.0))
    with pytest.raises(RecipeError, match="loss from Python"):
        technique.apply(OptimizedModel(trained.model, spec), Context(digits, tmp_path, trained.model))


def test_unsupported_layers_are_refused_before_anything_starts(digits, spec, tmp_path):
    model = keras.Sequential(
        [keras.Input(spec.shape), layers.Flatten(), layers.LayerNormalization(name="norm"), layers.Dense(10)]
    )
    with pytest.raises(ModelRefused, match="norm"):
        Prune(train=SHORT).apply(OptimizedModel(model, spec), Context(digits, tmp_path / "work", model))
    assert not (tmp_path / "work").exists()


def test_a_lost_zero_is_an_error():
    kernel = np.ones((10, 10), np.float32)
    kernel[:5] = 0
    prune._check("dense", kernel, 0.5)
    prune._check("dense", kernel, 0.505)  # half a weight: rounding
    with pytest.raises(TrainingError, match="dense lost zeros"):
        prune._check("dense", kernel, 0.55)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is out of range"),
        ({"sparsity": 0}, "does nothing"),
        ({"sparsity": "half"}, "sparsity is out of range"),
        ({"initial_sparsity": 0.6}, "initial_sparsity is above sparsity"),
        ({"begin": 0.5, "end": 0.5}, "ends before it begins"),
        ({"end": 1.5}, "end is out of range"),
        ({"frequency": 0}, "frequency"),
        ({"frequency": 2.5}, "frequency"),
        ({"train": {"patience": 2}}, "cannot end early"),
        ({"train": {"callbacks": [{"EarlyStopping": {}}]}}, "cannot end early"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make("prune", settings)


def test_the_ramp_always_ends_at_its_target():
    """Whatever the steps, TFMOT changes the masks on the ramp's last step, within the training."""
    code = """
import itertools
from tfopt.tfmot.pruning import schedule
cases = itertools.product((1, 2, 7, 100, 333), (0.0, 0.3, 0.9), (0.31, 0.75, 1.0), (1, 10, 64))
for steps, begin, end, frequency in cases:
    if end > begin:
        ramp = schedule(dict(sparsity=0.8, initial_sparsity=0.2, begin=begin, end=end, frequency=frequency), steps)
        last = max(step for step in range(1, steps + 1) if bool(ramp(step)[0]))
        assert abs(float(ramp(last)[1]) - 0.8) < 1e-6, (steps, begin, end, frequency)
ramp = schedule(dict(sparsity=0.8, initial_sparsity=0.2, begin=0.0, end=1.0, frequency=1), 100)
assert abs(float(ramp(50)[1]) - (0.8 + (0.2 - 0.8) * 0.5**3)) < 1e-6
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "TF_USE_LEGACY_KERAS": "1"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
