"""One face over the runtimes, on real files."""

import numpy as np
import pytest

from mobile_bench.errors import InputError, ModelRefused
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import check_is_tflite, dequantize, load_runtime, open_model, quantize
from mobile_bench.records import Tensor

SPEC = InputSpec(12, 12, 3)


def answers(path, images, **options):
    model = open_model(path, **options)
    return np.concatenate([model.invoke(SPEC.normalize(image[None]))[0] for image in images])


@pytest.mark.parametrize(
    ("name", "tolerance"), [("float32", 1e-5), ("float16", 5e-3), ("int8", 0.08), ("uint8", 0.08), ("int16", 5e-3)]
)
def test_a_file_answers_as_its_keras_model_does(tiny, name, tolerance):
    found = answers(tiny.path(name), tiny.images[:60])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, tiny.keras["softmax"][:60], atol=tolerance)
    assert found.std(axis=0).max() > 0.05, "the answers hardly depend on the image"


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", "float32"), ("int8", "int8"), ("uint8", "uint8"), ("int16", "int16")]
)
def test_it_says_what_the_file_takes_and_gives(tiny, name, dtype):
    model = open_model(tiny.path(name))
    (taken,), (given,) = model.inputs, model.outputs
    assert (taken.shape, taken.dtype, given.shape, given.dtype) == ((1, 12, 12, 3), dtype, (1, 4), dtype)
    assert (taken.scale > 0) == (dtype != "float32")
    assert model.runtime.name == "ai-edge-litert" and model.runtime.version[0].isdigit()


def test_threads_and_batches_do_not_change_the_answers(tiny):
    one = answers(tiny.path("float32"), tiny.images[:6])
    np.testing.assert_array_equal(answers(tiny.path("float32"), tiny.images[:6], threads=2), one)
    six = open_model(tiny.path("float32"), batch=6)
    assert six.inputs[0].shape == (6, 12, 12, 3)
    np.testing.assert_allclose(six.invoke(SPEC.normalize(tiny.images[:6]))[0], one, atol=1e-6)


def test_several_inputs_and_outputs(tiny):
    given = np.ones((1, 12, 12, 3), np.float32)
    pair = open_model(tiny.path("two_inputs"))
    (both,), (left,) = pair.invoke(given, given), pair.invoke(given, 0 * given)
    assert both.shape == (1, 3) and not np.allclose(both, left)
    assert sorted(t.shape for t in open_model(tiny.path("two_outputs")).outputs) == [(1, 10, 10, 2), (1, 432)]
    with pytest.raises(ModelRefused, match=r"Received: 1\. Allowed: 2"):
        pair.invoke(given)


def test_an_open_size_must_be_said(tiny):
    with pytest.raises(ModelRefused, match="--input-spec size="):
        open_model(tiny.path("open_size"))
    model = open_model(tiny.path("open_size"), size=(20, 16))
    assert model.inputs[0].shape == (1, 20, 16, 3)
    assert model.invoke(np.zeros((1, 20, 16, 3), np.float32))[0].shape == (1, 4)


def test_a_wrong_input_shape_is_refused_in_words(tiny):
    with pytest.raises(ModelRefused, match="refused"):
        open_model(tiny.path("float32")).invoke(np.zeros((1, 8, 8, 3), np.float32))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text", "not a TensorFlow Lite file.*starts with b'this is '"),
        ("empty", "not a TensorFlow Lite file.*empty"),
        ("truncated", "truncated or damaged.*4410 bytes|truncated or damaged"),
        ("custom_op", "operation that this runtime does not have. Received: made-up-op"),
    ],
)
def test_a_bad_file_is_refused_in_words(tiny, name, words):
    with pytest.raises(ModelRefused, match=words):
        open_model(tiny.path(name))


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.tflite", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            check_is_tflite(path)


def test_an_unknown_runtime_names_those_that_exist():
    with pytest.raises(InputError, match="ai-edge-litert") as caught:
        load_runtime("ai-edge-liter")
    assert "Did you mean" in str(caught.value)


def test_the_runtimes_chatter_does_not_reach_the_user(tiny, run_python):
    code = (
        "import sys, numpy as np; from mobile_bench.interpreter import open_model\n"
        "m = open_model(sys.argv[1]); m.invoke(np.zeros((1, 12, 12, 3), np.float32)); print('heard', file=sys.stderr)"
    )
    done = run_python("-c", code, tiny.path("float32"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "heard\n")


def test_what_else_is_said_on_standard_error_is_kept(run_python):
    code = (
        "import os; from mobile_bench.interpreter import _quiet\n"
        "with _quiet(): os.write(2, b'INFO: chatter\\nERROR: kernel on fire\\n')"
    )
    assert run_python("-c", code).stderr == "ERROR: kernel on fire\n"


def test_quantization_is_the_papers_equation():
    tensor = Tensor("x", (1, 4), "int8", 0.5, -10)
    stored = quantize(np.array([[0.0, 0.6, -1.0, 1000.0]], np.float32), tensor)
    assert stored.tolist() == [[-10, -9, -12, 127]] and stored.dtype == np.int8
    assert dequantize(stored, tensor).tolist() == [[0.0, 0.5, -1.0, 68.5]]
    plain = Tensor("x", (1, 2), "uint8")
    assert quantize(np.array([[254.6, -3.0]], np.float32), plain).tolist() == [[255, 0]]


def test_quantization_leaves_the_given_values_alone():
    values = np.array([[0.25, 0.75]], np.float32)
    quantize(values, Tensor("x", (1, 2), "int8", 0.5, 3))
    assert values.tolist() == [[0.25, 0.75]]
