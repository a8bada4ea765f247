"""Pruning by TFMOT in its worker, on a classifier of real digits."""

from __future__ import annotations

import dataclasses
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
from tfopt.tfmot import kernels
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
        [keras.Input(spec.shape), layers.Flatten(), layers.Lambda(lambda x: 2 * x, name="twice"), layers.Dense(10)]
    )
    with pytest.raises(ModelRefused, match="twice"):
        Prune(train=SHORT).apply(OptimizedModel(model, spec), Context(digits, tmp_path / "work", model))
    assert not (tmp_path / "work").exists()


def kernel_of(values, kind="Dense"):
    return kernels.Kernel("k:0", "dense", kind, values, ("dense", "dense", kind), {})


def test_a_lost_zero_is_an_error():
    values = np.ones((10, 10), np.float32)
    values[:5] = 0
    kernel = kernel_of(values)
    prune._check(kernel, values, 0.5)
    prune._check(kernel, values, 0.505)  # half a weight: rounding
    with pytest.raises(TrainingError, match="dense lost zeros"):
        prune._check(kernel, values, 0.55)
    prune._check(kernel, values, 0.5, block=(5, 2))
    prune._check(kernel, values, 0.5, m_by_n=(1, 10))
    with pytest.raises(TrainingError, match="dense lost zeros"):
        prune._check(kernel, values, 0.5, m_by_n=(2, 4))  # the last rows have none
    with pytest.raises(TrainingError, match="dense lost zeros"):
        prune._check(kernel, np.eye(10, dtype=np.float32), 0.9, block=(5, 5))  # as many zeros, not in blocks


def test_one_threshold_for_all_layers():
    rng = np.random.default_rng(0)
    arrays = {"large": rng.normal(0, 1, (50, 50)), "small": rng.normal(0, 0.1, (50, 50)), "few": np.full((2, 2), 9.0)}
    shares = prune.global_shares(arrays, 0.6)
    zeros = sum(share * arrays[key].size for key, share in shares.items())
    assert zeros == pytest.approx(0.6 * 5004, abs=1)
    assert shares["small"] == prune.MOST_OF_A_LAYER and shares["large"] < 0.25 and shares["few"] == 0
    everything = np.concatenate([np.abs(arrays["small"]).ravel(), np.abs(arrays["large"]).ravel()])
    shares = prune.global_shares({key: arrays[key] for key in ("large", "small")}, 0.3)
    threshold = np.quantile(everything, 0.3)
    assert shares["large"] == pytest.approx(np.mean(np.abs(arrays["large"]) <= threshold), abs=1e-3)


def test_settings_by_name_pattern_and_type(trained, digits, spec, tmp_path):
    model = trained.model
    technique = Prune(
        sparsity=0.5, layers={"Conv2D": 0.3, "stage2_*": 0.7, "stage2_block1_conv1": 0.2, "Dense": 0}, train=SHORT
    )
    found, skipped = technique._choose(model)
    wanted, _ = technique._allot(found, OptimizedModel(model, spec), Context(digits, tmp_path, model))
    by_layer = {kernel.layer: wanted[kernel.key] for kernel in found}
    assert by_layer["stem"] == 0.3 and by_layer["stage2_block1_conv1"] == 0.2
    assert by_layer["stage2_block1_conv2"] == 0.7 and "classes" not in by_layer
    assert any(skip.layer == "classes" and skip.detail == "sparsity 0" for skip in skipped)


def test_the_name_of_a_nested_model_means_all_in_it(digits, spec, tmp_path):
    part = keras.Sequential([keras.layers.Conv2D(8, 3), keras.layers.Conv2D(8, 3)], name="part")
    whole = keras.Sequential([part, keras.layers.Flatten()], name="whole")
    image = keras.Input(spec.shape)
    model = keras.Model(
        image, keras.layers.Dense(10, name="last")(whole(keras.layers.Conv2D(8, 3, name="first")(image)))
    )
    technique = Prune(sparsity=0.5, layers={"whole": 0.75}, train=SHORT)
    found, _ = technique._choose(model)
    wanted, _ = technique._allot(found, OptimizedModel(model, spec), Context(digits, tmp_path, model))
    assert [wanted[kernel.key] for kernel in found] == [0.5, 0.75, 0.75, 0.5]
    assert [kernel.layer for kernel in Prune(exclude=["part"])._choose(model)[0]] == ["first", "last"]


