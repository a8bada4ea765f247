"""What GPU delegates take: our rules held against LiteRT's WebGPU accelerator, on SwiftShader.

conftest.py one folder up says where SwiftShader is from. OpenCL's and OpenGL's delegates cannot run here: their
rules are tested alone.
"""

import dataclasses
import re

import pytest

from mobile_bench.errors import JobFailed
from mobile_bench.flatbuffer import read_model
from mobile_bench.jobs import run_job
from mobile_bench.xray import xray
from mobile_bench.xray.gpu import choose, heard, judge, said_of
from mobile_bench.xray.gpu_webgpu import objection
from mobile_bench.xray.rules import nodes

from .gpu_graphs import (
    Graph,
    binary,
    cast_of,
    concat,
    conv,
    cumsum,
    dense,
    depthwise,
    pad,
    pool,
    reduce,
    resize,
    select,
    slice_,
    softmax,
    split,
    strided,
    transpose,
    unary,
    unpack,
)  # fmt: skip
from .gpu_models import PARTLY, REFUSED, TAKEN

MODELS = {**TAKEN, **{name: made for name, (made, _) in {**REFUSED, **PARTLY}.items()}}
#: What it accepts and then computes wrongly, with the words of the note.
WRONG = {
    "cumsum_reverse": (lambda g: cumsum(g, reverse=True), "ignores reverse"),
    "cumsum_exclusive": (lambda g: cumsum(g, exclusive=True), "ignores exclusive"),
    "conv_1x1_dynamic_strides": (
        lambda g: conv(g, kernel=(4, 1, 1, 4), kind="dynamic", stride=2), r"ignores the strides \(2, 2\) of a 1x1"
    ),
    "conv_1x1_int8_strides": (
        lambda g: conv(g, kernel=(4, 1, 1, 4), kind="int8", stride=2), r"ignores the strides \(2, 2\) of a 1x1"
    ),
    "conv_1x1_dynamic_groups": (
        lambda g: conv(g, (1, 8, 8, 8), (8, 1, 1, 4), kind="dynamic"), "ignores the 2 groups"
    ),
    "conv_groups_of_2": (lambda g: conv(g, kernel=(4, 3, 3, 2)), "computes 2 groups of 2 to 2 channels wrongly"),
    "pad_batch": (lambda g: pad(g, [[1, 0], [1, 1], [1, 1], [0, 0]]), "leaves out the padding of the batch"),
    "less_int32_vector": (
        lambda g: binary(g, "LESS", other=(4,), fixed=True, dtype="int32", made="bool", options="LessOptions"),
        "has no shader for an int32 constant",
    ),
}  # fmt: skip
#: What stops the whole file although the accelerator accepts each operation.
BREAKING = {
    "conv_groups_of_6": (lambda g: conv(g, (1, 8, 8, 12), (12, 3, 3, 6)), "illegal instruction"),
    "select_low_condition": (lambda g: select(g, condition=(4,)), "stops the compilation"),
    "split_in_1": (lambda g: split(g, 1), "a split in 1 part"),
    "computed_paddings": (
        lambda g: g.op("PAD", [unary(g, "EXP"), g.input((4, 2), "int32")], (1, 4, 4, 4), options="PadOptions"),
        r"size is open until it runs, first what operation 1 \(PAD\)",
    ),
}  # fmt: skip


