"""Accuracy by the file itself."""

import json

import numpy as np
import pytest

from mobile_bench.cli import app
from mobile_bench.cli_support import exit_code_of
from mobile_bench.errors import DataError, DelegateError, InputError, JobFailed, ModelRefused
from mobile_bench.evaluate import (
    choose_workers,
    classes_of,
    evaluate,
    evaluate_apart,
    predictions_only,
    read_sample,
)
from mobile_bench.inputs import InputSpec
from mobile_bench.interpreter import load_runtime
from mobile_bench.records import Delegate, Target

from .small_graphs import write_chain

SPEC = InputSpec(12, 12, 3)


def bare_loop(path, images):
    """The answers of the runtime itself, one image at a time, with nothing of ours but the scaling."""
    interpreter = load_runtime().interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    found = []
    for image in images:
        value = (image[None].astype(np.float32) - np.float32(127.5)) / np.float32(127.5)
        scale, zero = taken["quantization"]
        if scale:
            limits = np.iinfo(taken["dtype"])
            value = np.clip(np.rint(value / np.float32(scale)) + zero, limits.min, limits.max)
        interpreter.set_tensor(taken["index"], value.astype(taken["dtype"]))
        interpreter.invoke()
        found.append(int(interpreter.get_tensor(given["index"])[0].argmax()))
    return found


@pytest.mark.parametrize("name", ["float32", "float16", "int8", "uint8", "int16"])
@pytest.mark.parametrize("workers", [1, 3])
def test_predictions_are_those_of_the_bare_loop(tiny, name, workers):
    found = evaluate(tiny.path(name), tiny.images, tiny.labels, SPEC, workers=workers)
    expected = bare_loop(tiny.path(name), tiny.images)
    assert found.predictions.tolist() == expected
    assert len(set(expected)) > 1, "a model that always answers the same proves nothing"
    assert found.correct == sum(a == b for a, b in zip(expected, tiny.labels))
    assert (found.images, found.workers) == (300, workers)
    assert found.top1 == found.correct / 300


def test_a_float_file_agrees_with_keras_on_every_image(tiny):
    found = predictions_only(tiny.path("float32"), tiny.images, SPEC)
    assert found.tolist() == tiny.keras["softmax"].argmax(axis=1).tolist()


def test_the_scaling_of_the_spec_is_what_the_file_sees(tiny):
    right = predictions_only(tiny.path("float32"), tiny.images, SPEC)
    wrong = predictions_only(tiny.path("float32"), tiny.images, SPEC.with_scaling("raw"))
    assert (right != wrong).any()


def test_it_says_what_ran(tiny):
    found = evaluate(tiny.path("int8"), tiny.images[:5], tiny.labels[:5], SPEC)
    assert found.runtime.startswith("ai-edge-litert ")
    assert found.inputs[0].dtype == "int8" and found.outputs[0].shape == (1, 4)
    assert found.workers == 1, "five images are not worth a second interpreter"


def test_images_of_another_size_are_resized(tiny):
    large = tiny.images[:4].repeat(2, axis=1).repeat(2, axis=2)
    found = predictions_only(tiny.path("float32"), large, SPEC)
    assert found.tolist() == predictions_only(tiny.path("float32"), SPEC.fit(large), SPEC).tolist()


def test_images_may_be_loaded_slice_by_slice(tiny):
    class Lazy:
        def __init__(self):
            self.most = 0

        def __len__(self):
            return len(tiny.images)

        def __getitem__(self, part):
            self.most = max(self.most, part.stop - part.start)
            return tiny.images[part]

    lazy = Lazy()
    found = predictions_only(tiny.path("float32"), lazy, SPEC, workers=2)
    assert found.tolist() == predictions_only(tiny.path("float32"), tiny.images, SPEC).tolist()
    assert lazy.most <= 256


def test_progress_ends_at_the_count_and_never_goes_back(tiny):
    seen = []
    predictions_only(tiny.path("float32"), tiny.images, SPEC, workers=2, progress=lambda *step: seen.append(step))
    assert seen[-1] == (300, 300) and seen == sorted(seen)


