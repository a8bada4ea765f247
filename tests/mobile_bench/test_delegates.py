"""Delegates: a real one, compiled here, that takes additions, and all the ways in which one fails."""

from pathlib import Path

import numpy as np
import pytest

from mobile_bench import delegates
from mobile_bench.delegates import Wanted, drift_of, split
from mobile_bench.errors import DelegateError, InputError, JobFailed
from mobile_bench.jobs import run_job
from mobile_bench.records import Tensor

from .small_graphs import write_chain

SCORES = Tensor("scores", (1, 4), "float32")


@pytest.fixture
def run(tmp_path):
    """run(path, accelerator=..., ...) -> the worker's answer about a file."""

    def run(path, **asked):
        job = {"tflite": str(path), "threads": 1, "runtime": "auto", "batch": 1, "runs": 3, "max_runs": 3, "seed": 0}
        asked = {key: str(value) if isinstance(value, Path) else value for key, value in asked.items()}
        return run_job("mobile_bench.worker", {**job, "spec": None, **asked}, tmp_path, timeout_s=60)

    return run


def test_a_delegate_takes_its_operations_and_is_timed(run, adder, tmp_path):
    found = run(write_chain(tmp_path / "two.tflite", "ADD", "ADD"), accelerator="external", delegate=adder)
    assert (found["delegated_ops"], found["fallback_ops"], found["output_drift"]) == (["ADD", "ADD"], [], 0.0)
    assert len(found["latency_ms"]) == 3 and found["peak_rss_bytes"] > found["base_rss_bytes"]
    assert found["device"]["delegate"] == "adder.so" and "timed" not in found["device"]


def test_on_the_cpu_nothing_of_it_is_said(run, tmp_path):
    found = run(write_chain(tmp_path / "one.tflite", "ADD"))
    assert not {"delegated_ops", "fallback_ops", "output_drift"} & set(found)
    assert not {"delegate", "accelerator", "timed"} & set(found["device"])


def test_what_is_left_to_the_cpu_must_be_allowed(run, adder, tmp_path):
    mixed = write_chain(tmp_path / "mixed.tflite", "LOGISTIC", "ADD", "EXP", "ADD", "LOGISTIC")
    with pytest.raises(DelegateError, match=r"leaves 3 of 5 operations to the CPU.*2 LOGISTIC, 1 EXP.*allow-fallback"):
        run(mixed, accelerator="external", delegate=adder)
    for batch in (1, 4):
        found = run(mixed, accelerator="external", delegate=adder, allow_fallback=True, batch=batch)
        assert found["delegated_ops"] == ["ADD", "ADD"] and found["input_shape"] == [batch, 8]
        assert found["fallback_ops"] == ["LOGISTIC", "EXP", "LOGISTIC"], "XNNPACK is not the delegate"
        assert any("3 of 5 operations" in warning for warning in found["warnings"])


def test_a_delegate_that_takes_nothing_is_no_measurement(run, adder, tmp_path):
    path = write_chain(tmp_path / "one.tflite", "LOGISTIC")
    with pytest.raises(DelegateError, match=r"takes none of the file's operations. Received: 1 LOGISTIC\..*manual"):
        run(path, accelerator="external", delegate=adder, allow_fallback=True)
    with pytest.raises(DelegateError, match="edgetpu_compiler -s"):
        run(path, accelerator="edgetpu", delegate=adder, allow_fallback=True)


def test_a_wrong_answer_is_refused_and_a_rounded_one_is_reported(run, adder, tmp_path):
    asked = {"accelerator": "external", "delegate": adder}
    path = write_chain(tmp_path / "one.tflite", "ADD")
    found = run(path, **asked, delegate_options={"bias": "0.001"})
    assert 0.0004 < found["output_drift"] < 0.0012 and found["device"]["delegate_options"] == {"bias": "0.001"}
    with pytest.raises(DelegateError, match=r"'add_0' differs from the CPU by \d\d.*tolerance 5.00%.*Do not use"):
        run(path, **asked, delegate_options={"bias": "0.5"})
    with pytest.raises(DelegateError, match="differs from the CPU"):
        run(path, **asked, delegate_options={"bias": "nan"})


