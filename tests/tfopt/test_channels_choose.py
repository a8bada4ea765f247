"""Which channels matter, and how many go."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests.tfopt.odd_graphs import GRAPHS
from tfopt.channels import check, choose, cut, dependencies, importance
from tfopt.channels.costs import Costs
from tfopt.channels.dependencies import Group
from tfopt.errors import InputError, ModelRefused, Problem

L = keras.layers


def group(size, positions=1):
    return Group(("layer",), np.arange(size), positions)


@pytest.mark.parametrize(
    "size, ratio, multiple, expected",
    [
        (64, 0.3, 8, 48), (64, 0.5, 8, 32), (32, 0.3, 8, 24), (16, 0.3, 8, 8), (24, 0.3, 8, 16), (64, 0.3, 1, 45),
        (12, 0.5, 8, 8), (8, 0.5, 8, 4), (6, 0.5, 8, 4), (4, 0.5, 8, 2), (1, 0.9, 8, 1), (20, 0.05, 8, 20),
        (2, 0.5, 8, 1), (24, 0.5, 8, 16), (64, 0.0, 8, 64), (64, 0.99, 8, 8), (64, 0.3, 16, 48), (10, 0.3, 3, 6),
    ],
)  # fmt: skip
def test_counts_are_rounded_to_a_multiple(size, ratio, multiple, expected):
    assert choose.kept(group(size), ratio, multiple) == expected


def test_behind_a_grouped_convolution_the_multiple_counts_channels():
    assert choose.kept(group(12, positions=4), 0.3, 8) == 8
    assert choose.kept(group(5, positions=8), 0.4, 8) == 3


def test_a_ratio_that_leaves_nothing_is_refused_by_name():
    with pytest.raises(InputError, match="Layer layer would be left without a channel") as caught:
        choose.kept(group(16), 0.99)
    assert "at most 0.969" in str(caught.value)
    assert choose.kept(group(16), 0.99, strict=False) == 8


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, "half", None, True, float("nan")])
def test_ratios_out_of_range(ratio):
    found = dependencies.analyze(GRAPHS["u_net"]())
    with pytest.raises(InputError, match="ratio is out of range"):
        choose.uniform(found, importance.scores(found), ratio)


@pytest.fixture
def chain():
    """Conv2D one (16), batch norm, Conv2D two (32), a head."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.Input((8, 8, 3)), L.Conv2D(16, 3, name="one"), L.BatchNormalization(name="norm"), L.ReLU(),
        L.Conv2D(32, 3, name="two"), L.GlobalAveragePooling2D(), L.Dense(4, name="head", activation="softmax"),
    ])  # fmt: skip


def lowest(found, scores, number=0, count=4):
    units = found.groups[number].units
    return set(np.argsort(scores[units])[:count].tolist())


def test_norms_find_small_filters(chain):
    kernel, bias = chain.get_layer("one").get_weights()
    kernel[..., [2, 5, 7, 11]] *= 0.01
    chain.get_layer("one").set_weights([kernel, bias])
    found = dependencies.analyze(chain)
    for kind in ("l1", "l2"):
        assert lowest(found, importance.scores(found, kind)) == {2, 5, 7, 11}
    l1 = importance.scores(found, "l1")[found.groups[0].units]
    np.testing.assert_allclose(l1, np.abs(kernel).sum((0, 1, 2)), rtol=1e-5)


def test_batch_norms_find_small_factors_and_others_are_judged_by_l1(chain):
    norm = chain.get_layer("norm")
    norm.gamma.assign(np.linspace(0.1, 1, 16)[::-1])
    found = dependencies.analyze(chain)
    scores = importance.scores(found, "bn_scale")
    assert lowest(found, scores) == {12, 13, 14, 15}
    assert importance.without_norm(found) == ["two"]
    two = found.groups[1].units
    np.testing.assert_allclose(scores[two], importance.scores(found, "l1")[two])


def test_geometric_median_finds_what_the_others_can_replace(chain):
    kernel, bias = chain.get_layer("one").get_weights()
    # Four large filters that are all but the same: the norm would keep them.
    kernel[...] = np.random.default_rng(0).normal(size=kernel.shape) * 2
    kernel[..., :4] = 1.0 + 0.01 * kernel[..., :4]
    chain.get_layer("one").set_weights([kernel, bias])
    found = dependencies.analyze(chain)
    assert lowest(found, importance.scores(found, "fpgm")) == {0, 1, 2, 3}
    rows = kernel.reshape(-1, 16).T
    by_hand = np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(-1)).sum(1)
    np.testing.assert_allclose(importance.scores(found, "fpgm")[found.groups[0].units], by_hand, rtol=1e-4)


def test_taylor_finds_channels_that_nothing_reads(chain):
    kernel, bias = chain.get_layer("two").get_weights()
    kernel[:, :, [1, 4, 9, 13], :] *= 1e-4
    chain.get_layer("two").set_weights([kernel, bias])
    found = dependencies.analyze(chain)
    rng = np.random.default_rng(0)
    data = [(rng.normal(size=(8, 8, 8, 3)).astype(np.float32), rng.integers(0, 4, 8)) for _ in range(3)]
    loss = keras.losses.SparseCategoricalCrossentropy()
    scores = importance.scores(found, "taylor", batches=data, loss=loss)
    assert lowest(found, scores) == {1, 4, 9, 13}
    assert lowest(found, importance.scores(found, "l1")) != {1, 4, 9, 13}
    for batches in (None, []):
        with pytest.raises(InputError, match="taylor"):
            importance.scores(found, "taylor", batches=batches, loss=loss)