def test_heads():
    outputs = np.array([[0.2], [0.5], [0.7]], np.float32)
    assert classes_of(outputs, "sigmoid").tolist() == [0, 0, 1]
    assert classes_of(outputs - 0.6, "logits").tolist() == [0, 0, 1]
    assert classes_of(np.array([[-3.0, -1.0, -1.0]], np.float32), "logits").tolist() == [1]


def test_a_single_sigmoid_output_is_two_classes(tiny):
    spec = InputSpec(12, 12, 3, head="sigmoid")
    found = predictions_only(tiny.path("sigmoid"), tiny.images, spec)
    assert found.tolist() == (tiny.keras["sigmoid"][:, 0] > 0.5).astype(int).tolist()
    assert 0 < found.sum() < len(found)
    with pytest.raises(InputError, match="head=sigmoid"):
        predictions_only(tiny.path("sigmoid"), tiny.images, SPEC)


def test_logits(tiny):
    found = predictions_only(tiny.path("logits"), tiny.images, InputSpec(12, 12, 3, head="logits"))
    assert found.tolist() == tiny.keras["logits"].argmax(axis=1).tolist()


def test_labels_that_do_not_fit(tiny):
    with pytest.raises(DataError, match=r"Received: 4\. Allowed: 0 to 3"):
        evaluate(tiny.path("float32"), tiny.images[:2], np.array([0, 4]), SPEC)
    with pytest.raises(DataError, match="Labels do not fit"):
        evaluate(tiny.path("float32"), tiny.images[:3], np.array([0, 1]), SPEC)
    with pytest.raises(DataError, match="Labels do not fit"):
        evaluate(tiny.path("float32"), tiny.images[:2], np.array([0.0, 1.0]), SPEC)
    with pytest.raises(InputError, match="another number of classes"):
        predictions_only(tiny.path("float32"), tiny.images[:2], InputSpec(12, 12, 3, labels=("cat", "dog")))


def test_images_that_do_not_fit(tiny):
    with pytest.raises(DataError, match="no images"):
        predictions_only(tiny.path("float32"), tiny.images[:0], SPEC)
    with pytest.raises(DataError, match="wrong form"):
        predictions_only(tiny.path("float32"), tiny.images[:2].astype(np.float32), SPEC)
    with pytest.raises(InputError, match=r"\(1, 12, 12, 3\).*\(1, 16, 16, 3\)"):
        predictions_only(tiny.path("float32"), tiny.images[:2], InputSpec(16, 16, 3))


def test_files_that_do_not_classify(tiny):
    with pytest.raises(ModelRefused, match="not an image classifier"):
        predictions_only(tiny.path("two_outputs"), tiny.images[:2], SPEC)
    with pytest.raises(InputError, match="does not take the images"):
        predictions_only(tiny.path("two_inputs"), tiny.images[:2], SPEC)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_answer_that_is_no_number_is_refused_not_counted(tiny, workers):
    with pytest.raises(ModelRefused, match="NaN"):
        predictions_only(tiny.path("not_a_number"), tiny.images, SPEC, workers=workers)


def test_an_open_size_is_taken_from_the_spec(tiny):
    assert len(predictions_only(tiny.path("open_size"), tiny.images[:3], SPEC)) == 3


def test_workers_are_chosen_by_predicted_cost():
    assert choose_workers(remaining_s=5.0, open_s=0.01, cores=2) == 2
    assert choose_workers(remaining_s=5.0, open_s=0.01, cores=1) == 1
    assert choose_workers(remaining_s=0.01, open_s=0.01, cores=8) == 1
    assert choose_workers(remaining_s=5.0, open_s=2.0, cores=8) == 1
    assert 2 < choose_workers(remaining_s=1.0, open_s=0.01, cores=64) < 16


def test_a_sample_in_a_child_process(tiny):
    found = evaluate_apart(tiny.path("int8"), tiny.sample, SPEC)
    here = evaluate(tiny.path("int8"), tiny.images, tiny.labels, SPEC)
    assert found.predictions.tolist() == here.predictions.tolist()
    assert (found.correct, found.inputs, found.outputs, found.runtime) == (
        here.correct, here.inputs, here.outputs, here.runtime,
    )  # fmt: skip


