"""What counts as an image classifier, how its input spec is found, and the models of keras.applications."""

from __future__ import annotations

import socket

import keras
import numpy as np
import pytest

from tfopt import convert, models
from tfopt.errors import InputError, ModelError

from .small_nets import Subclassed, net

layers = keras.layers


# What counts as a classifier


def _two_inputs():
    a, b = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    return keras.Model([a, b], layers.Dense(2)(layers.Flatten()(layers.Add()([a, b]))))


def _two_outputs():
    a = keras.Input((8, 8, 1))
    flat = layers.Flatten()(a)
    return keras.Model(a, [layers.Dense(2)(flat), layers.Dense(3)(flat)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Subclassed, r"subclassed.*Subclassed.*Rebuild it with keras\.Input"),
        (lambda: keras.Sequential([layers.Dense(3)]), "not built.*input shape"),
        (_two_inputs, r"input is not that of an image classifier.*\(None, 8, 8, 1\), \(None, 8, 8, 1\)"),
        (_two_outputs, r"output is not that of an image classifier.*\(None, 2\), \(None, 3\)"),
        (lambda: keras.Sequential([keras.Input((5,)), layers.Dense(3)]), r"input is not that.*\(None, 5\)"),
        (lambda: keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(3, 3)]), r"output is not that.*6, 6, 3"),
        (lambda: keras.Sequential([keras.Input((8, 8, None)), layers.GlobalAveragePooling2D()]), "input is not that"),
        (lambda: net(shape=(8, 8, 4)), r"does not take images.*4 channels.*1 or 3"),
        (lambda: net(shape=(None, None, 3)), "any size.*--input-spec size=224"),
        (lambda: "a text", "not a Keras 3 model.*str"),
    ],
)
def test_what_is_no_image_classifier_is_said(make, message):
    with pytest.raises(ModelError, match=message):
        models.from_keras(make())


def test_dictionaries_and_fixed_batches_are_put_right():
    image = keras.Input((8, 8, 1), name="image")
    scores = layers.Dense(3, activation="softmax")(layers.Flatten()(image))
    wrapped = keras.Model({"image": image}, {"scores": scores})
    plain = models.from_keras(wrapped).model
    assert plain.input_shape == (None, 8, 8, 1) and plain.output_shape == (None, 3)
    fixed = keras.Sequential([keras.Input(batch_shape=(1, 8, 8, 1)), layers.Flatten(), layers.Dense(3)])
    free = models.from_keras(fixed).model
    assert free.input_shape == (None, 8, 8, 1)
    image = np.ones((1, 8, 8, 1), np.float32)
    np.testing.assert_allclose(free(image), fixed(image))


def test_a_model_of_mixed_precision_computes_in_float32(tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        inputs = keras.Input((8, 8, 3))
        x = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3, activation="relu")(inputs))
        inner = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Conv2D(4, 3), keras.layers.ReLU()])
        x = keras.layers.GlobalAveragePooling2D()(inner(x))
        model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax", dtype="float32")(x))
    finally:
        keras.config.set_dtype_policy(before)
    model.save(tmp_path / "mixed.keras")
    loaded = models.load(tmp_path / "mixed.keras", input_spec="scaling=signed")
    assert {layer.compute_dtype for layer in models.flat_layers(loaded.model)} == {"float32"}
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    answers = np.asarray(loaded.model(images))
    assert answers.dtype == np.float32 and np.allclose(answers, np.asarray(model(images)), atol=5e-3)
    models.save(loaded.model, tmp_path / "model.keras", loaded.spec)
    (made,) = convert.convert(tmp_path / "model.keras", loaded.spec, ["float32"], tmp_path, work=tmp_path)
    assert made.within_tolerance, made.reason


# Input specs


@pytest.mark.parametrize(
    ("model", "scaling", "origin"),
    [
        (lambda: net(), "signed", "an assumption"),
        (lambda: net(layers.Rescaling(1 / 255)), "raw", "the layers"),
        (lambda: net(layers.RandomFlip(), layers.Rescaling(1 / 127.5, -1)), "raw", "the layers"),
        (lambda: net(layers.Rescaling(2.0, -1)), "unit", "the layers"),
        (lambda: net(layers.Normalization(mean=[120.0], variance=[3000.0])), "raw", "the layers"),
        (lambda: net(layers.Normalization(mean=[0.5], variance=[0.04])), "unit", "the layers"),
        (lambda: net(keras.Sequential([layers.Rescaling(1 / 255)])), "raw", "the layers"),
        (lambda: net(name="resnet50"), "caffe", "keras.applications"),
        (lambda: net(name="mobilenetv2_1.00_224"), "signed", "keras.applications"),
        (lambda: net(keras.Sequential([keras.Input((8, 8, 1)), layers.ReLU()], name="densenet121")), "torch",
         "keras.applications"),
        (lambda: net(name="mobilenet_v3_small"), "signed", "an assumption"),
    ],
)  # fmt: skip
def test_the_scaling_comes_from_the_layers_or_the_application(model, scaling, origin):
    loaded = models.from_keras(model())
    assert loaded.spec == loaded.spec.with_scaling(scaling) and loaded.spec_from == origin