def test_taylor_by_hand():
    """y = sum of w2_j · w1_j x: the derivative by w1_j times w1_j is w2_j · w1_j · x."""
    image = keras.Input((1,))
    model = keras.Model(image, L.Dense(1, use_bias=False)(L.Dense(3, use_bias=False, name="made")(image)))
    model.set_weights([np.array([[1.0, -2, 3]]), np.array([[4.0], [5], [0.5]])])
    found = dependencies.analyze(model)
    data = [(np.array([[x]], np.float32), np.zeros(1)) for x in (1.0, 3.0)]
    scores = importance.scores(found, "taylor", batches=data, loss=lambda labels, outputs: outputs)
    np.testing.assert_allclose(scores[found.groups[0].units], np.array([4.0, -10, 1.5]) ** 2 * (1 + 9) / 2)


def test_chance_follows_the_seed_and_members_of_a_group_are_summed(chain):
    found = dependencies.analyze(chain)
    draw = lambda seed: importance.scores(found, "random", seed=seed)
    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
    image = keras.Input((8, 8, 3))
    both = L.Add()([L.Conv2D(8, 1, name="one")(image), L.Conv2D(8, 3, padding="same", name="two")(image)])
    model = keras.Model(image, L.Conv2D(1, 1)(both))
    found = dependencies.analyze(model)
    one, two = (np.abs(model.get_layer(name).get_weights()[0]).sum((0, 1, 2)) for name in ("one", "two"))
    np.testing.assert_allclose(importance.scores(found)[found.groups[0].units], one + two, rtol=1e-5)
    with pytest.raises(Problem, match="no importance of that name"):
        importance.scores(found, "l3")


@pytest.mark.parametrize("name", GRAPHS)
def test_costs_are_those_of_the_built_model(name):
    found = dependencies.analyze(GRAPHS[name]())
    removed = choose.uniform(found, importance.scores(found), 0.4)
    report = cut.report(found, cut.cut(found, removed), removed)
    costs = Costs(found)
    for keep, parameters, macs in (
        (found.keep(), report.parameters_before, report.macs_before),
        (found.keep(removed), report.parameters_after, report.macs_after),
    ):
        assert (costs.parameters(keep), costs.macs(keep)) == (parameters, macs)


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("name", GRAPHS)
def test_nearly_every_kernel_loses_the_ratio_within_rounding(name, ratio):
    found = dependencies.analyze(GRAPHS[name]())
    removed = choose.uniform(found, importance.scores(found), ratio)
    layers = cut.report(found, cut.cut(found, removed), removed).layers
    close = [abs(1 - after / before - ratio) <= 8 / before for before, after in layers.values()]
    assert np.mean(close) >= 0.8
    exact = cut.report(found, found.model, choose.uniform(found, importance.scores(found), ratio, 1)).layers
    assert np.mean([abs(1 - after / before - ratio) < 0.1 for before, after in exact.values()]) >= 0.8


def test_one_threshold_takes_more_where_it_matters_less(chain):
    found = dependencies.analyze(chain)
    scores = importance.scores(found, "l1")
    one, two = (group.units for group in found.groups)
    # Half of the wider layer is nearly nothing; scores are compared over the mean of their group.
    scores[two[:16]] *= 0.01
    removed = choose.overall(found, scores, 0.3, 1)
    assert len(removed) == pytest.approx(0.3 * 48, abs=1)
    assert set(removed) <= set(two[:16].tolist())
    scores[one] *= 1e-9
    all_but_a_tenth = choose.overall(found, scores, 0.9, 1, kind="taylor")
    assert len(set(one.tolist()) - set(all_but_a_tenth)) >= 1
    assert choose.overall(found, scores, 0.0, 1) == []


def test_ratios_by_name(chain):
    found = dependencies.analyze(chain)
    ratios = choose.ratios_of(found, {"one": 0.5, "t*": 0.25, "tw?": 0.75})
    assert ratios == [0.5, 0.25]
    scores = importance.scores(found)
    assert len(choose.by_group(found, scores, ratios, 1)) == 8 + 8
    with pytest.raises(InputError, match="There is no layer, or pattern of layers, that can lose"):
        choose.ratios_of(found, {"head": 0.5})
    with pytest.raises(InputError, match="The ratio of one is out of range"):
        choose.ratios_of(found, {"one": 2})


@pytest.mark.parametrize("scope", choose.SCOPES)
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", ["multi_branch", "inverted_residual", "grouped"])
def test_macs_are_met_and_not_missed_by_much(name, fraction, scope):
    found = dependencies.analyze(GRAPHS[name]())
    scores = importance.scores(found, "l2")
    removed = choose.to_macs(found, scores, fraction, 4, scope=scope)
    report = cut.report(found, cut.cut(found, removed), removed)
    assert fraction - 0.12 < report.macs_after / report.macs_before <= fraction


def test_macs_out_of_reach_are_refused(chain):
    found = dependencies.analyze(chain)
    with pytest.raises(ModelRefused, match="So few MACs cannot be reached"):
        choose.to_macs(found, importance.scores(found), 0.001)
    for fraction in (0, 1, "half", True):
        with pytest.raises(InputError, match="fraction of MACs is out of range"):
            choose.to_macs(found, importance.scores(found), fraction)


def test_the_least_important_go_first(chain):
    model = check.randomized(chain)
    found = dependencies.analyze(model)
    scores = importance.scores(found, "l2")
    removed = choose.uniform(found, scores, 0.5)
    for group_ in found.groups:
        gone = np.isin(group_.units, removed)
        assert scores[group_.units][gone].max() <= scores[group_.units][~gone].min()
