"""Channels that go together go together: what is cut with zero outgoing weights changes no answer."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tfopt.channels import choose, cut, dependencies, importance
from tfopt.errors import InputError, ModelRefused
from tfopt.graph import count_macs, flat_layers


def residual(image):
    x = layers.Conv2D(16, 3, padding="same", name="stem")(image)
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(32, 3, padding="same", name="inner")(x)))
    return layers.Add()([x, layers.Conv2D(16, 1, name="out")(y)])


def gated(image):
    """An inverted residual with squeeze-and-excite, by Reshape and by operations."""
    x = layers.Conv2D(24, 1, use_bias=False)(image)
    x = layers.DepthwiseConv2D(3, padding="same")(layers.BatchNormalization()(x))
    gate = layers.Reshape((1, 1, 24))(layers.GlobalAveragePooling2D()(x))
    gate = layers.Conv2D(24, 1, activation="sigmoid")(layers.Conv2D(8, 1, activation="relu")(gate))
    return layers.Conv2D(12, 1)(keras.ops.relu6(layers.Multiply()([x, gate]) + 0.5))


def branches(image):
    """Concatenate, then add; PReLU, padding, grouped and transposed convolutions."""
    parts = [layers.Conv2D(n, 3, padding="same")(image) for n in (8, 16)]
    x = layers.Add()([layers.Concatenate()(parts), layers.SeparableConv2D(24, 3, padding="same")(image)])
    x = layers.PReLU(shared_axes=[1, 2])(layers.ZeroPadding2D(1)(x))
    x = layers.Conv2D(16, 3, groups=4)(x)
    return layers.Conv2DTranspose(8, 2, strides=2)(x)


def shared(image):
    x = layers.Conv2D(16, 1)(image)
    twice = layers.Conv2D(16, 3, padding="same", name="twice")
    return layers.Average()([twice(x), twice(twice(x))])


GRAPHS = {"residual": residual, "gated": gated, "branches": branches, "shared": shared}


def classifier(body, head):
    keras.utils.set_random_seed(1)
    image = keras.Input((8, 8, 3))
    x = body(image)
    x = layers.Flatten()(x) if head == "flatten" else layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(32, activation="relu")(x)
    model = keras.Model(image, layers.Dense(5, activation="softmax", name="scores")(x))
    random = np.random.default_rng(0)
    for layer in flat_layers(model):
        if isinstance(layer, (layers.BatchNormalization, layers.PReLU)):
            layer.set_weights([random.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    return model


def silence(found, gone):
    """Set everything that reads the units to zero."""
    for use in found.uses.values():
        if use.reads is None:
            continue
        mask, weights = np.isin(found.unit(use.reads), list(gone)), use.layer.get_weights()
        if isinstance(use.layer, dependencies.SEPARABLE):
            weights[0][..., mask, :] = 0
        elif isinstance(use.layer, dependencies.TRANSPOSED):
            weights[0][..., mask] = 0
        else:
            weights[0][..., mask[: len(mask) // getattr(use.layer, "groups", 1)], :] = 0
        use.layer.set_weights(weights)


@pytest.mark.parametrize("head", ["flatten", "pool"])
@pytest.mark.parametrize("name", GRAPHS)
def test_silent_channels_can_be_cut_and_no_answer_changes(name, head, tmp_path):
    model = classifier(GRAPHS[name], head)
    found = dependencies.find(model)
    gone = choose.uniform(found.groups(), importance.of_units(model, found, "random", seed=3), 0.5)
    silence(found, gone)
    smaller = cut.cut(model, found, gone)
    smaller.save(tmp_path / "small.keras")
    smaller = keras.models.load_model(tmp_path / "small.keras")
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(smaller(images), model(images), atol=1e-5)
    assert count_macs(smaller) < 0.5 * count_macs(model)
    assert set(found.fixed_layers()) == {"scores"}
    assert [layer.name for layer in flat_layers(smaller)] == [layer.name for layer in flat_layers(model)]


@pytest.mark.parametrize("name", importance.NAMES)
def test_every_importance_has_a_number_for_every_unit(name):
    model = classifier(gated, "pool")
    found = dependencies.find(model)
    batches = [(np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, 3)).astype(np.float32), np.arange(6) % 5)]
    values = importance.of_units(model, found, name, batches=batches)
    units = [unit for group in found.groups() for unit in group.units]
    assert set(units) <= set(values) and np.all(np.isfinite([values[unit] for unit in units]))
    assert np.ptp([values[unit] for unit in units]) > 0


def test_layers_across_channels_are_named_and_unknown_ones_refused():
    image = keras.Input((8, 8, 3))
    x = layers.LayerNormalization(name="norm")(layers.Conv2D(8, 1, name="before")(image))
    model = keras.Model(image, layers.Dense(2, name="scores")(layers.GlobalAveragePooling2D()(x)))
    assert "norm, which normalizes across channels" in dependencies.find(model).fixed_layers()["before"]
    odd = keras.Model(image, layers.GlobalAveragePooling2D()(keras.ops.roll(x, 1)))
    with pytest.raises(ModelRefused, match=r"roll.*Roll"):
        dependencies.find(odd)


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 2])
def test_a_share_that_makes_no_sense_is_refused(ratio):
    with pytest.raises(InputError, match="above 0, below 1"):
        choose.stays(16, ratio)


def test_what_stays_is_a_multiple_that_kernels_like():
    assert [choose.stays(n, 0.5) for n in (64, 40, 24, 6, 1)] == [32, 24, 12, 3, 1]
