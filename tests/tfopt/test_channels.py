"""Removing channels removes them and nothing else: on odd graphs, on random graphs, and where it must refuse."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tfopt.odd_graphs import GRAPHS
from tfopt.channels import check, cut, dependencies
from tfopt.channels.rules import rule
from tfopt.errors import InputError, ModelRefused

L, ops = keras.layers, keras.ops


def some_of_each(found, share, seed=0):
    rng = np.random.default_rng(seed)
    return [unit for group in found.groups for unit in rng.permutation(group.units)[: int(len(group) * share)]]


def model_of(name, seed=0):
    keras.utils.set_random_seed(seed)
    return check.randomized(GRAPHS[name](), seed)


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_smaller_model_is_the_one_in_which_nothing_reads_the_channels(name, share):
    model = model_of(name)
    found = dependencies.analyze(model)
    removed = some_of_each(found, share)
    smaller = cut.cut(found, removed)
    images = check.random_inputs(model, 4)
    silenced = check.silenced(found, removed)
    assert check.difference(silenced, smaller, images) < 1e-5
    # The test would mean nothing if these channels did not matter.
    assert check.difference(model, silenced, images) > 1e-3
    report = cut.report(found, smaller, removed)
    assert report.parameters_after == smaller.count_params() < report.parameters_before
    assert report.macs_after < report.macs_before
    assert all(after < before for before, after in report.layers.values())


@pytest.mark.parametrize("name", GRAPHS)
def test_form_and_names_stay_and_the_file_holds_it(name, tmp_path):
    model = model_of(name)
    before = [weight.copy() for weight in model.get_weights()]
    found = dependencies.analyze(model)
    smaller = cut.cut(found, some_of_each(found, 0.5))
    shapes = lambda m: keras.tree.map_structure(lambda t: (t.shape, t.dtype), (m.input, m.output))
    assert shapes(smaller) == shapes(model)
    assert {layer.name for layer in smaller.layers} == {layer.name for layer in model.layers}
    assert smaller.name == model.name
    smaller.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert check.difference(smaller, again, check.random_inputs(model)) == 0
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)
    # What was cut can be cut again.
    twice = dependencies.analyze(again)
    removed = some_of_each(twice, 0.3)
    assert check.exactness(twice, removed, cut.cut(twice, removed)) < 1e-5


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_removed_is_the_same_model(name):
    model = model_of(name)
    same = cut.cut(dependencies.analyze(model), [])
    assert check.difference(model, same, check.random_inputs(model)) == 0


@st.composite
def programs(draw):
    """Steps of (operation, which earlier tensors it takes, a number)."""
    operation = st.sampled_from(
        ["conv", "conv", "depthwise", "separable", "grouped", "norm", "activation", "add", "gate", "concatenate",
         "slice", "pad", "shuffle", "group_norm", "twice"]
    )  # fmt: skip
    step = st.tuples(operation, st.integers(0, 50), st.integers(0, 50), st.integers(1, 6))
    return draw(st.lists(step, min_size=3, max_size=12))


def built(program):
    """A model of 8 x 8 images from a program. Tensors are (8, 8, channels); channels are a multiple of 4."""
    image = keras.Input((8, 8, 3))
    shared = L.Conv2D(8, 1, name="shared")
    made = [L.Conv2D(8, 3, padding="same")(image)]
    for kind, one, other, number in program:
        x, y = made[one % len(made)], made[other % len(made)]
        channels = x.shape[-1]
        if kind == "conv":
            x = L.Conv2D(4 * number, 1 + 2 * (number % 2), padding="same", activation="relu")(x)
        elif kind == "depthwise":
            x = L.DepthwiseConv2D(3, padding="same", depth_multiplier=1 + number % 2)(x)
        elif kind == "separable":
            x = L.SeparableConv2D(4 * number, 3, padding="same")(x)
        elif kind == "grouped":
            x = L.Conv2D(4 * number, 1, groups=2 * (1 + number % 2))(x)
        elif kind == "norm":
            x = L.BatchNormalization()(x)
        elif kind == "activation":
            x = L.PReLU(shared_axes=[1, 2] if number % 2 else None)(x)
        elif kind == "add":
            x = L.Add()([x, y if y.shape[-1] == channels else L.Conv2D(channels, 1)(y)])
        elif kind == "gate":
            x = L.Multiply()([x, L.Dense(channels, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(y))])
        elif kind == "concatenate":
            x = L.Concatenate()([x, y] if number % 2 else [x, y, x])
        elif kind == "slice" and channels >= 8:
            x = x[..., 2 : channels - 2]
        elif kind == "pad":
            x = ops.pad(x, ((0, 0), (0, 0), (0, 0), (2, number * 4 - 2)))
        elif kind == "shuffle":
            x = ops.reshape(L.Permute((1, 2, 4, 3))(L.Reshape((8, 8, 2, channels // 2))(x)), (-1, 8, 8, channels))
        elif kind == "group_norm":
            x = L.GroupNormalization(2 * (1 + number % 2))(x)
        elif kind == "twice":
            x = L.Subtract()([shared(L.Conv2D(8, 1)(x)), shared(L.Conv2D(8, 1)(y))])
        if x.shape[-1] <= 96:
            made.append(x)
    ends = [L.Flatten()(made[-1]), L.GlobalAveragePooling2D()(made[len(made) // 2])]
    return keras.Model(image, L.Dense(3)(L.Concatenate()(ends)))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(programs(), st.integers(0, 1000))
def test_random_graphs(program, seed):
    keras.utils.set_random_seed(seed)
    model = check.randomized(built(program), seed)
    found = dependencies.analyze(model)
    rng = np.random.default_rng(seed)
    removed = [u for g in found.groups for u in rng.permutation(g.units)[: rng.integers(0, len(g))]]
    smaller = cut.cut(found, removed)
    assert check.exactness(found, removed, smaller, seed) < 1e-5


def test_a_chain_loses_what_is_asked_and_its_end_stays():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            L.Conv2D(16, 3, name="one"),
            L.Conv2D(8, 3, name="two"),
            L.Flatten(),
            L.Dense(4, name="end"),
        ]
    )
    found = dependencies.analyze(model)
    assert [(group.name, len(group)) for group in found.groups] == [("one", 16), ("two", 8)]
    removed = [*found.groups[0].units[:5], *found.groups[1].units[2:4]]
    smaller = cut.cut(found, removed)
    assert [layer.get_weights()[0].shape for layer in smaller.layers if layer.weights] == [
        (3, 3, 3, 11), (3, 3, 11, 6), (96, 4)
    ]  # fmt: skip
    np.testing.assert_array_equal(
        smaller.get_layer("one").get_weights()[0], model.get_layer("one").get_weights()[0][..., 5:]
    )
    (skip,) = cut.report(found, smaller, removed).skipped
    assert (skip.layer, skip.reason, skip.detail) == ("end", "first or last layer", "the model's output")


def test_additions_and_gates_tie_channels_and_concatenations_do_not():
    image = keras.Input((8, 8, 3))
    one, two = L.Conv2D(16, 1, name="one")(image), L.Conv2D(16, 1, name="two")(image)
    joined = L.Concatenate()([L.Add()([one, two]), L.Conv2D(8, 1, name="three")(image)])
    gate = L.Dense(24, name="gate")(L.GlobalAveragePooling2D()(image))
    found = dependencies.analyze(keras.Model(image, L.Conv2D(2, 1, name="end")(L.Multiply()([joined, gate]))))
    assert {frozenset(group.layers): len(group) for group in found.groups} == {
        frozenset({"one", "two", "gate"}): 16, frozenset({"three", "gate"}): 8
    }  # fmt: skip


def stay(layers, shape=(8, 8, 3)):
    """Reasons by layer, of Conv2D 'made', these layers, and a convolution behind them."""
    image = keras.Input(shape)
    x = L.Conv2D(16, 1, name="made")(image)
    for layer in layers:
        x = layer(x)
    model = keras.Model(image, L.Dense(2, name="end")(L.GlobalAveragePooling2D()(L.Conv2D(8, 1, name="after")(x))))
    found = dependencies.analyze(model)
    assert [group.name for group in found.groups][-1:] == ["after"]
    removed = some_of_each(found, 0.5)
    assert check.exactness(found, removed, cut.cut(found, removed)) < 1e-5
    return dict(found.stays())


@pytest.mark.parametrize(
    "layers, reason",
    [
        ([L.LayerNormalization(name="mean")], "mean .LayerNormalization. divides by a mean over them"),
        ([L.Softmax(name="soft")], "soft divides by a sum over them"),
        ([L.Activation("softmax", name="soft")], "soft is softmax, which mixes channels"),
        ([L.UnitNormalization(name="unit")], "divides by a mean"),
        ([L.Permute((3, 2, 1), name="turn"), L.Conv2D(8, 1, name="mix")], "mix reads another axis"),
        ([L.Reshape((64, 16)), L.MultiHeadAttention(2, 8, name="attend")], "attend"),
        ([L.Rescaling([0.1] * 16, name="scale")], "scale has a number for each"),
    ],
)
def test_what_needs_all_its_channels_keeps_them_and_says_why(layers, reason):
    import re

    if isinstance(layers[-1], L.MultiHeadAttention):
        attend = layers.pop()
        layers += [lambda x: attend(x, x), L.Reshape((8, 8, 16))]
    found = stay(layers)["made"]
    assert re.search(reason, found.detail)


def test_instance_and_group_norms_lose_whole_groups():
    image = keras.Input((8, 8, 3))
    x = L.GroupNormalization(4, name="four")(L.Conv2D(16, 1)(image))
    x = L.GroupNormalization(-1, name="each")(L.Conv2D(12, 1)(x))
    model = check.randomized(keras.Model(image, L.Conv2D(1, 1)(x)))
    found = dependencies.analyze(model)
    assert [(len(group), group.positions) for group in found.groups] == [(4, 4), (12, 1)]
    removed = some_of_each(found, 0.5)
    smaller = cut.cut(found, removed)
    assert check.exactness(found, removed, smaller) < 1e-5
    assert [smaller.get_layer(name).groups for name in ("four", "each")] == [2, 6]


def test_numbers_written_into_a_call_go_with_their_channels():
    image = keras.Input((8, 8, 3))
    x = L.Conv2D(12, 1)(image) * np.arange(12, dtype=np.float32) + np.ones((8, 8, 1), np.float32)
    model = keras.Model(image, L.Conv2D(1, 1)(x))
    found = dependencies.analyze(model)
    removed = some_of_each(found, 0.5)
    assert check.exactness(found, removed, cut.cut(found, removed)) < 1e-5


class Twice(L.Layer):
    def call(self, x):
        return x * 2


class Wide(L.Conv2D):
    pass


class Strange(L.Conv2D):
    def call(self, x):
        return ops.flip(super().call(x), -1)


def with_layer(layer):
    image = keras.Input((8, 8, 3))
    x = layer(L.Conv2D(16, 1, name="made")(image))
    return keras.Model(image, L.Conv2D(1, 1, name="end")(L.Conv2D(8, 1, name="after")(x)))


@pytest.mark.parametrize(
    "layer", [Twice(name="odd"), Strange(16, 1, name="odd"), L.Lambda(lambda x: x + 1, name="odd")]
)
def test_a_layer_that_nobody_described_is_refused_by_name_unless_excluded(layer):
    model = with_layer(layer)
    with pytest.raises(ModelRefused, match="odd of class"):
        dependencies.analyze(model)
    found = dependencies.analyze(model, exclude=["odd"])
    assert [group.name for group in found.groups] == ["after"]
    assert "odd" in dict(found.stays())["made"].detail


def test_a_derived_layer_that_computes_the_same_is_known():
    assert [g.name for g in dependencies.analyze(with_layer(Wide(16, 1, name="wide"))).groups] == [
        "made",
        "wide",
        "after",
    ]


def test_a_rule_of_ones_own():
    class Gain(L.Layer):
        def build(self, shape):
            self.gain = self.add_weight(shape=(shape[-1],), name="gain", initializer="random_normal")

        def call(self, x):
            return x * self.gain

    @rule(Gain)
    def _(walk, node):
        ids = walk.ids(node, -1)
        walk.use(node.operation, node.operation.gain, 0, ids, "along")
        return walk.label(node.input_tensors[0])

    found = dependencies.analyze(with_layer(Gain(name="gain")))
    removed = some_of_each(found, 0.5)
    smaller = cut.cut(found, removed)
    assert smaller.get_layer("gain").get_weights()[0].shape == (8,)
    assert check.exactness(found, removed, smaller) < 1e-5


def test_included_and_excluded_layers():
    model = with_layer(L.DepthwiseConv2D(3, name="deep"))
    names = lambda **chosen: [group.name for group in dependencies.analyze(model, **chosen).groups]
    assert names() == ["made", "after"]
    assert names(include=["aft*"]) == ["after"]
    assert names(exclude=["DepthwiseConv2D"]) == ["after"]
    found = dependencies.analyze(model, exclude=["made"])
    assert dict(found.stays())["made"].kind == "excluded by the recipe"
    with pytest.raises(InputError, match="There is no layer, type or pattern"):
        names(exclude=["nowhere*"])


def test_a_nested_model_is_included_and_excluded_by_its_name():
    inner_in = keras.Input((8, 8, 16))
    inner = keras.Model(inner_in, L.Conv2D(12, 1, name="inside")(inner_in), name="inner")
    model = with_layer(inner)
    names = lambda **chosen: [group.name for group in dependencies.analyze(model, **chosen).groups]
    assert names() == ["made", "inside", "after"]
    assert names(exclude=["inner"]) == ["made", "after"]
    assert names(include=["inner"]) == ["inside"]
    found = dependencies.analyze(model, include=["made"])
    smaller = cut.cut(found, some_of_each(found, 0.5))
    assert smaller.get_layer("inner").input_shape == (None, 8, 8, 8)


def test_an_initializer_of_the_old_shape_is_no_obstacle():
    values = np.random.default_rng(0).normal(size=(1, 1, 16, 8))
    model = with_layer(L.Conv2D(8, 1, kernel_initializer=keras.initializers.Constant(values), name="filled"))
    found = dependencies.analyze(model)
    removed = some_of_each(found, 0.5)
    assert check.exactness(found, removed, cut.cut(found, removed)) < 1e-5


def test_what_keras_cannot_build_is_refused():
    class Fixed(L.Layer):
        def call(self, x):
            return x + np.ones(16, np.float32)

    rule(Fixed)(lambda walk, node: walk.label(node.input_tensors[0]))
    found = dependencies.analyze(with_layer(Fixed(name="fixed")))
    with pytest.raises(ModelRefused, match="Keras cannot build"):
        cut.cut(found, some_of_each(found, 0.5))


def test_models_that_cannot_be_walked_are_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ModelRefused, match="no graph of layers"):
        dependencies.analyze(Own())
    with pytest.raises(ModelRefused, match="no graph of layers"):
        dependencies.analyze(keras.Sequential([L.Dense(3)]))
    with pytest.raises(ModelRefused, match="no graph of layers"):
        dependencies.analyze("model.keras")


def test_a_cut_that_cannot_be_is_refused():
    found = dependencies.analyze(with_layer(L.ReLU()))
    with pytest.raises(InputError, match="made would be left without a channel"):
        cut.cut(found, found.groups[0].units)
    with pytest.raises(InputError, match=r"cannot be removed.*input"):
        cut.cut(found, [0])


def test_halves_of_a_slice_both_keep_a_channel():
    image = keras.Input((8, 8, 3))
    x = L.Conv2D(16, 1, name="made")(image)
    one, two = L.Conv2D(4, 1)(x[..., :8]), L.Conv2D(4, 1)(x[..., 8:])
    found = dependencies.analyze(keras.Model(image, L.Conv2D(1, 1)(L.Add()([one, two]))))
    assert [len(group) for group in found.groups if group.name == "made"] == [8, 8]