def test_the_reference_may_be_another_file(run, adder, tmp_path):
    one, two = (write_chain(tmp_path / f"{n}.tflite", *["ADD"] * n) for n in (1, 2))
    asked = {"accelerator": "external", "delegate": adder}
    assert run(one, **asked, reference=one)["output_drift"] == 0
    with pytest.raises(DelegateError, match="differs from the CPU"):
        run(one, **asked, reference=two)
    with pytest.raises(DelegateError, match=r"The delegate gives other outputs than the CPU.*\(1, 8\)"):
        run(one, **asked, delegate_options={"early": "1"}, batch=2)
    other = write_chain(tmp_path / "other.tflite", "ADD", shape=(1, 9))
    with pytest.raises(DelegateError, match="The reference has other inputs than the file"):
        run(one, **asked, reference=other)


def test_a_compiled_file_is_compared_with_the_one_that_it_was_compiled_from(run, adder, tmp_path):
    compiled = write_chain(tmp_path / "one_edgetpu.tflite", "EDGETPU")
    plain, other = write_chain(tmp_path / "one.tflite", "ADD"), write_chain(tmp_path / "other.tflite", "EXP")
    asked = {"accelerator": "edgetpu", "delegate": adder, "delegate_options": {"early": "1"}}
    with pytest.raises(DelegateError, match=r"the CPU cannot run this file. Received: edgetpu-custom-op.*--reference"):
        run(compiled, **asked)
    found = run(compiled, **asked, reference=plain)
    assert found["delegated_ops"] == ["edgetpu-custom-op"] and found["output_drift"] == 0
    with pytest.raises(DelegateError, match=r"differs from the CPU by \d.*tolerance 2.00%"):
        run(compiled, **asked, reference=other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"colour": "red"}, r"would not start. Received: unknown option colour \(options: colour=red\)"),
        ({"fails": "1"}, "The delegate failed on this file"),
    ],
)
def test_a_delegate_that_refuses(run, adder, tmp_path, options, words):
    path = write_chain(tmp_path / "one.tflite", "ADD")
    with pytest.raises(DelegateError, match=words):
        run(path, accelerator="external", delegate=adder, delegate_options=options)


def test_a_delegate_that_crashes_ends_its_process_only(run, adder, tmp_path):
    path = write_chain(tmp_path / "one.tflite", "ADD")
    with pytest.raises(JobFailed, match=r"SIGABRT.*adder.so takes over .*one.tflite"):
        run(path, accelerator="external", delegate=adder, delegate_options={"crash": "1"})


def test_a_library_that_is_not_there_or_no_delegate(tmp_path, adder):
    text = tmp_path / "text.so"
    text.write_text("this is no library\n")
    for name, words in (
        (str(tmp_path / "none.so"), "cannot be loaded.*whole path"),
        (str(text), "cannot be loaded.*built for this machine"),
        ("libm.so.6", "not a TFLite delegate. Received: libm.so.6 without tflite_plugin_create_delegate"),
    ):
        with pytest.raises(DelegateError, match=words):
            delegates.load(Wanted("external", name))
    with pytest.raises(DelegateError, match=r"would not start.*lsusb"):
        delegates.load(Wanted("edgetpu", str(adder), {"colour": "red"}))


def test_without_the_edge_tpus_library_it_says_where_it_is_from(run, tmp_path):
    with pytest.raises(DelegateError, match=r"apt install libedgetpu1-std, from Coral's repository"):
        run(write_chain(tmp_path / "one.tflite", "ADD"), accelerator="edgetpu", delegate="libedgetpu-not-here.so.1")


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"accelerator": "gpus"}, "no accelerator of that name.*Did you mean gpu"),
        ({"accelerator": "external"}, "needs its library.*--delegate PATH"),
        ({"accelerator": "gpu", "delegate": "x.so"}, "not through a library"),
    ],
)
def test_a_job_that_makes_no_sense(job, words):
    with pytest.raises(InputError, match=words):
        Wanted.of(job)


def test_the_edge_tpu_has_a_library_of_its_own():
    assert Wanted.of({}) is None and Wanted.of({"accelerator": "cpu", "delegate": "x.so"}) is None
    assert Wanted.of({"accelerator": "edgetpu"}).library == "libedgetpu.so.1"
    assert Wanted.of({"accelerator": "edgetpu", "delegate": "/opt/x.so"}).library == "/opt/x.so"


