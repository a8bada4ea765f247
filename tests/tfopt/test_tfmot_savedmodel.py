"""SavedModel folders that Keras 2 wrote, loaded through the worker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

from tfopt import builders, models
from tfopt.errors import ModelError
from tfopt.tfmot.savedmodel import load_saved_model

_WRITE = """
import os, sys
os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")
import numpy as np, tf_keras
from tf_keras import layers
tf_keras.utils.set_random_seed(0)
image = tf_keras.Input((8, 8, 1))
x = layers.BatchNormalization()(layers.Conv2D(4, 3, use_bias=False, name="first")(image))
x = layers.ReLU(6.0)(layers.DepthwiseConv2D(3)(x))
model = tf_keras.Model(image, layers.Dense(3, activation="softmax")(layers.Flatten()(x)))
model.save(sys.argv[1], save_format="tf")
model.save(sys.argv[1] + ".h5")
other = tf_keras.Sequential([layers.Conv2D(4, 3, activation="hard_sigmoid", input_shape=(8, 8, 1)), layers.Flatten()])
other.save(sys.argv[1] + "-hard", save_format="tf")
images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
np.savez(sys.argv[2], images=images, outputs=model(images).numpy())
"""


@pytest.fixture(scope="module")
def keras2(tmp_path_factory):
    """(a folder that Keras 2 wrote, images, what the model answered there)."""
    folder = tmp_path_factory.mktemp("keras2")
    child = subprocess.run(
        [sys.executable, "-c", _WRITE, str(folder / "saved"), str(folder / "answers.npz")],
        env={**os.environ, "TF_USE_LEGACY_KERAS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    with np.load(folder / "answers.npz") as answers:
        return folder / "saved", answers["images"], answers["outputs"]


def test_keras_2_folder_becomes_a_keras_3_model(keras2):
    folder, images, expected = keras2
    loaded = models.load(folder, trust=True)
    assert isinstance(loaded.model, keras.Model) and loaded.spec.shape == (8, 8, 1)
    assert loaded.model.get_layer("first").kernel.shape == (3, 3, 1, 4)
    np.testing.assert_allclose(np.asarray(loaded.model(images, training=False)), expected, atol=1e-5)


def test_its_h5_file_is_loaded_too(keras2):
    folder, images, expected = keras2
    loaded = models.load(folder.with_suffix(".h5"))
    np.testing.assert_allclose(np.asarray(loaded.model(images, training=False)), expected, atol=1e-5)
    assert type(loaded.model.get_layer("depthwise_conv2d")) is keras.layers.DepthwiseConv2D


def test_a_setting_that_has_changed_its_meaning_is_noticed(keras2):
    with pytest.raises(ModelError, match="answers differently"):
        load_saved_model(keras2[0].with_name("saved-hard"), trust=True)


def test_it_needs_trust(keras2):
    with pytest.raises(ModelError, match="--trust") as refusal:
        load_saved_model(keras2[0], trust=False)
    assert "program" in refusal.value.what


def test_a_damaged_folder_is_one_clear_error(keras2, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(keras2[0], damaged)
    (damaged / "saved_model.pb").write_bytes(b"\x08" * 400)
    with pytest.raises(ModelError, match="cannot be loaded") as refusal:
        load_saved_model(damaged, trust=True)
    assert str(damaged) in str(refusal.value.received) and "model.save" in refusal.value.next_step


def test_a_bare_function_says_what_to_do(tmp_path):
    builders.build("resnet8", (8, 8, 1), 2, width=0.25).export(tmp_path / "served", verbose=False)
    with pytest.raises(ModelError, match="bare function") as refusal:
        load_saved_model(tmp_path / "served", trust=True)
    assert "model.save('NAME.keras')" in refusal.value.next_step


def test_any_other_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no saved_model\.pb"):
        load_saved_model(tmp_path, trust=True)
