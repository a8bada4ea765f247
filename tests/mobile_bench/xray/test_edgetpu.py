"""What the Edge TPU compiler maps: each documented rule on two tiny files, and real files with their compiled twins."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from mobile_bench.edgetpu_compiler import left_on_cpu
from mobile_bench.flatbuffer import read_model
from mobile_bench.xray import xray
from mobile_bench.xray.edgetpu_rules import MOST_AVERAGED, MOST_CLASSES, MOST_RESIZED_BYTES, RULES

from .tiny_graphs import Graph

IMAGE = (1, 8, 8, 4)
TYPE, UNKNOWN, RANK = "unsupported data type", "Operation not supported", "unsupported rank"
UNSPECIFIED, SUBGRAPHS = "unspecified limitation", "More than one subgraph"
SAME, WIDE = {"strideW": 1, "strideH": 1}, {"dilationWFactor": 2}


def one(kind, shape=IMAGE, *constants, out=IMAGE, dtype="int8", reads="int8", **options):
    """A file of one operation: it reads a tensor of `shape`, then constants, and gives `out`."""
    graph = Graph()
    inputs = [graph.input(shape, reads), *(graph.constant(np.array(*given)) for given in constants)]
    graph.op(kind, inputs, *(out if isinstance(out, list) else [out]), dtype=dtype, **options)
    return graph.content()


def weighted(kind, kernel=(4, 1, 1, 4), out=IMAGE, shape=IMAGE, constant=True, **options):
    graph = Graph()
    image = graph.input(shape)
    weights = graph.weights(kernel) if constant else graph.input(kernel)
    graph.op(kind, [image, weights, graph.constant([0] * kernel[0])], out, **options)
    return graph.content()


def two(kind, *shapes, out=IMAGE, constant=None, **options):
    """An operation that joins tensors, the last a constant where its value is given."""
    graph = Graph()
    inputs = [graph.input(shape) for shape in shapes]
    if constant is not None:
        inputs.append(graph.constant(np.full(IMAGE, constant), "int8"))
    graph.op(kind, inputs, out, **options)
    return graph.content()


def pool(kind, **options):
    return one(kind, out=(1, 4, 4, 4), filterWidth=2, filterHeight=2, strideW=2, strideH=2, **options)


def reduced(kind, axes, shape=IMAGE, out=(1, 4)):
    return one(kind, shape, (axes, "int32"), out=out, keepDims=False)


def transpose_conv(constant):
    graph = Graph()
    size, image = graph.constant([1, 16, 16, 4]), graph.input(IMAGE)
    graph.op(
        "TRANSPOSE_CONV", [size, graph.weights((4, 2, 2, 4)) if constant else graph.input((4, 2, 2, 4)), image],
        (1, 16, 16, 4), strideW=2, strideH=2,
    )  # fmt: skip
    return graph.content()


def lstm(bidirectional=False):
    graph = Graph()
    words = graph.input((1, 5, 8))
    state = graph.tensor((1, 4), "int8", variable=True), graph.tensor((1, 4), "int16", variable=True)
    kind = "BIDIRECTIONAL_SEQUENCE_LSTM" if bidirectional else "UNIDIRECTIONAL_SEQUENCE_LSTM"
    graph.op(kind, [words, graph.weights((4, 8)), *state], (1, 5, 4))
    return graph.content()


def prelu(alpha):
    graph = Graph()
    graph.op("PRELU", [graph.input(IMAGE), graph.weights(alpha)], IMAGE)
    return graph.content()


def split(axis, out):
    graph = Graph()
    graph.op("SPLIT", [graph.constant(axis), graph.input((2, 8, 4))], out, out, numSplits=2)
    return graph.content()


def sliced(strides=(1, 1, 1, 1), out=(1, 4, 8, 4), **masks):
    given = ([0] * 4, "int32"), ([1, 4, 8, 4], "int32"), (strides, "int32")
    return one("STRIDED_SLICE", IMAGE, *given, out=out, **{"beginMask": 0, **masks})


def resized(kind, small, large, depth=4):
    return one(kind, (1, *small, depth), (large, "int32"), out=(1, *large, depth))


LARGE = (1024, MOST_RESIZED_BYTES // 4096 + 1)
#: name -> the file that a rule lets pass, the file that it does not, and what the second one's reason says.
RULED = {
    "8-bit output": (one("ADD"), one("ADD", dtype="float32"), f"{TYPE}: ADD gives float32"),
    "8-bit input": (one("QUANTIZE"), one("QUANTIZE", reads="float32"), f"{UNSPECIFIED}: QUANTIZE reads float32"),
    "16-bit values": (one("RELU"), one("RELU", reads="int16", dtype="int16"), f"{TYPE}: RELU gives int16"),
    "version": (one("ADD", version=2), one("ADD", version=4), "version not supported: ADD is of version 4"),
    "dequantize": (one("QUANTIZE", dtype="uint8"), one("DEQUANTIZE", dtype="float32"), f"{TYPE}: DEQUANTIZE"),
    "known": (one("LOGISTIC"), one("HARD_SWISH"), f"{UNKNOWN}: HARD_SWISH"),
    "three dimensions": (one("ADD", (1, 2, 3, 4), out=(1, 2, 3, 4)), one("ADD", (2, 8, 8, 4), out=(2, 8, 8, 4)), RANK),
    "no fifth dimension": (
        one("RESHAPE", IMAGE, ([1, 1, 8, 8, 4], "int32"), out=(1, 1, 8, 8, 4)),
        one("RESHAPE", IMAGE, ([1, 2, 4, 8, 4], "int32"), out=(1, 2, 4, 8, 4)), RANK,
    ),
    "average pooling": (pool("AVERAGE_POOL_2D"), pool("AVERAGE_POOL_2D", fusedActivationFunction=1), "fuses RELU"),
    "max pooling": (pool("MAX_POOL_2D"), pool("MAX_POOL_2D", fusedActivationFunction=3), "fuses RELU6"),
    "concatenation": (
        two("CONCATENATION", IMAGE, IMAGE, out=(1, 8, 8, 8), axis=3),
        two("CONCATENATION", IMAGE, IMAGE, out=(1, 8, 8, 8), axis=3, fusedActivationFunction=1), "fuses RELU",
    ),
    "zero padding": (
        two("CONCATENATION", IMAGE, out=(1, 8, 8, 8), constant=0, axis=3),
        two("CONCATENATION", IMAGE, out=(1, 8, 8, 8), constant=3, axis=3), "not zeros",
    ),
    "zero padding of two": (
        two("CONCATENATION", IMAGE, out=(1, 8, 8, 8), constant=0, axis=3),
        two("CONCATENATION", IMAGE, IMAGE, out=(1, 8, 8, 12), constant=0, axis=3), "to more than one tensor",
    ),
    "dilation": (
        weighted("CONV_2D", (4, 3, 3, 4), **SAME, dilationHFactor=2, **WIDE),
        weighted("CONV_2D", (4, 3, 3, 4), **SAME, **WIDE), "dilation is 1 x 2",
    ),
    "dilation of a column": (
        weighted("CONV_2D", (4, 3, 1, 4), **SAME, dilationHFactor=2),
        weighted("CONV_2D", (4, 3, 3, 4), **SAME, dilationHFactor=2), "dilation is 2 x 1",
    ),
    "depthwise dilation": (
        weighted("DEPTHWISE_CONV_2D", (1, 3, 3, 4), **SAME),
        weighted("DEPTHWISE_CONV_2D", (1, 3, 3, 4), **SAME, **WIDE), "dilation is 1 x 2",
    ),
    "constant kernel": (weighted("CONV_2D"), weighted("CONV_2D", constant=False), "computed at run time"),
    "constant depthwise kernel": (
        weighted("DEPTHWISE_CONV_2D", (1, 3, 3, 4)), weighted("DEPTHWISE_CONV_2D", (1, 3, 3, 4), constant=False),
        "computed at run time",
    ),
    "dense, constant": (
        weighted("FULLY_CONNECTED", (10, 8), (1, 10), (1, 8)),
        weighted("FULLY_CONNECTED", (10, 8), (1, 10), (1, 8), constant=False), "computed at run time",
    ),
    "constant transposed kernel": (transpose_conv(True), transpose_conv(False), "computed at run time"),
    "dense, one row": (
        weighted("FULLY_CONNECTED", (10, 8), (1, 10), (1, 8), weightsFormat=0),
        weighted("FULLY_CONNECTED", (10, 8), (5, 10), (5, 8), weightsFormat=0), "more than one row",
    ),
    "dense, weights": (
        weighted("FULLY_CONNECTED", (10, 8), (1, 10), (1, 8), weightsFormat=0),
        weighted("FULLY_CONNECTED", (10, 8), (1, 10), (1, 8), weightsFormat=1), "SHUFFLED4x16INT8",
    ),
    "lstm": (lstm(), lstm(bidirectional=True), f"{UNKNOWN}: BIDIRECTIONAL_SEQUENCE_LSTM"),
    "mean, batch": (reduced("MEAN", [1, 2]), reduced("MEAN", [0, 1], out=(8, 4)), "batch"),
    "mean, channels": (
        reduced("MEAN", [-1], out=(1, 8, 8)), reduced("MEAN", [3], (1, 8, 8, 6), (1, 8, 8)), "6 channels"
    ),
    "mean, size": (
        reduced("MEAN", [1, 2], (1, 128, MOST_AVERAGED // 128, 4)),
        reduced("MEAN", [1, 2], (1, 128, MOST_AVERAGED // 128 + 1, 4)), "values at once",
    ),
    "sum": (reduced("SUM", [1, 2]), reduced("SUM", [-4, 1], out=(8, 4)), "batch"),
    "reduce max": (reduced("REDUCE_MAX", [1]), reduced("REDUCE_MAX", [0], out=(8, 8, 4)), "batch"),
    "reduce min": (reduced("REDUCE_MIN", [1]), reduced("REDUCE_MIN", [0], out=(8, 8, 4)), "batch"),
    "pack": (
        two("PACK", (1, 8), (1, 8), out=(1, 2, 8), axis=1, valuesCount=2),
        two("PACK", (1, 8), (1, 8), out=(2, 1, 8), axis=-3, valuesCount=2), "packs along the batch",
    ),
    "pad": (
        one("PAD", IMAGE, ([[0, 0], [1, 1], [1, 1], [0, 0]], "int32"), out=(1, 10, 10, 4)),
        one("PAD", (1, 8, 4), ([[0, 1], [0, 0], [0, 0]], "int32"), out=(2, 8, 4)), "pads the batch",
    ),
    "prelu": (prelu((1, 1, 4)), prelu((8, 8, 4)), "alpha has the shape"),
    "bilinear, size": (
        resized("RESIZE_BILINEAR", (8, 8), (16, 16)), resized("RESIZE_BILINEAR", (512, 256), LARGE), "MB"
    ),
    "nearest, size": (
        resized("RESIZE_NEAREST_NEIGHBOR", (8, 8), (16, 16)),
        resized("RESIZE_NEAREST_NEIGHBOR", (512, 256), LARGE), "MB",
    ),
    "bilinear, one pixel": (
        resized("RESIZE_BILINEAR", (33, 33), (33, 33)), resized("RESIZE_BILINEAR", (1, 1), (33, 33)), "one pixel"
    ),
    "softmax, classes": (
        one("SOFTMAX", (1, MOST_CLASSES), out=(1, MOST_CLASSES)),
        one("SOFTMAX", (1, MOST_CLASSES + 1), out=(1, MOST_CLASSES + 1)), "16,385 classes",
    ),
    "split": (split(2, (2, 8, 2)), split(0, (1, 8, 4)), "splits the batch"),
    "squeeze": (
        one("SQUEEZE", (1, 5, 10), out=(5, 10), squeezeDims=[0]),
        one("SQUEEZE", (5, 1, 10), out=(5, 10), squeezeDims=[1]), "middle",
    ),
    "squeeze of all": (one("SQUEEZE", (1, 1, 10), out=(10,)), one("SQUEEZE", (5, 1, 10), out=(5, 10)), "middle"),
    "slice, strides": (sliced(), sliced((1, 2, 1, 1), (1, 2, 8, 4)), r"strides are \(1, 2, 1, 1\)"),
    "slice, ellipsis": (sliced(shrinkAxisMask=1, out=(4, 8, 4)), sliced(ellipsisMask=2), "uses ellipsis_mask"),
    "slice, new axis": (sliced(endMask=1), sliced(newAxisMask=1), "uses new_axis_mask"),
    "transpose, size": (
        one("TRANSPOSE", (1, 24, 24, 144), ([0, 3, 1, 2], "int32"), out=(1, 144, 24, 24)),
        one("TRANSPOSE", (1, 28, 28, 144), ([0, 3, 1, 2], "int32"), out=(1, 144, 28, 28)), "112,896 values",
    ),
    "transpose of nothing": (
        one("TRANSPOSE", (1, 1, 784, 144), ([1, 0, 2, 3], "int32"), out=(1, 1, 784, 144)),
        one("TRANSPOSE", (1, 1, 784, 144), ([0, 1, 3, 2], "int32"), out=(1, 1, 144, 784)), "112,896 values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULED)
def test_a_rule_lets_one_file_pass_and_stops_another(name):
    passes, breaks, words = RULED[name]
    found = xray(passes, "edgetpu")
    assert [op.runs_on for op in found.ops] == ["delegate"] and found.partitions == 1, found.ops
    report = xray(breaks, "edgetpu")
    (op,) = report.ops
    assert op.runs_on == "cpu" and report.partitions == 0
    assert re.search(words, op.reason), op.reason
    assert op.fix and op.source


@pytest.mark.parametrize("kind", sorted(kind for kind, rules in RULES.items() if not rules))
def test_operations_without_limits(kind):
    assert xray(one(kind), "edgetpu").delegated == 1


def chain(*kinds, start="int8"):
    """RELU, DIV and so on in a row, each reading what the one before gives."""
    graph = Graph()
    value = graph.input(IMAGE, start)
    for number, kind in enumerate(kinds):
        value = graph.op(kind, [value], IMAGE, dtype="float32" if kind == "DEQUANTIZE" else "int8", name=f"v{number}")
    return graph


def test_what_follows_an_unsupported_operation_stays_behind():
    report = xray(chain("RELU", "ELU", "RELU6", "LOGISTIC").content(), "edgetpu")
    assert [op.runs_on for op in report.ops] == ["delegate", "cpu", "cpu", "cpu"]
    assert UNKNOWN in report.ops[1].reason and "ReLU" in report.ops[1].fix
    assert all(op.reason.startswith(SUBGRAPHS) and "operation 1 (ELU)" in op.reason for op in report.ops[2:])
    assert report.notes[0].startswith("2 of the operations on the CPU are supported")


def test_what_stands_in_front_of_the_first_piece_stops_nothing():
    report = xray(chain("QUANTIZE", "RELU", "TANH", "DEQUANTIZE", start="float32").content(), "edgetpu")
    assert [op.runs_on for op in report.ops] == ["cpu", "delegate", "delegate", "cpu"]
    assert report.partitions == 1
    assert "inference_input_type" in report.ops[0].fix and "inference_output_type" in report.ops[3].fix


def test_a_branch_that_needs_nothing_of_the_cpu_is_mapped_though_it_comes_later():
    graph = Graph()
    image = graph.input(IMAGE)
    trunk = graph.op("RELU", [image], IMAGE)
    odd = graph.op("ELU", [trunk], IMAGE)
    behind = graph.op("LOGISTIC", [odd], IMAGE)
    branch = graph.op("TANH", [trunk], IMAGE)
    graph.op("ADD", [behind, branch], IMAGE)
    report = xray(graph.content(), "edgetpu")
    assert [op.runs_on for op in report.ops] == ["delegate", "cpu", "cpu", "delegate", "cpu"]
    assert "operation 1 (ELU)" in report.ops[4].reason


def test_the_first_piece_counts_and_not_the_largest():
    report = xray(chain("RELU", "ELU", "RELU", "RELU", "RELU").content(), "edgetpu")
    assert (report.delegated, report.fallback) == (1, 4)


def test_the_one_to_blame_stands_behind_the_piece():
    report = xray(chain("QUANTIZE", "RELU", "ELU", "TANH", start="float32").content(), "edgetpu")
    assert "operation 2 (ELU)" in report.ops[3].reason


def test_shapes_that_are_computed_stop_the_whole_file(tiny):
    report = xray(tiny.path("int8"), "edgetpu")
    assert report.delegated == report.partitions == 0
    refused = [op for op in report.ops if "refuses the whole file" in op.reason]
    assert {"CONV_2D", "RESHAPE", "SOFTMAX"} <= {op.op for op in refused} and "batch_size=1" in refused[0].fix
    assert "size only at run time" in report.notes[0]
    assert [op.layer for op in report.ops if op.op == "RESHAPE"] == ["flatten"]


def test_an_open_size_stops_the_whole_file():
    graph = Graph()
    graph.op("RELU", [graph.input((1, 1, 1, 4), signature=(-1, -1, -1, 4))], (1, 1, 1, 4))
    report = xray(graph.content(), "edgetpu")
    assert report.delegated == 0 and "leaves its size open" in report.ops[0].reason
    graph = Graph()
    graph.op("RELU", [graph.input(IMAGE, signature=(-1, 8, 8, 4))], IMAGE)
    assert xray(graph.content(), "edgetpu").delegated == 1  # an open batch is 1


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (weighted("CONV_2D", version=6), "CONV_2D is of version 6, and it reads up to 5"),
        (one("QUANTIZE", version=3), "version 3"),
        (one("GELU", approximate=False), "cannot read GELU"),
    ],
)
def test_what_is_newer_than_the_compiler_stops_the_whole_file(model, words):
    report = xray(model, "edgetpu")
    assert report.delegated == 0 and any(words in note and "refuses" in note for note in report.notes)


def test_a_float_file_is_told_once(tiny):
    report = xray(tiny.path("float32"), "edgetpu")
    assert report.delegated == 0 and sum("Model not quantized" in note for note in report.notes) == 1
    assert any(f"{TYPE}: CONV_2D gives float32" in op.reason for op in report.ops)


def test_memory_is_called_an_estimate():
    report = xray(weighted("FULLY_CONNECTED", (10, 8), (1, 10), (1, 8)), "edgetpu")
    assert report.weights_bytes == 10 * 8 + 10 * 4 and report.activation_bytes > 0
    assert any(note.startswith("Estimate") and "they should fit" in note for note in report.notes)
    large = xray(weighted("FULLY_CONNECTED", (4096, 2048), (1, 4096), (1, 2048)), "edgetpu")
    assert any(note.startswith("Estimate: 8.02 MiB") and "every inference" in note for note in large.notes)


def test_large_reshapes_are_called_doubtful():
    report = xray(one("RESHAPE", (1, 1024, 1024, 3), ([1, 1 << 20, 3], "int32"), out=(1, 1 << 20, 3)), "edgetpu")
    assert report.delegated == 1 and any("May stay" in note and "0 (RESHAPE)" in note for note in report.notes)


def test_a_softmax_of_several_rows_is_mapped_and_called_doubtful():
    report = xray(one("SOFTMAX", (1, 5, 10), out=(1, 5, 10)), "edgetpu")
    assert report.delegated == 1 and any("May stay" in note and "0 (SOFTMAX)" in note for note in report.notes)
    assert not any("May stay" in note for note in xray(one("SOFTMAX", (1, 10), out=(1, 10)), "edgetpu").notes)


def test_a_split_into_one_part_splits_nothing():
    graph = Graph()
    graph.op("SPLIT", [graph.constant(0), graph.input(IMAGE)], IMAGE, numSplits=1)
    assert xray(graph.content(), "edgetpu").delegated == 1


def test_custom_operations_have_their_own_name():
    report = xray(one("TFLite_Detection_PostProcess", dtype="float32"), "edgetpu")
    assert report.ops[0].op == "TFLite_Detection_PostProcess" and TYPE in report.ops[0].reason


def test_damaged_operations_cost_no_error():
    graph = Graph()
    for kind in sorted(RULES):
        graph.op(kind, [])
        graph.op(kind, [], (1, 4))
        graph.op(kind, [graph.input(()), graph.constant([0.5], "float32")], ())
    report = xray(graph.content(), "edgetpu")
    assert len(report.ops) == 3 * len(RULES)
    json.dumps(report.to_dict())


PAIRS = {  # name -> operations, and those that the compiled twin still has
    "mobilenet_v1_0.25_128_quant": (31, ()),
    "split_concat": (3, ()),
    "deeplab_mobilenet_edgetpu_slim_cityscapes_quant": (84, (82, 83)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_real_files_as_their_compiled_twins_have_them(shared_model, name):
    count, left = PAIRS[name]
    path, twin = shared_model(f"{name}.tflite"), shared_model(f"{name}_edgetpu.tflite")
    assert left_on_cpu(read_model(path), read_model(twin)) == left
    report = xray(path, "edgetpu")
    assert len(report.ops) == count and tuple(op.index for op in report.ops if op.runs_on == "cpu") == left
    assert all(op.reason and op.fix and op.source for op in report.ops if op.runs_on == "cpu")


def test_a_compiled_file_is_known_as_one(shared_model):
    report = xray(shared_model("deeplab_mobilenet_edgetpu_slim_cityscapes_quant_edgetpu.tflite"), "edgetpu")
    assert [(op.op, op.runs_on) for op in report.ops] == [
        ("edgetpu-custom-op", "delegate"), ("RESIZE_BILINEAR", "cpu"), ("ARG_MAX", "cpu"),
    ]  # fmt: skip
    assert "compiled for the Edge TPU already" in report.notes[0] and report.partitions == 1


def test_nothing_heavy_is_imported():
    code = "import sys, mobile_bench.xray.edgetpu; print(sorted({'tensorflow', 'keras', 'tfopt'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
