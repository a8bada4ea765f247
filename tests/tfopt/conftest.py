"""One small trained classifier on real handwritten digits, shared by the tests of this folder."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import pytest


@pytest.fixture(scope="session")
def digits():
    from tfopt import data

    return data.load("digits")


@pytest.fixture(scope="session")
def spec(digits):
    from mobile_bench.inputs import InputSpec

    return InputSpec(*digits.image_shape, labels=digits.class_names)


@pytest.fixture(scope="session")
def trained_file(digits, spec, tmp_path_factory):
    """The path of a ResNet-8 of half width that reads digits: about 20,000 parameters."""
    import keras

    from tfopt import builders, models, training

    keras.utils.set_random_seed(0)
    model = builders.build("resnet8", spec.shape, 10, width=0.5)
    config = training.TrainConfig(epochs=12, batch_size=32, learning_rate=3e-3, optimizer="adam")
    training.fit(model, digits["train"], digits["validation"], spec, config, keras=keras)
    path = tmp_path_factory.mktemp("trained") / "digits-resnet.keras"
    models.save(model, path, spec)
    return path


@pytest.fixture
def trained(trained_file):
    """That classifier, opened anew for each test."""
    from tfopt import models

    return models.load(trained_file)