def test_a_model_that_is_frozen_is_told_so(digits, spec, trained, tmp_path):
    trained.model.trainable = False
    try:
        with pytest.raises(ModelRefused, match=r"can be pruned.*Set trainable = True on stem and"):
            Prune(train=SHORT).apply(OptimizedModel(trained.model, spec), Context(digits, tmp_path, trained.model))
    finally:
        trained.model.trainable = True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude": ["stagge1_block1_conv1"]}, "Did you mean stage1_block1_conv1"),
        ({"layers": {"head": 0.3}}, "'head'"),
    ],
)
def test_a_name_that_fits_no_layer_is_refused_with_near_ones(trained, digits, spec, tmp_path, settings, message):
    work = tmp_path / "work"
    with pytest.raises(InputError, match="no layer of the model of that name") as caught:
        Prune(train=SHORT, **settings).apply(OptimizedModel(trained.model, spec), Context(digits, work, trained.model))
    assert message in str(caught.value) and not work.exists()


def test_weights_that_are_no_numbers_and_a_single_class_are_refused(trained, digits, spec, tmp_path):
    model, work = trained.model, tmp_path / "work"
    one = digits["train"].subset(np.flatnonzero(digits["train"].labels == 3))
    alone = dataclasses.replace(digits, splits={**digits.splits, "train": one})
    with pytest.raises(InputError, match="all of one class"):
        Prune(train=SHORT).apply(OptimizedModel(model, spec), Context(alone, work, model))
    stem = model.get_layer("stem")
    stem.kernel.assign(np.full(stem.kernel.shape, np.nan, np.float32))
    for technique in (Prune(train=SHORT), make("qat", {}), make("cluster", {})):
        with pytest.raises(ModelRefused, match="Layer stem of the model has weights that are not finite"):
            technique.apply(OptimizedModel(model, spec), Context(digits, work, model))
    assert not work.exists()


def test_sensitivity_gives_each_layer_its_sparsity(trained, digits, spec, tmp_path):
    model = trained.model
    technique = Prune(sparsity="sensitivity", max_drop=0.02, exclude=("stage*",), train=SHORT)
    found, _ = technique._choose(model)
    context = Context(digits, tmp_path, model)
    wanted, facts = technique._allot(found, OptimizedModel(model, spec), context)
    assert set(facts["sensitivity"]) == {"stem", "classes"} and len(facts["sensitivity"]["stem"]) == 10
    generous, _ = dataclasses.replace(technique, max_drop=0.99)._allot(found, OptimizedModel(model, spec), context)
    assert all(0 <= wanted[key] <= generous[key] == 0.95 for key in generous)


def test_early_stopping_waits_for_the_end_of_the_ramp(trained, digits, spec):
    config = TrainConfig(steps=16, batch_size=8, learning_rate=1e-9, evaluations=8, patience=1, validation_images=20)
    report = training.fit(trained.model, digits["train"], digits["validation"], spec, config, keras=keras, settled=9)
    assert report.steps == 12, "the evaluation at 10 counts, the one at 12 is no better"


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
        ({"train": {"callbacks": [{"EarlyStopping": {}}]}}, "before the end of the ramp"),
        ({"sparsity": -0.1}, "sparsity is out of range"),
        ({"layers": {"stem": 1.0}}, "The sparsity of stem is out of range"),
        ({"layers": ["stem"]}, "not a table"),
        ({"m_by_n": [4, 4]}, "m_by_n is no such pair"),
        ({"m_by_n": 2}, "m_by_n is no such pair"),
        ({"m_by_n": [2, 4], "sparsity": 0.75}, "says by itself"),
        ({"m_by_n": [2, 4], "block": [4, 1]}, "says by itself"),
        ({"block": [1, 1]}, "block is no such pair"),
        ({"schedule": "linear"}, "no schedule of that name"),
        ({"scope": "model"}, "no scope of that name"),
        ({"policy": "edgetpu"}, "no policy of that name"),
        ({"power": 0}, "power is out of range"),
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