def test_arithmetic_without_layers_counts_as_scaling():
    image = keras.Input((8, 8, 3))
    scores = layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(image / 127.5 - 1.0)))
    loaded = models.from_keras(keras.Model(image, scores))
    assert (loaded.spec.scaling, loaded.spec_from) == ("raw", "the layers")


@pytest.mark.parametrize(
    ("end", "head"),
    [
        ([layers.Dense(3, activation="softmax")], "softmax"),
        ([layers.Dense(3), layers.Softmax()], "softmax"),
        ([layers.Dense(3), layers.Activation("softmax")], "softmax"),
        ([layers.Dense(3)], "logits"),
        ([layers.Dense(1, activation="sigmoid")], "sigmoid"),
        ([keras.Sequential([keras.Input((192,)), layers.Dense(3, activation="softmax")])], "softmax"),
    ],
)
def test_the_head_is_read_off_the_last_layer(end, head):
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), *end])
    assert models.from_keras(model).spec.head == head
    assert models.from_keras(model, input_spec="head=logits").spec.head == "logits"


def test_an_open_size_is_filled_in_by_the_user():
    model = net(shape=(None, None, 3))
    loaded = models.from_keras(model, input_spec="size=24,scaling=unit")
    assert loaded.model.input_shape == (None, 24, 24, 3) and loaded.spec_from == "the user"
    image = np.random.default_rng(0).random((1, 24, 24, 3)).astype(np.float32)
    np.testing.assert_allclose(loaded.model(image), model(image), atol=1e-6)
    resized = models.from_keras(net(shape=(32, 32, 3)), input_spec="height=16,width=20")
    assert resized.model.input_shape == (None, 16, 20, 3)
    flat = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(3)])
    with pytest.raises(ModelError, match=r"cannot take images of that size.*\(16, 16, 1\).*\(8, 8, 1\)"):
        models.from_keras(flat, input_spec="size=16")


@pytest.mark.parametrize(
    ("text", "message"), [("scale=unit", "input spec key"), ("scaling=half", "no scaling of that name")]
)
def test_a_wrong_input_spec_is_said(text, message):
    with pytest.raises(InputError, match=message):
        models.from_keras(net(), input_spec=text)


# keras.applications


def test_every_application_is_known_by_its_own_name():
    for name, scaling in [("MobileNet", "signed"), ("MobileNetV3Small", "raw")]:
        loaded = models.load(f"keras:{name}:random")
        assert loaded.spec == loaded.spec.with_scaling(scaling)
        assert loaded.name == name.lower() and loaded.classes == 1000 and loaded.spec.head == "softmax"


@pytest.mark.parametrize("behaviour", ["nobody listens", "never answers"])
def test_weights_that_cannot_be_downloaded_end_in_an_error(monkeypatch, tmp_path, capsys, behaviour):
    from keras.src.utils import file_utils

    monkeypatch.setattr(models, "SILENCE_SECONDS", 1)
    monkeypatch.setattr(file_utils.config, "keras_home", lambda: str(tmp_path / "keras"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        if behaviour == "nobody listens":
            server.close()
        with pytest.raises(ModelError, match=r"weights of MobileNet could not be downloaded.*keras:MobileNet:random"):
            models.load("keras:MobileNet")
    assert socket.getdefaulttimeout() is None
    assert capsys.readouterr().out == ""  # stdout belongs to --json


def test_wrong_applications_and_weights_list_what_exists():
    with pytest.raises(ModelError, match=r"Did you mean.*MobileNetV2"):
        models.load("keras:MobilNetV2")
    with pytest.raises(ModelError, match=r"Unknown weights.*noisy.*keras:MobileNet:random"):
        models.load("keras:MobileNet:noisy")


def test_an_untrained_application_fits_the_images_and_says_how_it_is_fed():
    model, spec = models.untrained_application("MobileNetV3Small", (32, 32, 1), ("a", "b", "c"))
    assert model.input_shape == (None, 32, 32, 1) and model.output_shape == (None, 3)
    assert spec.labels == ("a", "b", "c") and spec.scaling == "raw"
    with pytest.raises(ModelError, match="larger image"):
        models.untrained_application("MobileNetV2", (8, 8, 3), ("a", "b"))
    with pytest.raises(ModelError, match="Did you mean MobileNetV2"):
        models.untrained_application("MobilNetV2", (32, 32, 3), ("a", "b"))
