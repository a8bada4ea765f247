"""Google's compiler for the Edge TPU, by what it printed elsewhere: it has never run on this machine.

The texts are from https://github.com/google-coral/edgetpu/issues: 60 (V2), 572 (V16), 168, 829, 879, 512 and 358 (the
failures), some of them shortened; LOG16 and its counts are a published log of EfficientDet-Lite0. The stand-in prints
what they print, of a smaller model.
"""

import json
import sys

import pytest

from mobile_bench.edgetpu_compiler import Row, compile_model, left_on_cpu, parse
from mobile_bench.errors import DelegateError, InputError, JobFailed, ModelRefused, Problem
from mobile_bench.flatbuffer import read_model
from mobile_bench.xray import xray

from .xray.tiny_graphs import Graph

HINT = """Model successfully compiled but not all operations are supported by the Edge TPU. For details, visit \
g.co/coral/model-reqs.
"""
V2 = f"""Edge TPU Compiler version 2.1.302470888

Model compiled successfully in 12264 ms.

Input model: model2.tflite
Input size: 8.11MiB
Output model: model2_edgetpu.tflite
Output size: 9.47MiB
On-chip memory used for caching model parameters: 6.86MiB
On-chip memory remaining for caching model parameters: 7.75KiB
Off-chip memory used for streaming uncached model parameters: 1.22MiB
Number of Edge TPU subgraphs: 1
Total number of operations: 93
Operation log: model2_edgetpu.log

{HINT}Number of operations that will run on Edge TPU: 83
Number of operations that will run on CPU: 10

Operator                       Count      Status

LOGISTIC                       1          More than one subgraph is not supported
ADD                            10         Mapped to Edge TPU
CONCATENATION                  1          More than one subgraph is not supported
CONCATENATION                  3          Mapped to Edge TPU
"""
V16 = """Edge TPU Compiler version 16.0.384591198
Started a compilation timeout timer of 180 seconds.

Model compiled successfully in 542 ms.

Input model: quantized_model.tflite
Input size: 4.04MiB
Output model: quantized_model_edgetpu.tflite
Output size: 4.13MiB
On-chip memory used for caching model parameters: 604.50KiB
On-chip memory remaining for caching model parameters: 511.50KiB
Off-chip memory used for streaming uncached model parameters: 3.45MiB
Number of Edge TPU subgraphs: 1
Total number of operations: 50
Operation log: quantized_model_edgetpu.log
See the operation log file for individual operation details.
Compilation child process completed within timeout period.
Compilation succeeded!
"""
COUNTS16 = """Number of operations that will run on Edge TPU: 264
Number of operations that will run on CPU: 3
See the operation log file for individual operation details.
Compilation child process completed within timeout period.
Compilation succeeded!
"""
LOG16 = """Edge TPU Compiler version 16.0.384591198
Input: efficientdet_coral_v2.tflite
Output: efficientdet_coral_v2_edgetpu.tflite

Operator                       Count      Status

ADD                            42         Mapped to Edge TPU
CUSTOM                         1          Operation is working on an unsupported data type
RESHAPE                        10         Mapped to Edge TPU
CONCATENATION                  2          Mapped to Edge TPU
RESIZE_NEAREST_NEIGHBOR        12         Mapped to Edge TPU
DEPTHWISE_CONV_2D              80         Mapped to Edge TPU
DEQUANTIZE                     2          Operation is working on an unsupported data type
CONV_2D                        102        Mapped to Edge TPU
QUANTIZE                       1          Mapped to Edge TPU
LOGISTIC                       1          Mapped to Edge TPU
MAX_POOL_2D                    14         Mapped to Edge TPU
"""
UNMAPPED = V2.replace("6.86MiB", "0.00B").replace("12264", "2").replace("Number of Edge TPU subgraphs: 1", "")
NOT_QUANTIZED = "Edge TPU Compiler version 14.1.317412892\nInvalid model: my_mnist_quant.tflite\nModel not quantized\n"
DYNAMIC = """Edge TPU Compiler version 16.0.384591198
Started a compilation timeout timer of 180 seconds.
ERROR: Attempting to use a delegate that only supports static-sized tensors with a graph that has dynamic-sized tensors.
Compilation failed: Model failed in Tflite interpreter. Please ensure model can be loaded/run in Tflite interpreter.
Compilation child process completed within timeout period.
Compilation failed!
"""
TOO_NEW = """Edge TPU Compiler version 16.0.384591198
ERROR: Didn't find op for builtin opcode 'QUANTIZE' version '3'. An older version of this builtin might be supported.

ERROR: Registration failed.

Invalid model: quantized_model.tflite
Model could not be parsed
"""
LARGE = """Edge TPU Compiler version 16.0.384591198
Started a compilation timeout timer of 180 seconds.
ERROR: Restored original execution plan after delegate application failure.
Compilation failed: Compilation failed due to large activation tensors in model.
Compilation child process completed within timeout period.
Compilation failed!
"""
CRASH = "Edge TPU Compiler version 15.0.340273435\n\nInternal compiler error. Aborting! \n"
SILENT = """Edge TPU Compiler version 16.0.384591198
Started a compilation timeout timer of 180 seconds.
Compilation child process completed within timeout period.
Compilation failed!
"""


