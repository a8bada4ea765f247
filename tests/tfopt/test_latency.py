"""Tables of what layers cost, and channels chosen by them."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest

from tfopt.channels import check, choose, cut, dependencies, importance
from tfopt.channels.latency import to_latency
from tfopt.errors import InputError, ModelRefused
from tfopt.latency import micro, table
from tfopt.latency.micro import Place
from tfopt.technique import Context, OptimizedModel
from tfopt.techniques.narrow import Narrow
from tfopt.training import TrainConfig

kinds = keras.layers


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12, 12, 3))
    x = kinds.Conv2D(16, 3, padding="same", name="stem")(inputs)
    x = kinds.BatchNormalization()(x)
    y = kinds.DepthwiseConv2D(3, padding="same", name="along")(x)
    y = kinds.Conv2D(16, 1, name="back")(y)
    x = kinds.ReLU()(kinds.Add()([x, y]))
    x = kinds.Conv2D(32, 3, strides=2, padding="same", name="wide")(x)
    x = kinds.GlobalAveragePooling2D()(x)
    return check.randomized(keras.Model(inputs, kinds.Dense(4, activation="softmax", name="classes")(x)))


def pretend(monkeypatch, cost):
    """A machine whose times are known: cost(layer's config, channels in, channels out) in milliseconds."""
    known = {}

    def convert(models, scheme, folder):
        files = {}
        for number, (name, model) in enumerate(models.items()):
            layer = model.layers[0]
            shapes = int(model.input_shape[-1]), int(model.output_shape[-1])
            known[number] = cost(name[0], type(layer).__name__, *shapes)
            files[name] = number
        return files

    monkeypatch.setattr(micro, "convert", convert)
    monkeypatch.setattr(micro, "times", lambda files, place, tell=None: [known[number] for number in files])


def areas(name, kind, inputs, outputs):
    return 0.001 * (outputs if kind == "DepthwiseConv2D" else inputs * outputs) * (10 if name == "wide" else 1)


def test_the_sum_of_the_table_follows_every_choice(monkeypatch, tmp_path):
    pretend(monkeypatch, areas)
    found = dependencies.analyze(network())
    made = table.measure(found, Place(), tmp_path)
    assert set(made.layers) == {"stem", "along", "back", "wide", "classes"}
    predictor = table.Predictor(found, made)
    expected = lambda a, b: 0.001 * (3 * a + a + a * a + 10 * a * b + b * 4)
    sizes = {group.name: number for number, group in enumerate(found.groups)}
    assert set(sizes) == {"stem", "wide"}
    for a, b in itertools.product((16, 12, 8, 4), (32, 24, 16, 8)):
        counts = [0, 0]
        counts[sizes["stem"]], counts[sizes["wide"]] = a, b
        assert predictor.ms(counts) == pytest.approx(expected(a, b))


def test_between_two_points_time_is_linear_and_one_point_is_proportional():
    row = table.Row((8, 16), (8, 16), np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert row.at(12, 12) == pytest.approx(2.5) and row.at(8, 16) == 2.0
    assert table.Row((8,), (16,), np.array([[4.0]]), proportional=True).at(4, 8) == 1.0


@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.3])
def test_the_least_important_channels_go_where_time_is_saved(monkeypatch, tmp_path, fraction):
    """Against all choices there are: within the budget, and no other loses less than a hundredth less."""
    pretend(monkeypatch, areas)
    model = network()
    found = dependencies.analyze(model)
    made = table.measure(found, Place(), tmp_path)
    predictor = table.Predictor(found, made)
    scores = importance.scores(found, "l1")
    whole = predictor.ms([len(group) for group in found.groups])
    removed = to_latency(found, scores, fraction * whole, made, multiple=4)
    left = [len(group) - len(set(group.units.tolist()) & set(removed)) for group in found.groups]
    assert predictor.ms(left) <= fraction * whole
    values = importance.comparable(found, scores, "l1")
    lost = lambda counts: sum(
        np.sort(values[group.units])[: len(group) - count].sum() for group, count in zip(found.groups, counts)
    )
    ways = itertools.product(*(choose.allowed(group, 4) for group in found.groups))
    best = min(lost(counts) for counts in ways if predictor.ms(counts) <= fraction * whole)
    assert lost(left) <= 1.01 * best + 1e-9
    smaller = cut.cut(found, removed)
    assert check.exactness(found, removed, smaller) < 1e-5


def test_so_little_time_is_refused(monkeypatch, tmp_path):
    pretend(monkeypatch, areas)
    found = dependencies.analyze(network())
    made = table.measure(found, Place(), tmp_path)
    with pytest.raises(ModelRefused, match="at least"):
        to_latency(found, importance.scores(found, "l1"), 1e-6, made)


def test_the_step_removes_channels_by_time(monkeypatch, digits, spec, trained, tmp_path):
    pretend(monkeypatch, areas)
    said = []
    technique = Narrow(latency=0.6, importance="l1", train=TrainConfig(steps=1, validation_images=20))
    context = Context(digits.limited(100, 20), tmp_path, teacher=trained.model, progress=lambda *f: said.append(f))
    _, report = technique.apply(OptimizedModel(trained.model, spec), context)
    times = report.properties["latency"]
    assert 0.3 * times["kernels_before_ms"] < times["kernels_after_ms"] <= 0.6 * times["kernels_before_ms"]
    assert said[0][2] == {"what": "converting layers"}


def test_micro_models_are_really_timed(tmp_path):
    """On the machine at hand, whatever it says: a large layer takes longer than a small one."""
    small = micro.chain([kinds.Conv2D(8, 1)], (4, 4, 8))
    large = micro.chain([kinds.Conv2D(256, 3)], (32, 32, 128))
    for scheme in micro.SCHEMES:
        files = micro.convert({"small": small, "large": large}, scheme, tmp_path / scheme)
        less, more = micro.times(list(files.values()), Place(scheme=scheme), seconds=0.1)
        assert 0 < 5 * less < more


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"latency": 1.0}, "latency"), ({"latency": "half"}, "latency"), ({"latency": 0.5, "macs": 0.5}, "Both"),
        ({"scheme": "float16", "latency": 0.5}, "scheme"), ({"target": 3}, "target"), ({"threads": 0}, "threads"),
        ({"latency": 0.5, "layers": {"stem": 0.1}}, "without macs and latency"),
    ],
)  # fmt: skip
def test_bad_settings(values, words):
    with pytest.raises(InputError, match=words):
        Narrow(**values)


def test_a_target_that_is_none_is_refused_first(digits, spec, trained, tmp_path):
    context = Context(digits, tmp_path, teacher=trained.model)
    with pytest.raises(InputError, match="target"):
        Narrow(latency=0.5, target="nowhere").apply(OptimizedModel(trained.model, spec), context)
