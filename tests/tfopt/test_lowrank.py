"""Decompositions of kernels: exact at full rank, and the least error they promise below it."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tfopt import graph
from tfopt.errors import InputError
from tfopt.latency.knapsack import Option, choose
from tfopt.lowrank import kernels, rank, search
from tfopt.lowrank.layers import Factorable, has_kernel, refused
from tfopt.lowrank.moments import answers

kinds = keras.layers
RANDOM = np.random.default_rng(0)


def built(layer, shape):
    model = keras.Sequential([keras.Input(shape), layer])
    layer.set_weights([RANDOM.normal(size=w.shape).astype(np.float32) for w in layer.get_weights()])
    return model


def factorable(layer, model, found=None) -> Factorable:
    return Factorable(layer, [(before, after) for operation, before, after in graph.calls(model)], found)


def replaced(model, layer, candidate):
    copy = graph.rewrite(model, {layer.name: [part.make(keras) for part in candidate.parts]})
    for part in candidate.parts:
        copy.get_layer(part.name).set_weights(part.weights)
    return copy


CONVOLUTIONS = [
    {"kernel_size": size, "strides": strides, "dilation_rate": dilation, "padding": padding, **more}
    for (size, strides, dilation), padding, more in itertools.product(
        [(3, 1, 1), (3, 2, 1), (3, 1, 2), (2, 1, 1), (4, 2, 1), ((3, 5), 1, 1), ((5, 3), 2, 1), ((2, 3), 1, 2)],
        ["same", "valid"], [{"activation": "relu"}, {"use_bias": False}],
    )
]  # fmt: skip


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_of_full_rank_answers_the_same(options, method):
    layer = kinds.Conv2D(6, name="x", **options)
    model = built(layer, (13, 12, 5))
    one = factorable(layer, model)
    candidate = one.at(method, one.full_rank(method))
    image = RANDOM.normal(size=(3, 13, 12, 5)).astype(np.float32)
    small = replaced(model, layer, candidate)
    np.testing.assert_allclose(small(image), model(image), rtol=1e-4, atol=1e-4)
    assert candidate.error < 1e-9
    assert candidate.macs == graph.count_macs(small) and one.macs == graph.count_macs(model)
    assert candidate.parameters == small.count_params() and one.parameters == model.count_params()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (kinds.Dense(7, activation="relu"), (9,)), (kinds.Dense(7), (4, 9)), (kinds.Dense(7, use_bias=False), (9,)),
        (kinds.Conv2D(7, 1, activation="relu"), (6, 6, 9)), (kinds.Conv2D(7, 1, strides=2), (7, 6, 9)),
        (kinds.Conv1D(7, 3, padding="same"), (10, 5)), (kinds.Conv1D(7, 3, strides=2, padding="causal"), (10, 5)),
        (kinds.Conv1D(7, 3, dilation_rate=2, padding="valid"), (10, 5)),
    ],
    ids=str,
)  # fmt: skip
def test_a_matrix_of_full_rank_answers_the_same(layer, shape):
    layer = type(layer).from_config({**layer.get_config(), "name": "x"})
    model = built(layer, shape)
    one = factorable(layer, model)
    assert one.methods == ("channel",)
    candidate = one.at("channel", one.full_rank("channel"))
    image = RANDOM.normal(size=(3, *shape)).astype(np.float32)
    small = replaced(model, layer, candidate)
    np.testing.assert_allclose(small(image), model(image), rtol=1e-4, atol=1e-4)
    assert (candidate.macs, candidate.parameters) == (graph.count_macs(small), small.count_params())


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_separable_depthwise_kernel_becomes_a_column_and_a_row(padding, dilation):
    layer = kinds.DepthwiseConv2D((3, 5), padding=padding, dilation_rate=dilation, name="x", activation="relu")
    model = built(layer, (14, 13, 4))
    column, row = RANDOM.normal(size=(3, 1, 4, 1)), RANDOM.normal(size=(1, 5, 4, 1))
    layer.set_weights([column * row, RANDOM.normal(size=4)])
    candidate = factorable(layer, model).at("depthwise", (1,))
    image = RANDOM.normal(size=(2, 14, 13, 4)).astype(np.float32)
    np.testing.assert_allclose(replaced(model, layer, candidate)(image), model(image), rtol=1e-4, atol=1e-4)
    assert candidate.error < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 1000),
    st.sampled_from(["matrix", "spatial", "tucker"]),
)  # fmt: skip
def test_more_rank_never_loses_more_and_all_of_it_nothing(height, width, inputs, outputs, seed, method):
    kernel = np.random.default_rng(seed).normal(size=(height, width, inputs, outputs))
    if method == "tucker":
        full = (min(inputs, height * width * outputs), min(outputs, height * width * inputs))
        ladder = [(max(1, full[0] - k), max(1, full[1] - k)) for k in (3, 2, 1, 0)]
        errors = [kernels.error(method, kernel, kernels.tucker(kernel, ranks)) for ranks in ladder]
    else:
        values = (kernels.matrix_values if method == "matrix" else kernels.spatial_values)(kernel)
        make = kernels.matrix if method == "matrix" else kernels.spatial
        errors = [kernels.error(method, kernel, make(kernel, one)) for one in range(1, len(values) + 1)]
        # Eckart and Young: exactly what was cut off, and the energy decides the rank that says so.
        lost = 1 - np.cumsum(values**2) / np.sum(values**2)
        np.testing.assert_allclose(errors, lost, atol=1e-9)
        assert errors[rank.by_energy(values, 0.9) - 1] <= 0.1 + 1e-9
    assert errors[-1] < 1e-18
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))


def test_tucker_loses_no_more_than_what_both_modes_cut_off():
    kernel = RANDOM.normal(size=(3, 3, 8, 10))
    inputs, outputs = kernels.tucker_values(kernel)
    bound = (np.sum(inputs[5:] ** 2) + np.sum(outputs[6:] ** 2)) / np.sum(kernel**2)
    assert 0 < kernels.error("tucker", kernel, kernels.tucker(kernel, (5, 6))) <= bound


@pytest.mark.parametrize("true", [1, 3, 6])
def test_cp_finds_a_kernel_of_known_rank(true):
    space, before, after = (RANDOM.normal(size=(size, true)) for size in (9, 12, 10))
    kernel = np.einsum("sr,ir,or->sio", space, before, after).reshape(3, 3, 12, 10)
    assert kernels.error("cp", kernel, kernels.cp(kernel, true)) < 1e-8
    if true > 1:
        assert kernels.error("cp", kernel, kernels.cp(kernel, true - 1)) > 1e-3


@pytest.mark.parametrize("strides", [1, 2])
def test_a_cp_chain_computes_what_its_factors_do(strides):
    layer = kinds.Conv2D(6, 3, strides=strides, padding="same", name="x")
    model = built(layer, (9, 9, 5))
    candidate = factorable(layer, model).at("cp", (4,))
    whole = kernels.compose("cp", tuple(part.weights[0] for part in candidate.parts))
    layer.set_weights([whole, layer.get_weights()[1]])
    image = RANDOM.normal(size=(2, 9, 9, 5)).astype(np.float32)
    np.testing.assert_allclose(replaced(model, layer, candidate)(image), model(image), rtol=1e-4, atol=1e-4)
    assert [part.kind for part in candidate.parts] == ["Conv2D", "DepthwiseConv2D", "Conv2D"]


@pytest.mark.parametrize(("shape", "true", "noise"), [((60, 40), 5, 0.05), ((40, 200), 8, 0.1), ((64, 64), 1, 0.2)])
def test_variational_bayes_finds_a_planted_rank_under_noise(shape, true, noise):
    random = np.random.default_rng(1)
    signal = random.normal(size=(shape[0], true)) @ random.normal(size=(true, shape[1]))
    values = np.linalg.svd(signal + noise * random.normal(size=shape), compute_uv=False)
    assert rank.by_variational_bayes(values, shape) == true


def test_variational_bayes_calls_noise_noise():
    values = np.linalg.svd(np.random.default_rng(2).normal(size=(50, 80)), compute_uv=False)
    assert rank.by_variational_bayes(values, (50, 80)) == 1  # the least a layer can have
    assert rank.by_variational_bayes(np.zeros(5), (5, 8)) == 1


def test_factors_that_fit_the_data_lose_less_of_the_answers(digits, spec):
    """Correlated inputs: the plain factors spend their rank where no image ever goes."""
    layer = kinds.Conv2D(16, 3, padding="same", name="x")
    inputs = keras.Input(spec.shape)
    first = kinds.Conv2D(12, 3, padding="same", activation="relu")
    model = keras.Model(inputs, layer(first(inputs)))
    for one in (first, layer):
        one.set_weights([RANDOM.normal(size=w.shape).astype(np.float32) for w in one.get_weights()])
    found = answers(model, [layer], digits["calibration"], spec)["x"]
    images = next(digits["validation"].batches(spec, 64))[0]
    whole = np.asarray(model(images))
    lost = {}
    shapes = list(graph.calls(model))[1:]
    for name, seen in (("plain", None), ("data", found)):
        one = Factorable(layer, [(before, after) for _, before, after in shapes], seen)
        candidate = one.at("channel", (4,))
        assert candidate.by_data == (name == "data")
        got = np.asarray(replaced(model, layer, candidate)(images))
        lost[name] = float(np.sum((got - whole) ** 2) / np.sum((whole - whole.mean((0, 1, 2))) ** 2))
        if name == "data":
            assert lost[name] == pytest.approx(candidate.error, abs=0.03)  # on images that it has not seen
    assert lost["data"] < 0.7 * lost["plain"]


def test_listening_leaves_the_layer_as_it_was(digits, spec):
    layer = kinds.Conv2D(4, 3, name="x")
    model = built(layer, spec.shape)
    answers(model, [layer], digits["calibration"].balanced(20), spec)
    assert "call" not in vars(layer)


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (kinds.Conv2D(8, 3, groups=2), (8, 8, 4), "grouped"), (kinds.SeparableConv2D(8, 3), (8, 8, 4), "separable"),
        (kinds.Conv2DTranspose(8, 3), (8, 8, 4), "Conv2DTranspose"),
        (kinds.DepthwiseConv2D(3, strides=2), (8, 8, 4), "strides"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_left_alone_has_a_reason(layer, shape, words):
    skip = refused(layer, [(shape, shape)])
    assert words in skip.detail
    assert refused(kinds.BatchNormalization(), [(shape, shape)]) is None
    assert not has_kernel(kinds.BatchNormalization()) and not has_kernel(kinds.SeparableConv2D(8, 3))


@pytest.mark.parametrize(("method", "ranks"), [("channel", (7,)), ("spatial", (99,)), ("tucker", (6, 6)), ("cp", (0,))])
def test_a_rank_above_the_maximum_names_the_layer(method, ranks):
    layer = kinds.Conv2D(6, 3, name="block2_conv")
    one = factorable(layer, built(layer, (8, 8, 5)))
    with pytest.raises(InputError, match="block2_conv") as caught:
        one.at(method, ranks)
    assert "1 to" in str(caught.value)


@settings(max_examples=60, deadline=None)
@example([[(0.0, 1), (0.0, 0)]], 0)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 10), st.integers(0, 20)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    st.integers(0, 60),
)  # fmt: skip
def test_the_knapsack_is_the_best_of_all_choices(groups, budget):
    options = [[Option(lost, cost) for lost, cost in group] for group in groups]
    ways = [way for way in itertools.product(*options) if sum(option.cost for option in way) <= budget]
    if not ways:
        with pytest.raises(InputError, match="cannot be reached"):
            choose(options, budget)
        return
    picked = [group[index] for group, index in zip(options, choose(options, budget))]
    assert sum(option.cost for option in picked) <= budget
    assert sum(o.lost for o in picked) == pytest.approx(min(sum(o.lost for o in way) for way in ways))


def test_ranks_share_out_a_budget_of_macs():
    """The layer that really is of low rank gives up most."""
    thin, thick = kinds.Conv2D(24, 3, padding="same", name="thin"), kinds.Conv2D(24, 3, padding="same", name="thick")
    for layer in (thin, thick):
        layer.build((None, 8, 8, 24))
    low = RANDOM.normal(size=(216, 3)) @ RANDOM.normal(size=(3, 24))
    thin.set_weights([low.reshape(3, 3, 24, 24), np.zeros(24)])
    thick.set_weights([RANDOM.normal(size=(3, 3, 24, 24)), np.zeros(24)])
    layers = [factorable(layer, keras.Sequential([keras.Input((8, 8, 24)), layer])) for layer in (thin, thick)]
    whole = sum(layer.macs for layer in layers)
    choice = search.under_macs(layers, lambda layer: ("channel", "spatial"), 0.8, whole, 2 * whole)
    left = {layer.name: choice.candidates[layer.name].macs if layer.name in choice.candidates else layer.macs
            for layer in layers}  # fmt: skip
    assert sum(left.values()) + whole <= 0.8 * 2 * whole
    assert left["thin"] < 0.5 * left["thick"]
    assert choice.candidates["thin"].error < 1e-6
    with pytest.raises(InputError, match=r"cannot be reached. Received: 0.4 of the model's MACs. Allowed: 0.5\d* of"):
        search.under_macs(layers, lambda layer: ("channel",), 0.4, whole, 2 * whole)
