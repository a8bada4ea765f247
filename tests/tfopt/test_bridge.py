"""Keras 3 models cross to tf_keras, in a process of its own, and trained weights come back."""

from __future__ import annotations

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from tfopt import builders
from tfopt.errors import InputError, ModelRefused
from tfopt.tfmot import bridge, neutral

OUTPUTS_AGREE = 1e-5
_REBUILD = """
import os, sys
os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")
from pathlib import Path
import numpy as np
from tfopt.tfmot import neutral, rebuild
for file in map(Path, sys.argv[1:]):
    graph, arrays = neutral.load(file)
    images = arrays.pop("images")
    model, variables = rebuild.build(graph, arrays)
    assert set(variables) == set(arrays)
    np.save(file.with_suffix(".npy"), model(images, training=False).numpy())
"""


def outputs_of_rebuilt(models, folder):
    """For each Keras 3 model: what it answers, and what tf_keras answers once it has rebuilt it."""
    files, expected = [], []
    for number, model in enumerate(models):
        graph, weights = bridge.describe(model)
        images = np.random.default_rng(number).uniform(-1, 1, (3, *graph.shape)).astype(np.float32)
        file = folder / f"{number}.npz"
        neutral.save(file, graph, {**weights, "images": images})
        files.append(file)
        expected.append(np.asarray(model(images, training=False)))
    child = subprocess.run(
        [sys.executable, "-c", _REBUILD, *map(str, files)],
        env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    return list(zip(expected, [np.load(file.with_suffix(".npy")) for file in files]))


def shaken(model):
    """The model with statistics in its batch norms that tell every one of them from the identity."""
    random = np.random.default_rng(7)
    for name, layer in bridge.named_layers(model):
        if isinstance(layer, layers.BatchNormalization):
            arrays = [random.uniform(0.5, 1.5, array.shape) for array in layer.get_weights()]
            assert arrays, name
            layer.set_weights(arrays)
    return model


def small_parts():
    """Models of a few layers, each with something that must be translated rather than copied."""
    image = keras.Input((12, 12, 3), name="photo")
    head = lambda x: layers.Dense(4, activation="softmax")(layers.GlobalAveragePooling2D()(x))

    shared = layers.Conv2D(3, 3, padding="same", name="shared")
    yield "a shared layer", keras.Model(image, head(layers.Add()([shared(shared(image)), image])))

    inner_image = keras.Input((12, 12, 3))
    inner = keras.Model(
        inner_image, layers.BatchNormalization(name="norm")(layers.Conv2D(3, 3, padding="same", name="c")(inner_image))
    )
    sequence = keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(3, 1, name="c"), layers.ReLU()])
    yield (
        "nested models with layers of one name, one used twice",
        keras.Model(image, head(inner(sequence(inner(image))))),
    )

    yield (
        "a Sequential",
        keras.Sequential(
            [keras.Input((12, 12, 3)), layers.Conv2D(4, 3, activation="leaky_relu"), layers.Flatten(), layers.Dense(2)]
        ),
    )

    x = layers.Conv2D(4, 3)(image)
    x = keras.ops.relu6(x + 3.0) * (1.0 / 6.0) - 0.25
    x = 1.5 - keras.ops.maximum(x, 0.1) / 2.0
    yield "arithmetic with numbers", keras.Model(image, head(x * keras.ops.sigmoid(x)))

    norm = layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 5.0, 6.0])
    x = layers.Rescaling([0.5, 0.25, 2.0], offset=[0.1, 0.2, 0.3])(norm(image))
    yield "rescaling by channel", keras.Model(image, head(layers.Rescaling(1 / 127.5, -1)(x)))

    x = layers.RandomFlip()(image)
    x = layers.GaussianNoise(0.5)(layers.RandomRotation(0.2)(x))
    yield "augmentation inside", keras.Model(image, head(layers.Conv2D(4, 3)(layers.Dropout(0.5)(x))))

    for activation in ("hard_sigmoid", "hard_silu", "silu", "gelu", "tanh", "elu", "relu6", "leaky_relu"):
        x = layers.SeparableConv2D(6, 3, strides=2, depth_multiplier=2, activation=activation)(image)
        yield f"separable with {activation}", keras.Model(image, head(layers.Activation(activation)(x)))

    x = layers.UpSampling2D(2)(layers.Conv2DTranspose(5, 3, strides=2, padding="same")(image))
    x = layers.PReLU(shared_axes=[1, 2])(layers.Cropping2D(1)(layers.ZeroPadding2D(((0, 1), (2, 0)))(x)))
    x = layers.Concatenate()([layers.MaxPooling2D()(x), layers.AveragePooling2D(2)(x)])
    x = layers.LeakyReLU(0.3)(layers.Conv2D(6, 3, groups=2, dilation_rate=2)(x))
    yield "odd layers", keras.Model(image, head(layers.Multiply()([x, layers.GlobalMaxPooling2D(keepdims=True)(x)])))


def test_our_architectures_answer_the_same(tmp_path):
    names = ("resnet8", "mobilenet", "mobilenet_v2", "mobilenet_v3_small")
    models = [shaken(builders.build(name, (32, 32, 3), 10, width=0.25)) for name in names]
    for name, (expected, found) in zip(names, outputs_of_rebuilt(models, tmp_path)):
        assert np.ptp(expected) > 1e-3, name
        np.testing.assert_allclose(found, expected, atol=OUTPUTS_AGREE, err_msg=name)


