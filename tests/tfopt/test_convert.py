"""Every scheme on the real converter and the real interpreter."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from mobile_bench.errors import Problem
from mobile_bench.interpreter import open_model
from mobile_bench.metadata import embedded_spec
from tfopt import convert, models, training

#: largest difference from Keras over the output's range, fixed before measuring; for the integer schemes
#: a loose bound on softmax outputs of a trained net: what counts there is the class, checked beside it.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "dynamic": 0.1, "int8": 0.2}


@pytest.fixture(scope="module")
def converted(trained_file, digits, tmp_path_factory):
    loaded = models.load(trained_file)
    out = tmp_path_factory.mktemp("converted")
    done = convert.convert(trained_file, loaded.spec, convert.SCHEMES, out, calibration=digits["calibration"], work=out)
    return {c.scheme: c for c in done}


@pytest.mark.parametrize("scheme", convert.SCHEMES)
def test_file_answers_as_keras_does(scheme, converted, trained, digits):
    path = converted[scheme].path
    assert path, converted[scheme].reason
    test = digits["test"].subset(np.arange(200))
    expected = training.predict(trained.model, test, trained.spec)
    model = open_model(path)
    assert model.inputs[0].shape == (1, *trained.spec.shape)
    assert model.inputs[0].dtype == ("int8" if scheme == "int8" else "float32")
    images = trained.spec.normalize(test.pixels(trained.spec))
    answers = np.concatenate([model.invoke(images[i : i + 1])[0] for i in range(len(images))])
    assert np.abs(answers - expected).max() <= TOLERANCE[scheme]
    agreement = np.mean(answers.argmax(1) == expected.argmax(1))
    assert agreement == 1.0 if scheme == "float32" else agreement >= 0.97


def test_smaller_schemes_are_smaller(converted):
    size = {scheme: c.path.stat().st_size for scheme, c in converted.items()}
    assert size["float16"] < 0.65 * size["float32"]
    assert size["int8"] < size["float16"] and size["dynamic"] < size["float16"]


def test_the_file_alone_says_how_to_feed_it(converted, trained):
    content = converted["int8"].path.read_bytes()
    assert embedded_spec(content) == trained.spec
    assert convert.input_shape(content) == (1, *trained.spec.shape)
    assert embedded_spec(content[:200]) is None
    again = convert.embed_spec(convert.embed_spec(content, trained.spec.with_scaling("unit")), trained.spec)
    assert embedded_spec(again) == trained.spec


def test_int8_without_calibration_and_unknown_schemes_are_refused(trained_file, trained, tmp_path):
    with pytest.raises(Problem, match="needs images to calibrate on"):
        convert.convert(trained_file, trained.spec, ["int8"], tmp_path, work=tmp_path)
    with pytest.raises(Problem, match="Did you mean int8"):
        convert.convert(trained_file, trained.spec, ["int88"], tmp_path, work=tmp_path)
    assert not list(tmp_path.glob("*.tflite"))


def test_an_op_without_a_builtin_fails_alone_with_its_name(trained, tmp_path):
    inputs = keras.Input(trained.spec.shape)
    bessel = keras.layers.Lambda(lambda x: __import__("tensorflow").math.bessel_i0(x), name="bessel")(inputs)
    outputs = keras.layers.Dense(10, activation="softmax")(keras.layers.Flatten()(bessel))
    path = tmp_path / "odd.keras"
    keras.Model(inputs, outputs).save(path)
    (done,) = convert.convert(path, trained.spec, ["float32"], tmp_path, work=tmp_path, trust=True)
    assert done.path is None
    assert "BesselI0" in done.reason
    assert not list(tmp_path.glob("*.tflite"))