def test_patterns_that_tfmot_has_not():
    """Masks of TFMOT's own code and of ours, on one weight array of each kind, without a training."""
    code = """
import numpy as np
import tensorflow as tf
from tfopt.tfmot.neutral import Call, Graph, Node
from tfopt.tfmot.pruning import Pruner

rng = np.random.default_rng(0)
shapes = {"conv": (3, 3, 6, 8), "deep": (3, 3, 8, 1), "point": (1, 1, 8, 7), "up": (2, 2, 4, 7)}
kinds = {"conv": ("Conv2D", dict(filters=8, kernel_size=3)), "deep": ("DepthwiseConv2D", dict(kernel_size=3)),
         "point": ("Conv2D", dict(filters=7, kernel_size=1)), "up": ("Conv2DTranspose", dict(filters=4, kernel_size=2))}
nodes = tuple(Node(n, k, {**c, "use_bias": False}, (n + ":0",), n) for n, (k, c) in kinds.items())
graph = Graph("m", ((12, 12, 6),), nodes, tuple(Call(n.name, (i,), i + 1) for i, n in enumerate(nodes)), (4,))
weights = {n + ":0": rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}

def pruned(**settings):
    ramp = dict(sparsity=0.5, initial_sparsity=0.0, begin=0.0, end=1.0, frequency=1)
    pruner = Pruner(graph, weights, {**ramp, "kernels": {key: 0.5 for key in weights}, **settings}, 2)
    for wrapper in pruner._wrappers:
        wrapper.pruning_step.assign(1 if settings.get("m_by_n") else 2)
        wrapper.pruning_obj.conditional_mask_update()
    return pruner, {key: array == 0 for key, array in pruner.weights().items()}

pruner, zero = pruned()
assert all(abs(z.mean() - 0.5) < 0.01 for z in zero.values()), {k: z.mean() for k, z in zero.items()}
_, zero = pruned(m_by_n=[2, 4])
groups = lambda z, axis: np.moveaxis(z, axis, -1).reshape(-1, z.shape[axis])
for key, axis in (("conv:0", 2), ("deep:0", 2), ("point:0", 2), ("up:0", 3)):
    rows = groups(zero[key], axis)
    full = rows.shape[1] // 4 * 4
    assert np.all(rows[:, :full].reshape(len(rows), -1, 4).sum(-1) == 2), key
smallest = np.sort(np.abs(weights["point:0"][0, 0, :4]), axis=0)[1]
assert np.array_equal(zero["point:0"][0, 0, :4], np.abs(weights["point:0"][0, 0, :4]) <= smallest)
for pool in ("AVG", "MAX"):
    _, zero = pruned(block=[4, 2], pool=pool, kernels={"conv:0": 0.5, "point:0": 0.5})
    assert not zero["deep:0"].any()
    for place in zero["conv:0"].reshape(9, 6, 8):
        for rows in (slice(0, 4), slice(4, 6)):
            for column in range(0, 8, 2):
                assert place[rows, column : column + 2].all() or not place[rows, column : column + 2].any()
    assert 0.4 < zero["conv:0"].mean() < 0.6
print("fine")
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "TF_USE_LEGACY_KERAS": "1"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("fits", [True, False])
def test_the_policy_says_whether_xnnpack_takes_the_file(tmp_path, fits):
    from mobile_bench.inputs import InputSpec
    from tfopt import data

    image = keras.Input((16, 16, 3))
    x = layers.ZeroPadding2D(1)(image) if fits else image
    x = layers.Conv2D(16, 3, strides=2, use_bias=False, padding="valid" if fits else "same", name="stem")(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(64, 1, name="expand")(x)
    x = layers.ReLU()(layers.DepthwiseConv2D(3, padding="same", name="deep")(x))
    x = layers.Conv2D(64, 1, activation="relu" if fits else "tanh", name="project")(x)
    x = layers.Flatten()(layers.GlobalAveragePooling2D(keepdims=True)(x))
    model = keras.Model(image, layers.Dense(2, activation="softmax", name="classes")(x))
    rng = np.random.default_rng(0)
    images = data.from_arrays((rng.integers(0, 256, (200, 16, 16, 3)).astype(np.uint8), np.arange(200) % 2))
    technique = Prune(policy="xnnpack", sparsity=0.8, train=dataclasses.replace(SHORT, steps=6, batch_size=8))
    _, report = technique.apply(OptimizedModel(model, InputSpec(16, 16, 3)), Context(images, tmp_path, model))
    assert set(report.touched) == {"expand", "project"}
    found = report.properties["xnnpack"]
    assert found["eligible"] is fits and any("not measured here" in note for note in report.notes)
    if fits:
        assert found["missing"] == [] and found["policy"] == "the whole model is supported"
    else:
        assert "TANH" in found["missing"][-1] and "Could not find `Conv2D 3x3`" in found["policy"]