def test_everything_is_read_with_its_unit():
    found = parse(V2)
    assert (found.version, found.compile_ms, found.subgraphs, found.operations) == ("2.1.302470888", 12264, 1, 93)
    assert (found.on_chip_bytes, found.free_bytes) == (round(6.86 * 2**20), 7936)
    assert (found.streamed_bytes, found.input_bytes) == (round(1.22 * 2**20), round(8.11 * 2**20))
    assert found.output_bytes == round(9.47 * 2**20)
    assert found.table[2] == Row("CONCATENATION", 1, "More than one subgraph is not supported")
    assert (found.mapped, found.left) == (13, 2)  # of the four rows that were published


def test_output_and_log_together_count_nothing_twice():
    found = parse(f"{COUNTS16}\n{LOG16}")
    assert (found.mapped, found.left) == (264, 3)
    assert [row.op for row in found.table if row.status.endswith("unsupported data type")] == ["CUSTOM", "DEQUANTIZE"]
    assert parse(f"{COUNTS16}{LOG16}\n{LOG16}") == parse((COUNTS16 + LOG16).replace("\n", "\r\n")) == found


def test_version_16_without_a_table_is_read_with_the_log():
    with pytest.raises(JobFailed, match="Compilation succeeded"):
        parse(V16)
    found = parse(V16 + LOG16)  # of two models: only the form counts
    assert (found.version, found.compile_ms, found.operations) == ("16.0.384591198", 542, 50)
    assert (found.on_chip_bytes, found.streamed_bytes) == (619008, round(3.45 * 2**20))


def test_a_log_alone_is_a_table_without_sizes():
    found = parse(LOG16)
    assert (found.mapped, found.left) == (264, 3)
    assert found.on_chip_bytes is found.compile_ms is found.subgraphs is found.input_bytes is None


def test_lines_behind_the_table_end_it():
    assert len(parse(V2 + "Compilation child process completed within timeout period.\nADD 7 Mapped\n").table) == 4


def test_what_a_version_does_not_say_is_none():
    found = parse(UNMAPPED)
    assert found.subgraphs is None and found.on_chip_bytes == 0


