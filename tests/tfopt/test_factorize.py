from __future__ import annotations

from types import SimpleNamespace

import keras
import numpy as np
import pytest

from tfopt import graph
from tfopt.convert import convert
from tfopt.errors import InputError, ModelRefused
from tfopt.latency import micro
from tfopt.lowrank import search
from tfopt.lowrank.layers import Factorable
from tfopt.technique import Context, OptimizedModel, Property
from tfopt.techniques.factorize import Factorize
from tfopt.training import TrainConfig


def test_a_low_rank_kernel_is_found_and_the_model_really_shrinks(digits, spec, trained, tmp_path):
    model = graph.rewrite(trained.model)
    layer = model.get_layer("stage3_block1_conv2")
    kernel = layer.get_weights()[0]
    left, values, right = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), full_matrices=False)
    layer.set_weights([((left[:, :4] * values[:4]) @ right[:4]).reshape(kernel.shape)])
    technique = Factorize(method="channel", energy=0.9999, train=TrainConfig(steps=3, learning_rate=1e-4))
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


def test_layers_of_nested_models_are_decomposed(digits, spec, tmp_path):
    keras.utils.set_random_seed(0)
    head = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(32, name="wide")], name="head")
    image = keras.Input(spec.shape)
    model = keras.Model(image, keras.layers.Dense(10, activation="softmax", name="last")(head(image)))
    short = TrainConfig(steps=2, batch_size=16, evaluations=1, validation_images=20)
    result, report = Factorize(rank_ratio=0.1, exclude=("last",), train=short).apply(
        OptimizedModel(model, spec), Context(digits, tmp_path, model)
    )
    assert report.touched == ("wide",) and report.macs_after < report.macs_before / 2
    assert "head" in [layer.name for layer in result.model.layers]


def test_excluded_layers_are_reported(digits, spec, trained, tmp_path):
    choice, skipped = planned(trained, digits, spec, tmp_path, rank_ratio=0.3, exclude=("stage3*",))
    excluded = {skip.layer for skip in skipped if skip.reason == "excluded by the recipe"}
    assert "stage3_block1_conv1" in excluded
    assert choice.candidates and not any(name.startswith("stage3") for name in choice.candidates)


def test_nothing_to_gain_is_a_refusal_not_a_copy(digits, spec, trained, tmp_path):
    with pytest.raises(ModelRefused, match="No kernel of the model gains"):
        Factorize(energy=1.0).apply(
            OptimizedModel(trained.model, spec), Context(digits, tmp_path, teacher=trained.model)
        )


def planned(trained, digits, spec, tmp_path, progress=None, **settings):
    context = Context(digits, tmp_path, teacher=trained.model, progress=progress)
    return Factorize(**settings).plan(OptimizedModel(trained.model, spec), context)


def macs_left(model, choice):
    layers = {layer.name: macs for layer, macs in graph.macs_of_calls(model)}
    return sum(layers.values()) + sum(c.macs - layers[name] for name, c in choice.candidates.items())


@pytest.mark.parametrize("method", ["spatial", "tucker", "cp"])
def test_each_method_gives_a_model_that_saves_and_converts(method, digits, spec, trained, tmp_path):
    """One layer of each, built as the step builds it."""
    others = [layer.name for layer in graph.flat_layers(trained.model) if layer.name != "stage2_block1_conv2"]
    exclude = [name for name in others if name.endswith(("conv1", "conv2", "shortcut", "stem", "classes"))]
    ranks = {"stage2_block1_conv2": [8, 8] if method == "tucker" else 8}
    technique = Factorize(method=method, ranks=ranks, exclude=exclude, train=TrainConfig(steps=1))
    result, report = technique.apply(
        OptimizedModel(trained.model, spec), Context(digits.limited(64, 64), tmp_path, teacher=trained.model)
    )
    assert report.properties["methods"] == {"stage2_block1_conv2": method}
    with graph.uncompiled(result.model):
        result.model.save(tmp_path / "model.keras")
    (made,) = convert(tmp_path / "model.keras", spec, ["float32"], tmp_path, work=tmp_path)
    assert made.within_tolerance and report.macs_after < report.macs_before


def test_a_number_of_macs_is_met_and_shared_out(digits, spec, trained, tmp_path):
    choice, _ = planned(trained, digits, spec, tmp_path, macs=0.6)
    whole = graph.count_macs(trained.model)
    assert 0.4 * whole < macs_left(trained.model, choice) <= 0.6 * whole
    assert len({candidate.error for candidate in choice.candidates.values()}) > 1
    with pytest.raises(InputError, match="cannot be reached"):
        planned(trained, digits, spec, tmp_path, macs=0.001)


def test_variational_bayes_and_data_find_ranks(digits, spec, trained, tmp_path):
    choice, _ = planned(trained, digits, spec, tmp_path, vbmf=True, keep="all")
    assert all(rank >= 1 for candidate in choice.candidates.values() for rank in candidate.ranks)
    choice, _ = planned(trained, digits, spec, tmp_path, data=True, images=100)
    assert all(c.by_data and c.method == "channel" and c.error <= 0.1 for c in choice.candidates.values())


