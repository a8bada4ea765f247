from __future__ import annotations

import keras
import numpy as np
import pytest

from tfopt import builders, graph


@pytest.mark.parametrize(
    ("name", "shape", "million_macs"),
    # He et al. 2015 table 6 and Howard et al. 2017 table 4 count the same networks.
    [("resnet20", (32, 32, 3), 40.8), ("mobilenet", (224, 224, 3), 568)],
)
def test_macs_of_published_networks(name, shape, million_macs):
    model = builders.build(name, shape, 1000 if name == "mobilenet" else 10)
    assert graph.count_macs(model) / 1e6 == pytest.approx(million_macs, rel=0.01)


def test_macs_by_hand():
    model = keras.Sequential(
        [
            keras.Input((10, 10, 4)),
            keras.layers.Conv2D(8, 3, strides=2, padding="same", groups=2),
            keras.layers.DepthwiseConv2D(3, padding="valid"),
            keras.layers.Conv2DTranspose(2, 2, strides=2),
            keras.layers.Flatten(),
            keras.layers.Dense(5),
        ]
    )
    grouped = 25 * 3 * 3 * 2 * 8
    depthwise = 9 * 3 * 3 * 8
    transposed = 9 * 2 * 2 * 8 * 2
    dense = 72 * 5
    assert graph.count_macs(model) == grouped + depthwise + transposed + dense


def test_a_size_that_einsum_leaves_open_is_counted():
    rows = keras.Input((8, 6))
    open_ended = keras.layers.EinsumDense("abc,cd->abd", output_shape=(None, 5))(rows)
    assert graph.count_macs(keras.Model(rows, open_ended)) == 8 * 6 * 5


def test_attention_counts_its_projections_and_products():
    rows = keras.Input((8, 6))
    model = keras.Model(rows, keras.layers.MultiHeadAttention(2, 4, value_dim=3)(rows, rows))
    assert graph.count_macs(model) == 8 * 6 * 2 * (4 + 4 + 3 + 3) + 8 * 8 * 2 * (4 + 3)


def test_shared_and_nested_layers_count_at_each_call():
    shared = keras.layers.Dense(6, name="shared")
    inner = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, name="inside")], name="inner")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, inner(shared(shared(inputs))))
    assert graph.count_macs(model) == 36 + 36 + 18
    assert [layer.name for layer in graph.flat_layers(model)] == ["shared", "inside"]


def test_rewrite_copies_weights_and_replaces_by_name():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")])
    image = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    same = graph.rewrite(model)
    np.testing.assert_array_equal(same(image), model(image))
    assert same is not model and not set(map(id, same.weights)) & set(map(id, model.weights))
    longer = graph.rewrite(model, {"a": [keras.layers.Dense(7, name="a1"), keras.layers.Dense(3, name="a2")]})
    assert [layer.name for layer in graph.flat_layers(longer)] == ["a1", "a2", "b"]
    np.testing.assert_array_equal(longer.get_layer("b").get_weights()[0], model.get_layer("b").get_weights()[0])


def test_rewrite_enters_nested_models():
    part = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a")], name="part")
    image = keras.Input((4,))
    inner = keras.Model(image, keras.layers.Dense(4, name="b")(image), name="inner")
    model = keras.Model(image, part(inner(inner(image))))
    thin = graph.rewrite(
        model,
        {
            "b": [keras.layers.Dense(1, name="b1"), keras.layers.Dense(4, name="b2")],
            "a": [keras.layers.Dense(2, name="a1"), keras.layers.Dense(3, name="a2")],
        },
    )
    assert [layer.name for layer in graph.flat_layers(thin)] == ["b1", "b2", "a1", "a2"]
    assert [layer.name for layer in thin.layers] == [model.layers[0].name, "inner", "part"]
    assert graph.count_macs(thin) == 2 * (4 + 4) + 8 + 6


def test_copies_keep_what_a_normalization_was_adapted_to():
    from tfopt import models
    from tfopt.tfmot.bridge import with_weights

    images = np.random.default_rng(0).uniform(0, 255, (64, 8, 8, 3)).astype(np.float32)
    layer = keras.layers.Normalization(name="norm")
    layer.adapt(images)
    image = keras.Input((8, 8, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 1)(layer(image)))
    model = keras.Model(image, keras.layers.Dense(2, name="head")(pooled))
    expected = model(images)
    assert np.ptp(expected) > 0.01
    for copy in (graph.rewrite(model), models._with_input_shape(model, (8, 8, 3)), with_weights(model, {})):
        np.testing.assert_allclose(copy(images), expected, atol=1e-5)
    wider = models._with_input_shape(model, (16, 16, 3), copy_all=False)
    np.testing.assert_allclose(wider(np.tile(images, (1, 2, 2, 1))), expected, atol=1e-5)