def test_to_dict_is_plain_json():
    plain = json.loads(json.dumps(parse(V2).to_dict()))
    assert plain["table"][0] == {"op": "LOGISTIC", "count": 1, "status": "More than one subgraph is not supported"}
    assert (plain["mapped"], plain["left"]) == (13, 2) and "content" not in plain


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (NOT_QUANTIZED, ModelRefused, "it is not quantized.*Model not quantized.*int8"),
        (DYNAMIC, ModelRefused, "known only at run time.*static-sized tensors.*batch_size=1"),
        (TOO_NEW, ModelRefused, "newer than the compiler.*'QUANTIZE' version '3'"),
        ("ERROR: Op builtin_code out of range: 150. Are you", ModelRefused, "newer than the compiler.*150"),
        (LARGE, ModelRefused, "activations are too large"),
        ("Edge TPU Compiler version 2.0\nInvalid model: x.tflite\n", ModelRefused, "no model.*Invalid model: x.tflite"),
        (CRASH, JobFailed, "crashed.*Internal compiler error"),
        (SILENT, JobFailed, "compiled nothing.*Compilation failed!"),
        ("", JobFailed, "nothing"),
        ("Edge TPU Compiler version 16.0\n\nOperator                       Count      Status\n", JobFailed, "nothing"),
    ],
)
def test_failures_are_told_in_words(text, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        parse(text)


@pytest.mark.parametrize("text", [V2, V16 + LOG16, DYNAMIC])
def test_a_cut_anywhere_gives_facts_or_a_problem(text):
    refused = 0
    for end in range(0, len(text), 7):
        try:
            parse(text[:end])
        except Problem:
            refused += 1
    assert refused, "the shortest says nothing"


IMAGE = (1, 8, 8, 4)


def chain(*kinds):
    """A file of operations in a row; the n-th gives the tensor vn."""
    graph = Graph()
    value = graph.input(IMAGE)
    for number, kind in enumerate(kinds):
        value = graph.op(kind, [value], IMAGE, name=f"v{number}")
    return graph.content()


STAND_IN = """#!{python}
import shutil, sys
out = sys.argv[sys.argv.index("-o") + 1]
assert sys.argv[1] == "-s"
if {compiled!r}:
    shutil.copy({compiled!r}, out + "/model_edgetpu.tflite")
print(open({text!r}).read())
"""
TABLE = """Edge TPU Compiler version 16.0.384591198

Model compiled successfully in 42 ms.

On-chip memory used for caching model parameters: 3.00KiB
On-chip memory remaining for caching model parameters: 7.86MiB
Off-chip memory used for streaming uncached model parameters: 0.00B
Number of Edge TPU subgraphs: 1
Total number of operations: 4

Operator                       Count      Status

RELU                           1          Mapped to Edge TPU
{rest}
"""
OURS = """RELU6                          1          More than one subgraph is not supported
LOGISTIC                       1          More than one subgraph is not supported
ELU                            1          Operation not supported"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(text, content): puts a stand-in on PATH that prints text and leaves content as the compiled model."""

    def put(text, content=b""):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "text").write_text(text)
        (folder / "compiled").write_bytes(content)
        tool = folder / "edgetpu_compiler"
        compiled = str(folder / "compiled") if content else ""
        tool.write_text(STAND_IN.format(python=sys.executable, compiled=compiled, text=str(folder / "text")))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    return put


def compiled_chain():
    graph = Graph()
    value = graph.op("edgetpu-custom-op", [graph.input(IMAGE)], IMAGE, name="v0")
    for number, kind in enumerate(("ELU", "RELU6", "LOGISTIC"), 1):
        value = graph.op(kind, [value], IMAGE, name=f"v{number}")
    return graph.content()


def test_the_compiler_is_asked_and_agrees(compiler):
    compiler(TABLE.format(rest=OURS), compiled_chain())
    report = xray(chain("RELU", "ELU", "RELU6", "LOGISTIC"), "edgetpu", ask=True)
    assert report.asked == "edgetpu_compiler 16.0.384591198" and report.disagreements == ()
    assert [op.said for op in report.ops] == ["delegate", "cpu", "cpu", "cpu"]
    assert any("1 operations mapped, 3 left; parameters: 0.00 MiB kept" in note for note in report.notes)