def verdicts(*names):
    return [SimpleNamespace(reference_ms=1.0, median_ms=1.1, ratio=1.1, low=1.0, high=1.2, verdict=v) for v in names]


def test_what_is_not_faster_on_the_target_is_dropped_and_said(digits, spec, trained, tmp_path, monkeypatch):
    said, raced = [], []
    # A layer and its chain, one after the other.
    known = ["faster", "slower", "cannot tell"]
    monkeypatch.setattr(micro, "convert", lambda models, scheme, folder: dict(zip(models, range(len(models)))))
    monkeypatch.setattr(micro, "race", lambda files, place: raced.append(files) or verdicts(known[files[0] // 2 % 3]))
    for keep, allowed in (("faster", {"faster"}), ("smaller", {"faster", "cannot tell"})):
        settings = {"method": "channel", "rank_ratio": 0.3, "keep": keep}
        choice, skipped = planned(trained, digits, spec, tmp_path, lambda *facts: said.append(facts), **settings)
        assert {choice.times[name].verdict for name in choice.candidates} == allowed
        dropped = [skip for skip in skipped if skip.reason == "not faster on the target"]
        assert dropped and all("1.1 ms against 1 ms" in skip.detail for skip in dropped)
        assert not {skip.layer for skip in dropped} & set(choice.candidates)
    assert all(len(files) == 2 for files in raced) and said[0][2]["what"] == "timing layers"


def test_measured_time_is_a_budget(digits, spec, trained, tmp_path, monkeypatch):
    """An eighth of the ranks takes 0.3 of the layer's time, half of them 0.7."""
    monkeypatch.setattr(search, "_TIMED_SHARES", (0.125, 0.5))
    monkeypatch.setattr(micro, "convert", lambda models, scheme, folder: dict.fromkeys(models, "file"))
    rows = [SimpleNamespace(reference_ms=1, median_ms=r, ratio=r, low=r, high=r, verdict="faster") for r in (0.3, 0.7)]
    monkeypatch.setattr(micro, "race", lambda files, place: rows[: len(files) - 1])
    choice, skipped = planned(trained, digits, spec, tmp_path, method="channel", latency=0.6)
    whole = sum(skip.reason == "kept whole within the budget" for skip in skipped)
    layers = len(choice.times) + whole
    assert sum(timed.ratio for timed in choice.times.values()) + whole <= 0.6 * layers + 1e-9
    with pytest.raises(InputError, match="does not bring the layers"):
        planned(trained, digits, spec, tmp_path, method="channel", latency=0.1)


def test_a_layer_is_really_timed_beside_its_chain(digits, spec, trained, tmp_path):
    """On the machine at hand, whatever it says."""
    choice, _ = planned(trained, digits, spec, tmp_path, method="channel", ranks={"stage3_block1_conv2": 4}, keep="all")
    one = choice.candidates["stage3_block1_conv2"]
    layer = trained.model.get_layer("stage3_block1_conv2")
    shapes = [(before, after) for operation, before, after in graph.calls(trained.model) if operation is layer]
    (timed,) = search.race({"x": (Factorable(layer, shapes), [one])}, micro.Place(seconds=1.0), tmp_path)["x"]
    assert 0 < timed.low <= timed.ratio <= timed.high and timed.before_ms > 0 < timed.after_ms
    assert timed.verdict in ("faster", "slower", "cannot tell")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"energy": 0.8, "macs": 0.5}, "energy and macs"), ({"vbmf": True, "rank_ratio": 0.5}, "rank_ratio and vbmf"),
        ({"method": "tuker"}, "Did you mean tucker"), ({"keep": "fast"}, "faster"), ({"macs": 1.0}, "below 1"),
        ({"method": "spatial", "data": True}, "channel"), ({"method": "cp", "vbmf": True}, "variational"),
        ({"ranks": {"stem": 0}}, "stem"), ({"ranks": [1]}, "table"), ({"exclude": 3}, "list"),
        ({"images": 0}, "images"), ({"vbmf": 1}, "true nor false"), ({"scheme": "int4"}, "scheme"),
        ({"target": ""}, "target"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        Factorize(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ranks": {"stage3_block1_conv2": 9999}}, "stage3_block1_conv2"),
        ({"ranks": {"stem": [4, 4]}, "method": "channel"}, "one number, 1 to 8, for channel"),
        ({"ranks": {"stem": 2}, "exclude": ["stem"]}, "Layer stem has no rank to set: excluded"),
        ({"ranks": {"stge3": 4}}, "layer with a kernel"), ({"exclude": ["nothing*"]}, "layer with a kernel"),
        ({"keep": "faster", "target": "nowhere"}, "target"),
    ],
)  # fmt: skip
def test_refused_before_any_training(values, words, digits, spec, trained, tmp_path):
    with pytest.raises(InputError, match=words):
        planned(trained, digits, spec, tmp_path, **values)


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