def test_layers_that_must_be_translated(tmp_path):
    names, models = zip(*small_parts())
    for name, (expected, found) in zip(names, outputs_of_rebuilt([shaken(model) for model in models], tmp_path)):
        np.testing.assert_allclose(found, expected, atol=OUTPUTS_AGREE, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["MobileNetV2", "MobileNetV3Small", "ResNet50", "ResNet50V2", "EfficientNetB0", "DenseNet121"]
)
def test_keras_applications_answer_the_same(name, tmp_path):
    model = shaken(getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=10))
    ((expected, found),) = outputs_of_rebuilt([model], tmp_path)
    np.testing.assert_allclose(found, expected, atol=OUTPUTS_AGREE)


def test_trained_weights_come_back_to_the_right_layers(tmp_path):
    """Every weight is changed on the other side; the user's model is left alone and its clone agrees."""
    models = [shaken(model) for name, model in small_parts() if name in ("a shared layer", "rescaling by channel")]
    models += [shaken(model) for name, model in small_parts() if name.startswith("nested")]
    for model in models:
        graph, weights = bridge.describe(model)
        changed = {name: array * 1.5 + 0.1 for name, array in weights.items()}
        before = model.get_weights()
        model.compile(loss=lambda labels, outputs: 0.0)  # as a model is that was just trained
        clone = bridge.with_weights(model, changed)
        assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights()))
        assert clone is not model and clone.name == model.name
        again = bridge.describe(clone)[1]
        own = {key for node in graph.nodes for key in node.weights if key.rpartition(":")[2].isdigit()}
        assert own and all(np.array_equal(again[key], changed[key].astype(np.float32)) for key in own)
        # The constants of a Rescaling are no weights: they stay as they are.
        assert all(np.array_equal(again[key], weights[key]) for key in set(weights) - own)


def test_nested_layers_of_one_name_get_names_of_their_own():
    model = dict(small_parts())["nested models with layers of one name, one used twice"]
    names = [name for name, _ in bridge.named_layers(model)]
    assert len(set(names)) == len(names) and {"c", "c_2"} <= set(names)
    graph, _ = bridge.describe(model)
    assert [call.node for call in graph.calls].count("norm") == 2


def test_training_layers_are_named_as_dropped():
    graph, _ = bridge.describe(dict(small_parts())["augmentation inside"])
    assert [name.rstrip("_0123456789") for name in graph.dropped] == [
        "random_flip",
        "random_rotation",
        "gaussian_noise",
    ]


@keras.saving.register_keras_serializable(package="tests")
class Doubled(layers.Dense):
    """Looks like a Dense and is none."""

    def call(self, inputs):
        return 2 * super().call(inputs)


class Unregistered(Doubled):
    pass


def test_a_layer_of_an_unknown_class_is_refused_with_what_to_register():
    image = keras.Input((8, 8, 3))
    with pytest.raises(ModelRefused, match=r"Layer odd .*Unregistered.*register_keras_serializable"):
        bridge.describe(keras.Model(image, Unregistered(4, name="odd")(image)))


def _own_relu(x):
    return keras.ops.maximum(x, 0)


@pytest.mark.parametrize(
    ("make", "layer", "kind"),
    [
        (lambda x: layers.Lambda(lambda t: t * 2, name="odd")(x), "odd", "Lambda"),
        (lambda x: layers.TimeDistributed(layers.Dense(2), name="odd")(x), "odd", "holds other layers"),
        (lambda x: layers.LayerNormalization(rms_scaling=True, name="odd")(x), "odd", "rms_scaling"),
        (lambda x: layers.Conv2D(4, 1, activation=_own_relu, name="odd")(x), "odd", "_own_relu"),
        (lambda x: keras.ops.roll(x, 1), "roll", "Roll"),
        (lambda x: keras.ops.mean(x, axis=0, keepdims=True) + x, "mean", "over the batch"),
        (lambda x: keras.ops.concatenate(keras.ops.split(x, [1], axis=0), axis=0), "split", "split of the batch"),
    ],
)
def test_a_layer_that_cannot_cross_is_named(make, layer, kind):
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(make(image))))
    with pytest.raises(ModelRefused) as refusal:
        bridge.describe(model)
    assert layer in refusal.value.what and kind in str(refusal.value.received)
    assert "Conv2D" in refusal.value.allowed and "post-training int8" in refusal.value.next_step


def test_subclassed_models_are_refused():
    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(ModelRefused, match="cannot be walked"):
        bridge.describe(Own())


def test_a_damaged_file_is_one_clear_error(tmp_path):
    graph, weights = bridge.describe(builders.build("resnet8", (8, 8, 1), 2, width=0.25))
    good = tmp_path / "good.npz"
    neutral.save(good, graph, weights)
    loaded, arrays = neutral.load(good)
    assert loaded.to_json() == graph.to_json() and all(np.array_equal(arrays[name], weights[name]) for name in weights)
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:500])
    neutral.save_arrays(tmp_path / "other.npz", {"x": np.zeros(3)})
    for name in ("cut.npz", "other.npz", "missing.npz"):
        with pytest.raises(InputError, match=name):
            neutral.load(tmp_path / name)
