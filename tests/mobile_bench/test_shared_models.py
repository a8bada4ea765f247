"""Third-party files, where they are at hand: other converters, other shapes, other operations."""

import numpy as np
import pytest

from mobile_bench.evaluate import predictions_only
from mobile_bench.inputs import InputSpec
from mobile_bench.measure import measure


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "shape"), [("mobilenet_v1_0.25_128_quant", (1, 128, 128, 3)), ("split_concat", (1, 8, 8, 3))]
)
def test_they_are_measured(shared_model, name, shape):
    found = measure(shared_model(f"{name}.tflite"), max_runs=50, rounds=1, seconds=0)
    assert found.status == "ok" and found.input_shape == shape and len(found.latency_ms) == 50


@pytest.mark.parametrize(
    ("name", "word"),
    [("mobilenet_v1_0.25_128_quant_edgetpu", "compiled for the Edge TPU"), ("invalid_custom_op", "fake-op-double")],
)
def test_they_are_refused_in_words(shared_model, name, word):
    found = measure(shared_model(f"{name}.tflite"))
    assert found.status == "refused" and word in found.reason


def test_a_quantized_classifier_answers_alike_with_any_number_of_workers(shared_model):
    images = np.random.default_rng(0).integers(0, 256, (24, 128, 128, 3), np.uint8)
    run = lambda workers: predictions_only(
        shared_model("mobilenet_v1_0.25_128_quant.tflite"), images, InputSpec(128, 128, 3), workers=workers
    )
    assert run(1).tolist() == run(3).tolist()