def write(folder, name, make):
    graph = Graph()
    outputs = make(graph)
    return graph.write(folder / f"{name}.tflite", *(outputs if isinstance(outputs, list) else [outputs]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-models")
    return {name: write(folder, name, make) for name, make in MODELS.items()}


@pytest.fixture
def gpu(swiftshader, monkeypatch):
    """This process's children find SwiftShader."""
    for name, value in swiftshader.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def answers(swiftshader, files, tmp_path_factory):
    """What the accelerator says of every file, asked in one process."""
    job, folder = {"tflites": [str(path) for path in files.values()]}, tmp_path_factory.mktemp("asked")
    found = run_job("mobile_bench.xray.gpu", job, folder, timeout_s=300, environment=swiftshader)
    return {name: found[str(number)] for number, name in enumerate(files)}


def on_gpu(report):
    return tuple(op.index for op in report.ops if op.runs_on == "delegate")


@pytest.mark.parametrize("name", MODELS)
def test_by_the_rules(name, files):
    report = xray(files[name], "gpu")
    everything = tuple(range(len(report.ops)))
    expected = everything if name in TAKEN else () if name in REFUSED else PARTLY[name][1]
    assert on_gpu(report) == expected and report.partitions == bool(expected)
    for op in report.ops:
        assert bool(op.reason) == bool(op.source) == (op.runs_on == "cpu")
    if name in REFUSED:
        assert REFUSED[name][1] in report.ops[0].reason


@pytest.mark.parametrize("name", MODELS)
def test_the_accelerator_says_the_same(name, files, answers):
    content = read_model(files[name])
    choice = choose(content, "webgpu")
    asked, disagreements, _ = judge(answers[name], choice)
    assert disagreements == [] and asked.startswith("SwiftShader")
    words = ["delegate" if number in choice.runs else "cpu" for number in range(len(choice.seen))]
    assert said_of(answers[name], content, choice) == words


def test_a_wrong_rule_would_be_noticed(files, answers):
    """The comparison is no formality: what the accelerator said of another file does not fit."""
    for name, other in (("conv", "squeeze"), ("squeeze", "conv"), ("conv_squeeze_three", "equal_halves")):
        assert judge(answers[other], choose(read_model(files[name]), "webgpu"))[1], (name, other)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_known_and_seen(name, gpu, tmp_path):
    make, words = WRONG[name]
    report = xray(write(tmp_path, name, make).read_bytes(), "gpu", ask=True)
    assert on_gpu(report) == (0,) and report.ops[0].said == "delegate"
    assert any(re.search(words, note) and "2.3.0" in note for note in report.notes)
    assert any("computes something else than the CPU" in text for text in report.disagreements)
    assert any("times on it never mean anything" in note for note in report.notes)


@pytest.mark.parametrize("name", BREAKING)
def test_what_stops_the_whole_file(name, gpu, tmp_path):
    make, words = BREAKING[name]
    report = xray(write(tmp_path, name, make), "gpu", ask=True)
    assert on_gpu(report) == () and report.partitions == report.weights_bytes == 0
    assert any(re.search(words, op.reason) for op in report.ops)
    assert report.disagreements == () and {op.said for op in report.ops} == {""}
    assert any("The accelerator failed on this file" in note for note in report.notes)


def test_without_a_gpu(files, tmp_path, monkeypatch):
    monkeypatch.setenv("VK_DRIVER_FILES", str(tmp_path / "none.json"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    report = xray(files["conv"], "gpu", ask=True)
    assert report.asked == "" and report.disagreements == () and report.ops[0].said == ""
    assert any("The GPU was not asked: There is no GPU" in note for note in report.notes)


def test_why_an_operation_that_it_knows_stays_behind(files):
    report = xray(files["conv_squeeze_three"], "gpu")
    assert "only one group of operations, here another one of 3" in report.ops[0].reason
    assert "operation 1" in report.ops[0].fix and "keras.layers.Reshape" in report.ops[1].fix
    assert report.weights_bytes == 0 < xray(files["conv"], "gpu").weights_bytes
    float16 = xray(files["float16_and_squeeze"], "gpu")
    assert [op.runs_on for op in float16.ops] == ["cpu", "cpu", "delegate", "cpu"]
    assert "unpacks float16 constants" in float16.ops[0].reason


def test_what_the_accelerator_prints():
    text = (
        "Following operations are not supported by GPU delegate:\nDEQUANTIZE: \nSTRIDED_SLICE: Slice does not. \n"
        "STRIDED_SLICE: Reverse slices\n5 operations will run on the GPU, and the remaining 3 operations will run on "
    )
    kinds = {"DEQUANTIZE": {""}, "STRIDED_SLICE": {"Slice does not.", "Reverse slices"}}
    assert heard("INFO: before\n" + text) == (5, kinds)
    none = text.replace("5 operations", "No operations").replace("the remaining 3", "all 8")
    assert heard(text + "\n" + none) == (0, kinds) and heard("INFO: nothing") == (None, {})


def test_a_kind_of_which_some_are_refused_is_told_by_the_rules(tmp_path):
    def two_slices(g):
        first = strided(g, (1, 8, 8, 4), [0] * 4, [1, 4, 4, 4], [1] * 4, (1, 4, 4, 4))
        numbers = [g.constant(values, "int32") for values in ([0] * 4, [1, 4, 4, 1], [1] * 4)]
        return g.op("STRIDED_SLICE", [first, *numbers], (1, 4, 4), options="StridedSliceOptions", shrinkAxisMask=8)

    content = read_model(write(tmp_path, "two", two_slices))
    line = "Following operations are not supported by GPU delegate:\nSTRIDED_SLICE: no\n"
    count = "1 operations will run on the GPU, and the remaining 1 operations will run on the CPU."
    found = {"text": line + count, "failed": "", "none": False}
    assert said_of(found, content, choose(content, "webgpu")) == ["delegate", "cpu"]


CLASSIC = [
    ("version", conv, lambda g: conv(g, version=8), "is of version 8"),
    ("activation", lambda g: conv(g, fusedActivationFunction=3), lambda g: conv(g, fusedActivationFunction=5), "SIGN_"),
    ("known", lambda g: unary(g, "ABS"), lambda g: unary(g, "ROUND"), "no ROUND"),
    ("known_squeeze", softmax, REFUSED["squeeze"][0], "no SQUEEZE"),
    ("types", lambda g: unary(g, "TANH"), lambda g: unary(g, "TANH", dtype="int32"), "is int32"),
    ("dimensions", lambda g: unary(g, "RELU"), lambda g: unary(g, "RELU", (1, 2, 2, 2, 2)), "5 dimensions"),
    ("inputs", TAKEN["mean"], lambda g: g.op("MEAN", [g.weights(1, 4, 4, 4), g.constant([1, 2], "int32")], (1, 4),
                                             options="ReducerOptions"), "0 computed and 2 constant"),
    ("axes", lambda g: reduce(g, "SUM"), lambda g: reduce(g, "SUM", kind="int64"), "axes are int64"),
    ("broadcast_3d", lambda g: binary(g, "ADD", other=(4, 4, 4), options="AddOptions"),
     lambda g: binary(g, "ADD", one=(2, 4, 4, 4), other=(4, 4, 4), options="AddOptions"), "it broadcasts"),
    ("broadcast_2d", lambda g: binary(g, "MUL", other=(1, 1), options="MulOptions"),
     lambda g: binary(g, "MUL", other=(4, 4), options="MulOptions"), "it broadcasts"),
    ("depthwise", depthwise, lambda g: depthwise(g, claimed=2), "depth_multiplier 2"),
    ("kernel", pool, lambda g: pool(g, "L2_POOL_2D"), "no L2_POOL_2D"),
    ("block_size", TAKEN["depth_to_space"], REFUSED["depth_to_space_1"][0], "block_size is 1"),
    ("beta", softmax, lambda g: softmax(g, 2.0), "beta is 2"),
    ("corners", resize, lambda g: resize(g, alignCorners=True, halfPixelCenters=True), "both align_corners"),
    ("masks", TAKEN["strided_masks"], REFUSED["strided_shrink"][0], "shrink_axis_mask of 2"),
    ("slice_rank", TAKEN["slice"], lambda g: slice_(g, [0, 1], [1, 4], (1, 8)), "2 dimensions, and 3 or 4"),
    ("mirror", TAKEN["mirror"], REFUSED["mirror_sym"][0], "SYMMETRIC"),
    ("paddings", lambda g: pad(g, [[0, 0], [1, 1], [0, 0]], (1, 4, 4)), REFUSED["pad_2d"][0], "it pads"),
    ("indices", TAKEN["gather"], REFUSED["gather_2d"][0], "indices have 2 dimensions"),
    ("one_hot", TAKEN["one_hot"], REFUSED["one_hot_first_axis"][0], "axis is 0"),
    ("select", select, lambda g: select(g, other=(1, 1, 1, 4)), "chooses from a tensor of (1, 1, 1, 4)"),
    ("select_2d", select, TAKEN["select_2d"], "computed tensor of (3, 4)"),
    ("weights_format", dense, lambda g: dense(g, weightsFormat=1), "SHUFFLED"),
    ("keep_dims", TAKEN["dense_keep"], lambda g: dense(g, shape=(1, 2, 8), out=(2, 4), keepNumDims=True), "keeps the"),
    ("cumsum", cumsum, REFUSED["cumsum_computed_axis"][0], "a constant int32"),
    ("cast", lambda g: cast_of(g, "int32"), lambda g: cast_of(g, "uint8"), "goes from float32 to uint8"),
    ("logical", lambda g: cast_of(g, "float32", binary(g, "LESS", made="bool", options="LessOptions")),
     lambda g: unary(g, "EXP", given=binary(g, "LESS", made="bool", options="LessOptions")), "EXP uses what it gives"),
    ("quantize", TAKEN["quantize"], REFUSED["quantize_int16"][0], "is int16"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "words"), [case[1:] for case in CLASSIC], ids=[case[0] for case in CLASSIC])
def test_opencl_by_its_rules(right, wrong, words, tmp_path):
    good, bad = (xray(write(tmp_path, "x", make), "gpu", backend="opencl") for make in (right, wrong))
    left = {op.op: op.reason for op in good.ops if op.runs_on == "cpu"}
    # A comparison needs what follows it on the GPU to read its booleans; CAST to an output is the CPU's.
    assert left == {} or set(left) == {"CAST"}, left
    refused = [op for op in bad.ops if words in op.reason]
    assert refused and all(op.source.startswith("tflite/") for op in refused)
    assert any("was not run here" in note for note in good.notes) and good.asked == ""


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        (lambda g: unary(g, "SIN"), lambda g: unary(g, "SIGN"), "no shader for SIGN"),
        (lambda g: concat(g, [(1, 4), (1, 4)], 1), split, "no shader for SPLIT"),
        (softmax, unpack, "no shader for UNPACK"),
        (TAKEN["reshape"], lambda g: transpose(g, [0, 2, 1, 3]), "no shader for TRANSPOSE"),
        (lambda g: reduce(g, "MEAN"), lambda g: reduce(g, "MEAN", axes=(3,)), r"over the axes \[3\]"),
        (conv, lambda g: conv(g, kernel=(4, 3, 3, 2)), "2 groups"),
        (lambda g: pad(g, [[0, 0], [1, 1], [1, 1], [0, 0]]), WRONG["pad_batch"][0], "pads the batch"),
        (lambda g: binary(g, "ADD", options="AddOptions"),
         lambda g: binary(g, "ADD", other=(1, 1, 1, 4), options="AddOptions"), "it adds"),
        (conv, lambda g: conv(g, kind="computed"), "kernel is computed"),
    ],
)  # fmt: skip
def test_opengl_takes_a_file_whole_or_not_at_all(right, wrong, words, tmp_path):
    assert xray(write(tmp_path, "x", right), "gpu", backend="opengl").fallback == 0
    bad = write(tmp_path, "x", wrong)
    assert xray(bad, "gpu", backend="opencl").fallback == 0, "the same file is fine with OpenCL"
    report = xray(bad, "gpu", backend="opengl")
    assert report.delegated == 0 and re.search(words, report.ops[0].reason)


def test_asking_what_is_not_here(files):
    report = xray(files["conv"], "gpu", backend="opencl", ask=True)
    assert report.asked == "" and any("could not be asked" in note for note in report.notes)


def test_converted_files(tiny, shared_model):
    assert xray(tiny.path("open_size"), "gpu").fallback == 0
    flatten = xray(tiny.path("float32"), "gpu")  # its Flatten asks for the batch
    assert flatten.delegated == 0 and all("size is open" in op.reason for op in flatten.ops if op.op == "CONV_2D")
    assert any("fixed batch" in op.fix for op in flatten.ops)
    assert xray(shared_model("mobilenet_v2_1.0_224_quant.tflite"), "gpu").fallback == 0


def test_an_operation_that_lacks_its_inputs(files):
    node = nodes(read_model(files["conv"]))[0]
    bare = dataclasses.replace(node, operator=dataclasses.replace(node.operator, inputs=()))
    assert "lacks an input" in objection(bare).reason or "0 computed" in objection(bare).reason


def test_a_crash_is_an_answer(gpu, tmp_path):
    path = write(tmp_path, "x", BREAKING["conv_groups_of_6"][0])
    with pytest.raises(JobFailed, match=r"SIGILL|SIGABRT|SIGTRAP"):
        run_job("mobile_bench.xray.gpu", {"tflites": [str(path)]}, tmp_path, timeout_s=120)
