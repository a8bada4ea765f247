"""`tfopt xray`: a Keras model is looked at before it is trained, a .tflite as it is."""

from __future__ import annotations

import json

import keras
import pytest
from typer.testing import CliRunner

from mobile_bench.xray import xray as look
from tfopt import xray
from tfopt.cli import app
from tfopt.errors import InputError, Problem


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A little network that nobody trained: a convolution, hard swish, a dense layer and a softmax."""
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)), keras.layers.Conv2D(8, 3, strides=2, name="stem"),
            keras.layers.Activation("hard_swish", name="swish"), keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(4, activation="softmax", name="classes"),
        ]
    )  # fmt: skip
    path = tmp_path_factory.mktemp("untrained") / "little.keras"
    model.save(path)
    return path


def test_as_int8_it_is_calibrated_on_noise_and_says_so(untrained):
    report, scheme = xray.xray_model(str(untrained), "cpu", scheme="int8")
    assert scheme == "int8" and "calibrated on random images" in report.notes[0]
    left = {op.op: op for op in report.ops if op.runs_on == "cpu"}
    assert set(left) == {"HARD_SWISH", "SOFTMAX"} and "int8" in left["HARD_SWISH"].reason


def test_the_edge_tpu_is_asked_about_int8(untrained):
    pytest.importorskip("mobile_bench.xray.edgetpu", reason="the rules of the Edge TPU are not in this checkout")
    report, scheme = xray.xray_model(str(untrained), "edgetpu")
    assert scheme == "int8" and report.delegate == "edgetpu" and len(report.ops) >= 4


def test_noise_covers_the_range_of_pixels():
    from mobile_bench.inputs import InputSpec

    images = xray.random_images(InputSpec(16, 12, 3))
    assert images.images.shape == (xray.RANDOM_IMAGES, 16, 12, 3) and len(images) == xray.RANDOM_IMAGES
    assert images.images.min() == 0 and images.images.max() == 255


def test_a_tflite_is_looked_at_as_it_is(tiny):
    path = str(tiny.path("int8"))
    assert xray.xray_model(path, "cpu") == (look(path, "cpu"), "")
    with pytest.raises(InputError, match="already converted"):
        xray.xray_model(path, "cpu", scheme="int8")


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("nowhere.keras", {}, "does not exist"),
        ("nowhere.tflite", {}, "cannot be read"),
        ("keras:MobileNetV9", {}, "MobileNetV3Large"),
        ("little.keras", {"delegate": "npu"}, "cpu, edgetpu, gpu"),
        ("little.keras", {"scheme": "int9"}, "int8"),
        ("README.md", {}, "does not exist|not a Keras model"),
    ],
)
def test_what_cannot_be_looked_at_is_a_problem(model, options, said):
    with pytest.raises(Problem, match=said):
        xray.xray_model(model, **{"delegate": "cpu", **options})


def test_the_command_on_an_untrained_model(untrained):
    done = CliRunner().invoke(app, ["xray", str(untrained), "--delegate", "cpu", "--json"])
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1 and found["scheme"] == "float32" and found["saved"] is None
    assert (found["delegated"], found["fallback"], found["partitions"]) == (len(found["ops"]), 0, 1)
    assert (found["ops"][0]["op"], found["ops"][0]["layer"]) == ("CONV_2D", "stem")
    assert found["notes"][0] == "Converted as float32 for this look alone"


def test_a_report_is_stored_beside_a_tflite_only(untrained, tiny, tmp_path):
    refused = CliRunner().invoke(app, ["xray", str(untrained), "--delegate", "cpu", "--save"])
    assert "no file to store" in str(refused.exception)
    file = tmp_path / "model.tflite"
    file.write_bytes(tiny.path("int8").read_bytes())
    assert CliRunner().invoke(app, ["xray", str(file), "--delegate", "cpu", "--save"]).exit_code == 0
    assert json.loads((tmp_path / "xray/cpu.json").read_text())["report"]["partitions"] == 2


def test_a_pruned_file_in_sparse_form_qualifies_for_sparse_kernels():
    import numpy as np
    import tensorflow as tf

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)), layers.ZeroPadding2D(1), layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Conv2D(32, 1, name="narrow"), layers.GlobalAveragePooling2D(), layers.Dense(4),
        ]
    )  # fmt: skip
    narrow = model.get_layer("narrow")
    kernel, bias = narrow.get_weights()
    narrow.set_weights([kernel * (np.random.default_rng(0).random(kernel.shape) > 0.9), bias])
    image = tf.TensorSpec((1, 16, 16, 3))
    graph = tf.function(lambda image: model(image, training=False)).get_concrete_function(image)
    owner = tf.Module()
    owner.kept = [weight.value for weight in model.weights]

    def converted(*optimizations):
        converter = tf.lite.TFLiteConverter.from_concrete_functions([graph], owner)
        converter.optimizations = list(optimizations)
        return look(converter.convert(), "cpu")

    (dense,) = [note for note in converted().notes if note.startswith("Sparse")]
    assert dense.startswith("Sparse kernels: no") and "sparse form (DENSIFY)" in dense and "thirds" not in dense
    report = converted(tf.lite.Optimize.EXPERIMENTAL_SPARSITY)
    (sparse,) = [note for note in report.notes if note.startswith("Sparse")]
    assert "DENSIFY" in [op.op for op in report.ops] and report.fallback == 0
    assert "1x1 convolutions (1, " in sparse and "qualify (predicted" in sparse and "not measured" in sparse
