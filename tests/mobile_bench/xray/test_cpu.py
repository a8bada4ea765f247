"""What XNNPACK takes, as the real runtime reports it, and the reasons for what it leaves."""

import dataclasses
import json

import numpy as np
import pytest

from mobile_bench.errors import JobFailed, ModelRefused
from mobile_bench.flatbuffer import read_model
from mobile_bench.xray import xray
from mobile_bench.xray.cpu_rules import UNSAID, objection, why
from mobile_bench.xray.cpu_sparse import sparse_note
from mobile_bench.xray.rules import nodes

from ..small_graphs import write_chain


def _left(report):
    return {op.op: op for op in report.ops if op.runs_on == "cpu"}


def test_a_float_network_but_for_its_flatten(tiny):
    report = xray(tiny.path("float32"), "cpu")
    assert (report.delegate, report.backend, report.delegated, report.fallback) == ("cpu", "xnnpack", 4, 4)
    assert [op.index for op in report.ops] == list(range(8))
    assert report.partitions == 2 and report.asked.startswith("XNNPACK in ai-edge-litert")
    left = _left(report)
    assert list(left) == ["SHAPE", "STRIDED_SLICE", "PACK", "RESHAPE"]
    assert "no kernel for SHAPE" in left["SHAPE"].reason and left["SHAPE"].source.endswith("VisitNode")
    assert "shrink_axis_mask" in left["STRIDED_SLICE"].reason and "0:1" in left["STRIDED_SLICE"].fix
    assert "computed at run time" in left["RESHAPE"].reason and "fixed batch" in left["RESHAPE"].fix
    assert left["PACK"].layer == "flatten"
    assert any("3 dense float (f32)" in note for note in report.notes)
    assert report.weights_bytes > 5000 and report.activation_bytes > 0 and report.disagreements == ()


def test_8_bits(tiny):
    report = xray(tiny.path("int8").read_bytes(), "cpu")  # bytes do as well as a path
    softmax = _left(report)["SOFTMAX"]
    assert "has int8" in softmax.reason and "logits" in softmax.fix and softmax.source.endswith("VisitSoftmaxNode")
    assert any("3 int8 (qs8)" in note for note in report.notes)
    quantize = [op for op in xray(tiny.path("uint8"), "cpu").ops if op.op == "QUANTIZE"]
    assert [op.reason for op in quantize] == ["it goes from uint8 to int8", "it goes from int8 to uint8"]


def test_nothing_is_taken_of_16_bit_values(tiny):
    report = xray(tiny.path("int16"), "cpu")
    assert report.delegated == report.partitions == report.weights_bytes == 0
    assert all("int16" in op.reason for op in report.ops if op.op in ("CONV_2D", "FULLY_CONNECTED", "SOFTMAX"))


def test_float16_weights_are_unpacked_by_the_delegate(tiny):
    report = xray(tiny.path("float16"), "cpu")
    assert all(op.runs_on == "delegate" for op in report.ops if op.op == "DEQUANTIZE")


def test_an_open_size_is_given_one(tiny):
    report = xray(tiny.path("open_size"), "cpu")
    assert report.fallback == 0 and any("(1, 224, 224, 3)" in note for note in report.notes)


def test_what_stops_a_file_is_named(tiny, tmp_path):
    with pytest.raises(ModelRefused, match="made-up-op"):
        xray(tiny.path("custom_op"), "cpu")
    with pytest.raises(ModelRefused, match="compiled for the Edge TPU"):
        xray(write_chain(tmp_path / "compiled.tflite", "EDGETPU"), "cpu")
    with pytest.raises(ModelRefused, match="damaged"):
        xray(tiny.path("truncated"), "cpu")
    with pytest.raises(JobFailed, match="SIGSEGV"):
        xray(tiny.path("self_calling"), "cpu")


def test_a_chain_of_operations_is_cut_where_one_has_no_kernel(tmp_path):
    report = xray(write_chain(tmp_path / "m.tflite", "ABS", "CUMSUM", "ADD", "NEG"), "cpu")
    assert [op.runs_on for op in report.ops] == ["delegate", "cpu", "delegate", "delegate"]
    assert report.partitions == 2 and "CUMSUM" in report.ops[1].reason


def test_the_rules_agree_with_the_runtime(tiny, shared_model):
    """Of every operation of real files: what XNNPACK takes no rule objects to, what it leaves a rule explains."""
    for name in ("mobilenet_v2_1.0_224_quant", "deeplab_mobilenet_edgetpu_slim_cityscapes_quant", "split_concat"):
        report = xray(shared_model(f"{name}.tflite"), "cpu")
        assert report.disagreements == ()
        assert report.fallback and all(op.reason != UNSAID.reason for op in report.ops if op.runs_on == "cpu")


def test_nothing_is_guessed_where_no_rule_objects(tiny):
    node = next(node for node in nodes(read_model(tiny.path("float32"))) if node.op == "SOFTMAX")
    assert objection(node) is None
    assert why(node).reason == "XNNPACK left it and does not say why" and why(node).fix == ""


def _pruned(tiny, zeros: float):
    """The nodes of the tiny float network with this share of the 1x1 convolutions' weights zero."""
    found = []
    for node in nodes(read_model(tiny.path("float32"))):
        if node.op == "CONV_2D":
            kernel = node.input(1)
            model = _WithConstant(node.model, kernel, zeros)
            tensors = list(node.graph.tensors)
            tensors[kernel.index] = dataclasses.replace(kernel, shape=(8, 1, 1, 9))
            options = {**node.options, "stride_h": 1, "stride_w": 1}
            operator = dataclasses.replace(node.operator, options=options)
            node = dataclasses.replace(
                node, model=model, graph=dataclasses.replace(node.graph, tensors=tuple(tensors)), operator=operator
            )
        found.append(node)
    return tuple(found)


class _WithConstant:
    def __init__(self, model, tensor, zeros: float):
        self._model, self._index = model, tensor.index
        self._values = (np.linspace(0, 1, 72, endpoint=False) >= zeros).astype(np.float32).reshape(8, 1, 1, 9)

    def constant(self, tensor):
        return self._values if tensor.index == self._index else self._model.constant(tensor)


def test_sparse_kernels_are_predicted_with_what_is_missing(tiny):
    assert sparse_note(_pruned(tiny, 0.1)) == ""  # nobody pruned it
    half = sparse_note(_pruned(tiny, 0.5))
    assert half.startswith("Sparse kernels: no (predicted") and "not measured" in half and "they have 50%" in half
    assert "DENSIFY" in half and "3x3 convolution of stride 2" in half
    assert "they have" not in sparse_note(_pruned(tiny, 0.9))


def test_asking_names_the_kernels(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (note,) = [note for note in xray(tiny.path("float32"), "cpu", ask=True).notes if "profiler" in note]
    assert "Convolution" in note and "Softmax" in note


def test_it_is_plain_values(tiny):
    found = json.loads(json.dumps(xray(tiny.path("float32"), "cpu").to_dict()))
    assert found["delegated"] == 4 and found["ops"][2]["runs_on"] == "cpu" and found["ops"][0]["said"] == "delegate"