def test_where_the_compiler_says_otherwise_is_told(compiler):
    compiler(TABLE.format(rest=OURS.replace("Operation not supported", "Mapped to Edge TPU")), compiled_chain())
    report = xray(chain("RELU", "ELU", "RELU6", "LOGISTIC"), "edgetpu", ask=True)
    assert report.disagreements == (
        "ELU, 'Mapped to Edge TPU': edgetpu_compiler says 1, ours 0",
        "ELU, 'Operation not supported': edgetpu_compiler says 0, ours 1",
    )
    # The compiled model has three operations left, the table two: neither is believed of a single operation.
    assert {op.said for op in report.ops} == {""}


def test_a_refusal_is_an_answer_too(compiler):
    compiler("Edge TPU Compiler version 16.0.384591198\nInvalid model: model.tflite\nModel not quantized\n")
    report = xray(chain("RELU"), "edgetpu", ask=True)
    assert report.asked == "edgetpu_compiler" and report.ops[0].said == "cpu"
    assert report.disagreements == ("edgetpu_compiler refuses the file (Model not quantized), ours maps 1 operations",)


def test_no_compiler_and_one_that_crashes_are_notes(compiler):
    model = chain("RELU")
    report = xray(model, "edgetpu", ask=True)
    assert report.asked == "" and any("Nobody was asked" in note for note in report.notes)
    compiler("Edge TPU Compiler version 15.0.340273435\nInternal compiler error. Aborting!\n")
    report = xray(model, "edgetpu", ask=True)
    assert report.asked == "" and any("gave no answer" in note for note in report.notes)


def test_the_compiled_model_is_kept_and_written(compiler, tmp_path):
    compiler(TABLE.format(rest=OURS), compiled_chain())
    model = tmp_path / "a model.tflite"
    model.write_bytes(chain("RELU"))
    found = compile_model(model, out=tmp_path / "new" / "m_edgetpu.tflite")
    assert found.content == compiled_chain() == (tmp_path / "new" / "m_edgetpu.tflite").read_bytes()
    assert found.compile_ms == 42


def test_a_table_without_a_compiled_model_is_a_failure(compiler):
    compiler(TABLE.format(rest=OURS))
    with pytest.raises(JobFailed, match="compiled nothing"):
        compile_model(chain("RELU"))


def test_a_file_that_is_not_there(compiler, tmp_path):
    compiler(TABLE.format(rest=OURS), compiled_chain())
    with pytest.raises(InputError, match=r"nowhere\.tflite"):
        compile_model(tmp_path / "nowhere.tflite")


def test_it_is_not_there_or_for_another_processor(compiler, tmp_path, monkeypatch):
    with pytest.raises(DelegateError, match=r"no edgetpu_compiler on PATH.*x86-64.*https://"):
        compile_model(chain("RELU"))
    tool = tmp_path / "edgetpu_compiler"
    tool.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xf7\x00" + bytes(44))  # a header for BPF
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DelegateError, match=r"for another processor.*copy the compiled model"):
        compile_model(chain("RELU"))


def test_it_may_not_take_for_ever(tmp_path, monkeypatch):
    tool = tmp_path / "edgetpu_compiler"
    tool.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JobFailed, match=r"ended after 0\.5 s"):
        compile_model(chain("RELU"), timeout_s=0.5)


def test_a_failing_exit_status_tells_why(tmp_path, monkeypatch):
    tool = tmp_path / "edgetpu_compiler"
    tool.write_text(f"#!{sys.executable}\nimport sys\nsys.stderr.write({DYNAMIC!r})\nsys.exit(1)\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelRefused, match="known only at run time"):
        compile_model(chain("RELU"))


def test_a_twin_is_set_beside_its_original_by_names():
    original = read_model(chain("RELU", "ELU", "RELU6", "LOGISTIC"))
    assert left_on_cpu(original, read_model(compiled_chain())) == (1, 2, 3)
    assert left_on_cpu(read_model(chain("RELU", "TANH", "RELU6", "LOGISTIC")), read_model(compiled_chain())) is None
