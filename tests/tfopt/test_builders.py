"""The architectures: their published sizes, small images, names, and that each converts."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tfopt import builders
from tfopt.errors import InputError


@pytest.mark.parametrize(
    ("name", "shape", "classes", "millions"),
    [
        ("resnet20", (32, 32, 3), 10, (0.27, 0.28)),  # He et al. 2015, table 6: 0.27M, 0.46M, 0.85M
        ("resnet32", (32, 32, 3), 10, (0.46, 0.48)),
        ("resnet56", (32, 32, 3), 10, (0.85, 0.87)),
        ("mobilenet", (224, 224, 3), 1000, (4.2, 4.3)),  # Howard et al. 2017, table 8: 4.2M
        ("mobilenet_v2", (224, 224, 3), 1000, (3.4, 3.6)),  # Sandler et al. 2018, table 4: 3.4M
        ("mobilenet_v3_small", (224, 224, 3), 1000, (2.5, 2.6)),  # Howard et al. 2019, table 3: 2.5M
    ],
)
def test_parameters_are_those_of_the_papers(name, shape, classes, millions):
    model = builders.build(name, shape, classes)
    trainable = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert millions[0] <= trainable / 1e6 < millions[1]
    assert model.input_shape == (None, *shape) and model.output_shape == (None, classes)


@pytest.mark.parametrize(
    ("ours", "theirs", "width"),
    [
        ("mobilenet", "MobileNet", 0.5),
        ("mobilenet_v2", "MobileNetV2", 0.35),
    ],
)
def test_widths_give_the_channels_of_keras_applications(ours, theirs, width):
    reference = getattr(keras.applications, theirs)((96, 96, 3), alpha=width, weights=None, classes=7)
    kernels = lambda model: [
        tuple(layer.kernel.shape[-2:]) for layer in model.layers if isinstance(layer, keras.layers.DepthwiseConv2D)
    ]
    assert kernels(builders.build(ours, (96, 96, 3), 7, width)) == kernels(reference)


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, (8, 8, 1)) for name in builders.BUILDERS), ("resnet8", (33, 47, 3)), ("mobilenet_v3_small", (33, 47, 3))],
)
def test_any_image_size_gives_probabilities(name, shape):
    model = builders.build(name, shape, 4, width=0.25)
    answer = model(np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)).numpy()
    np.testing.assert_allclose(answer.sum(-1), 1, atol=1e-5)
    assert builders.parse(model.name) == (name, 0.25)


def test_small_images_keep_their_resolution_in_the_stem():
    stem = lambda side: builders.build("mobilenet", (side, side, 3), 10, 0.25).get_layer("stem").strides
    assert stem(32) == (1, 1) and stem(96) == (2, 2)


@pytest.mark.parametrize("name", ["resnet8", "mobilenet", "mobilenet_v2", "mobilenet_v3_small"])
def test_every_kind_of_block_converts_to_float_and_int8(name):
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    keras.utils.set_random_seed(1)
    model = builders.build(name, (16, 16, 1), 3, width=0.25)
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 1)).astype(np.float32)
    call = tf.function(lambda image: model(image, training=False))
    graph = call.get_concrete_function(tf.TensorSpec((1, 16, 16, 1), tf.float32))
    owner = tf.Module()
    owner.kept = [weight.value for weight in model.weights]
    for int8 in (False, True):
        converter = tf.lite.TFLiteConverter.from_concrete_functions([graph], owner)
        if int8:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: ([image[None]] for image in images)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        interpreter = Interpreter(model_content=converter.convert())
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images[:1])
        interpreter.invoke()
        answer = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        np.testing.assert_allclose(answer, model(images[:1]), atol=0.1 if int8 else 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet18"}, "no architecture.*Did you mean.*resnet8"),
        ({"classes": 1}, "at least two classes.*1"),
        ({"classes": 2.5}, "at least two classes.*2.5"),
        ({"classes": "ten"}, "at least two classes.*'ten'"),
        ({"width": 0}, "width multiplier is out of range"),
        ({"width": float("nan")}, "width multiplier is out of range"),
        ({"width": "wide"}, "width multiplier is out of range"),
        ({"shape": (4, 32, 3)}, "too small.*8 x 8"),
        ({"shape": (32, 32)}, "no image's shape"),
        ({"shape": (32, 32, 4)}, "no image's shape.*1 or 3"),
        ({"shape": (32.5, 32, 3)}, "no image's shape"),
        ({"shape": (None, None, 3)}, "no image's shape"),
        ({"shape": 32}, "no image's shape"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        builders.build(**{"name": "resnet8", "shape": (32, 32, 3), "classes": 10, **change})


def test_a_resnet_of_another_depth():
    assert builders.resnet(14, (8, 8, 1), 2).name == "resnet14"
    with pytest.raises(InputError, match=r"6n \+ 2"):
        builders.resnet(18, (32, 32, 3), 10)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_large", "my_resnet8", "functional_1"])
def test_foreign_names_are_not_taken_for_ours(name):
    assert builders.parse(name) is None
