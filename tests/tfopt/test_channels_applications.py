"""Every family of keras.applications loses its channels, and nothing else."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tfopt.channels import check, choose, cut, dependencies, importance

#: name -> (size of the image, kernels that can lose channels at least, of how many)
FAMILIES = {
    "MobileNet": (32, 27, 28), "MobileNetV2": (32, 52, 53), "MobileNetV3Small": (32, 53, 54),
    "EfficientNetB0": (32, 81, 82), "EfficientNetV2B0": (32, 91, 92), "ConvNeXtTiny": (32, 18, 59),
    "DenseNet121": (32, 120, 121), "ResNet50": (32, 53, 54), "ResNet50V2": (32, 53, 54), "VGG16": (32, 15, 16),
    "InceptionV3": (75, 94, 95), "InceptionResNetV2": (75, 244, 245), "Xception": (71, 40, 41),
    "NASNetMobile": (224, 196, 197),
}  # fmt: skip
QUICK = ("MobileNet", "MobileNetV3Small")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family(name, tmp_path):
    size, eligible, kernels = FAMILIES[name]
    keras.utils.set_random_seed(0)
    made = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
    model = check.randomized(made)
    found = dependencies.analyze(model)
    assert (len(found.eligible()), len(found.kernels())) == (eligible, kernels)
    assert len(found.stays()) == kernels - eligible
    scores = importance.scores(found, "l2")
    for ratio in (0.3, 0.5):
        removed = choose.uniform(found, scores, ratio)
        smaller = cut.cut(found, removed)
        report = cut.report(found, smaller, removed)
        assert check.exactness(found, removed, smaller) < 1e-5
        close = [abs(1 - after / before - ratio) <= 8 / before for before, after in report.layers.values()]
        assert np.mean(close) >= 0.8
        assert report.parameters_after < (1 - ratio / 2) * report.parameters_before or name == "ConvNeXtTiny"
        assert smaller.output_shape == model.output_shape and smaller.input_shape == model.input_shape
        assert [layer.name for layer in smaller.layers] == [layer.name for layer in model.layers]
    smaller.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert check.difference(smaller, again, check.random_inputs(model)) == 0


@pytest.mark.parametrize("name", ["MobileNetV2", pytest.param("MobileNetV3Small", marks=pytest.mark.slow)])
def test_the_file_for_a_phone_gives_the_same_answers(name, tmp_path):
    import tensorflow as tf

    from mobile_bench.interpreter import open_model

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=10)
    found = dependencies.analyze(check.randomized(model))
    smaller = cut.cut(found, choose.uniform(found, importance.scores(found), 0.5))
    path = tmp_path / "model.tflite"
    path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(smaller).convert())
    (images,) = check.random_inputs(smaller, 1)
    np.testing.assert_allclose(open_model(path).invoke(images)[0], smaller(images, training=False), atol=1e-5)