def test_a_file_that_crashes_the_runtime_is_a_failed_job(tiny, tmp_path):
    np.savez(tmp_path / "one.npz", images=tiny.images[:1], labels=tiny.labels[:1])
    with pytest.raises(JobFailed, match="SIG"):
        evaluate_apart(tiny.path("self_calling"), tmp_path / "one.npz", SPEC)


def test_problems_of_the_child_come_back_as_they_are(tiny):
    with pytest.raises(ModelRefused, match="truncated"):
        evaluate_apart(tiny.path("truncated"), tiny.sample, SPEC)


def test_samples_that_cannot_be_used(tiny, tmp_path):
    text, pickled, lacking, wrong = (tmp_path / f"{name}.npz" for name in ("text", "pickled", "lacking", "wrong"))
    text.write_text("hello")
    np.savez(pickled, images=np.array([{}], object), labels=tiny.labels)
    np.savez(lacking, images=tiny.images)
    np.savez(wrong, images=tiny.images.astype(np.float32), labels=tiny.labels)
    np.save(tmp_path / "array.npy", tiny.labels)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(tiny.sample.read_bytes()[:5000])
    for path in (text, pickled, lacking, wrong, cut, tmp_path / "array.npy", tmp_path / "none.npz", tmp_path):
        with pytest.raises(DataError, match="sample"):
            read_sample(path)


def test_an_accelerator_answers_the_sample_unless_it_leaves_some_to_the_cpu(adder, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 1, 3), np.uint8)
    np.savez(tmp_path / "sample.npz", images=images, labels=images.reshape(20, 3).argmax(1).astype(np.int32))
    target, spec = Target(accelerator="external"), InputSpec(1, 1, 3)
    answer = lambda *ops, **wanted: evaluate_apart(
        write_chain(tmp_path / "chain.tflite", *ops, shape=(1, 1, 1, 3)), tmp_path / "sample.npz", spec, target,
        delegate=Delegate(**wanted),
    )  # fmt: skip
    found = answer("ADD", "ADD", library=str(adder))
    assert (found.correct, found.images, found.workers) == (20, 20, 1)
    with pytest.raises(DelegateError, match="leaves 1 of 2 operations to the CPU"):
        answer("LOGISTIC", "ADD", library=str(adder))
    assert answer("LOGISTIC", "ADD", library=str(adder), allow_fallback=True).correct == 20
    with pytest.raises(DelegateError, match="not-there"):
        answer("ADD", library="/not-there.so")
    with pytest.raises(InputError, match="for another processor"):
        evaluate_apart(tmp_path / "chain.tflite", tmp_path / "sample.npz", spec, delegate=Delegate(library=str(adder)))


def test_the_command_sets_an_accelerator_beside_the_cpu_where_that_can_answer(adder, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 1, 3), np.uint8)
    np.savez(tmp_path / "sample.npz", images=images, labels=images.reshape(20, 3).argmax(1).astype(np.int32))

    def run(op, *more):
        file = write_chain(tmp_path / "chain.tflite", op, shape=(1, 1, 1, 3))
        command = ["evaluate", file, "--sample", tmp_path / "sample.npz", "--input-spec", "scaling=unit", "--json"]
        command += ["--accelerator", "external", "--delegate", adder, *more]
        code = exit_code_of(lambda **_: app([str(word) for word in command], standalone_mode=False))
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else None, said.err

    code, found, _ = run("ADD")
    assert (code, found["correct"], found["same_as_here"]) == (0, 20, 20)
    code, _, said = run("EXP")
    assert code == 2 and "none of the file's operations" in said
    code, found, said = run("EDGETPU", "--delegate-option", "early=1")
    assert (code, found["correct"], found["same_as_here"]) == (0, 20, None) and "edgetpu-custom-op" in said
    code, found, said = run("ADD", "--reference", tmp_path / "none.tflite")
    assert (code, found) == (2, None) and "none.tflite" in said


def test_images_without_a_height_are_refused(tmp_path):
    np.savez(tmp_path / "flat.npz", images=np.zeros((5, 0, 12, 3), np.uint8), labels=np.zeros(5, np.int32))
    with pytest.raises(DataError, match="wrong form"):
        read_sample(tmp_path / "flat.npz")