def test_files_in_turns_go_through_the_delegate_too(adder, tmp_path):
    one, two = (write_chain(tmp_path / f"{n}.tflite", *["ADD"] * n) for n in (1, 2))
    job = {
        "tflites": 2, "specs": [None, None], "threads": 1, "runtime": "auto", "batch": 1, "seed": 0, "order_seed": 1,
        "seconds": 0.05, "tflite_0": str(one), "tflite_1": str(two), "accelerator": "external", "delegate": str(adder),
    }  # fmt: skip
    found = run_job("mobile_bench.interleave", job, tmp_path, timeout_s=60)
    assert found["delegated_ops"] == [["ADD"], ["ADD", "ADD"]] and found["fallback_ops"] == [[], []]
    assert found["output_drift"] == [0.0, 0.0] and len(found["blocks"]) >= 3
    with pytest.raises(DelegateError, match="differs from the CPU"):
        run_job("mobile_bench.interleave", {**job, "reference_1": str(one)}, tmp_path, timeout_s=60)


def test_a_kernel_stands_for_what_lies_between_its_inputs_and_outputs():
    def operation(index, name, inputs, outputs):
        return {"index": index, "op_name": name, "inputs": np.array(inputs), "outputs": np.array(outputs)}

    branches = [
        operation(0, "PAD", [0], [1]), operation(1, "CONV_2D", [1, 9], [2]), operation(2, "MEAN", [1], [3]),
        operation(3, "ADD", [2, 3], [4]), operation(4, "SOFTMAX", [4, -1], [5]),
    ]  # fmt: skip
    kernel = operation(5, "DELEGATE", [1, 9], [4])
    assert split(branches, [kernel]) == (("CONV_2D", "MEAN", "ADD"), ("PAD", "SOFTMAX"))
    assert split(branches, []) == ((), ("PAD", "CONV_2D", "MEAN", "ADD", "SOFTMAX"))


def test_drift_is_a_share_of_the_largest_value():
    expected = np.array([[0.5, -2.0, 1.0, 0.0]], np.float32)
    assert drift_of(expected + np.float32([[0, 0.25, 0, 0]]), expected, SCORES) == pytest.approx(0.125)
    assert drift_of(expected, expected, SCORES) == 0
    assert drift_of(expected, 0 * expected, SCORES) == drift_of(np.nan * expected, expected, SCORES) == np.inf
    assert drift_of(np.nan * expected, np.nan * expected, SCORES) == 0
    stored = np.array([[0, 64, -64, 127]], np.int8)
    assert drift_of(stored + np.int8([[0, 0, 0, -2]]), stored, Tensor("q", (1, 4), "int8", 0.5, 27)) == 1 / 50
    assert drift_of(stored + np.int8([[0, 0, 0, -2]]), stored, Tensor("classes", (1, 4), "int8")) == 0.25


def test_another_winner_is_refused_unless_it_was_a_tie():
    wanted = Wanted("external", "x.so")
    expected = np.array([[0.50, 0.47, 0.02, 0.01]], np.float32)
    with pytest.raises(DelegateError, match="names class 1 where the CPU names 0"):
        delegates._check_output(np.array([[0.48, 0.49, 0.02, 0.01]], np.float32), expected, SCORES, wanted, "")
    close = np.array([[0.500, 0.497, 0.002, 0.001]], np.float32)
    drift = delegates._check_output(close[:, [1, 0, 2, 3]], close, SCORES, wanted, "")
    assert drift == pytest.approx(0.006, rel=1e-3)


def test_a_quantized_output_may_be_two_steps_off():
    coarse, wanted = Tensor("q", (1, 2), "uint8", 0.1, 0), Wanted("edgetpu", "x.so")
    expected = np.array([[10, 4]], np.uint8)
    assert delegates._check_output(np.array([[10, 6]], np.uint8), expected, coarse, wanted, "") == pytest.approx(0.2)
    with pytest.raises(DelegateError, match=r"by 30.00% of its largest value \(tolerance 25.00%\)"):
        delegates._check_output(np.array([[10, 7]], np.uint8), expected, coarse, wanted, "")
