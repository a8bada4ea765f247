"""What each operation costs, by the real runtime; and which layer it is, only where that is certain."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mobile_bench import litert_c
from mobile_bench.errors import InputError, JobFailed, ModelRefused
from mobile_bench.profile import OpTime, layer_of, layers_of, match_operators, parse_summary, profile

DEMOS = Path(__file__).parents[2] / "saved_models"
COMMAND = """
import typer
from mobile_bench.cli_support import run_app
from mobile_bench.commands.profile import profile
app = typer.Typer()
app.command()(profile)
run_app(app)
"""
SUMMARY = """\
=========================== Run Order ===========================
      [node type]    [start]    [first]   [avg ms]        [%]     [cdf%]   [mem KB] [times called]   [Name]
      Delegate/Convolution (NHWC, QC8) IGEMM      0.000      0.006      0.006    60.000%    60.000%      0.000        20   [Delegate]:0
      SOFTMAX      0.000      0.004      0.004    40.000%   100.000%      0.000             20   [Builtin]:1

=========================== Top by Computation Time ===========================
      [node type]    [start]    [first]   [avg ms]        [%]     [cdf%]   [mem KB] [times called]   [Name]
      SOFTMAX      0.000      0.004      0.004    40.000%   100.000%      0.000             20   [Builtin]:1

Timings (microseconds): count=2 curr=207
"""  # noqa: E501


@pytest.fixture(scope="module", autouse=True)
def own_lock(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def found(tiny):
    """Profiles of tiny files, each made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = profile(tiny.path(name), runs=30)
        return made[name]

    return of


@pytest.fixture
def command(run_python):
    return lambda *args, **options: run_python("-c", COMMAND, *args, **options)


@pytest.mark.parametrize(("name", "numbers"), [("float32", "F32"), ("int8", "Q")])
def test_each_operation_is_named_and_timed(found, name, numbers):
    result = found(name)
    convolution = next(op for op in result.ops if op.node_type.startswith("Convolution") and op.delegate)
    assert convolution.delegate == "XNNPACK" and numbers in convolution.node_type
    assert any(op.node_type.startswith("Fully Connected") for op in result.ops)
    assert any("Softmax" in op.node_type or op.node_type == "SOFTMAX" for op in result.ops)
    assert [op.index for op in result.ops] == list(range(len(result.ops)))
    assert all(op.calls == 30 for op in result.ops)
    assert result.runtime.startswith("ai-edge-litert 2.") and result.runs == 30


@pytest.mark.parametrize("name", ["float32", "int8", "int16"])
def test_shares_add_up_over_every_view(found, name):
    result = found(name)
    total = result.total_ms
    for rows in (result.ops, result.by_type, result.by_layer):
        assert sum(row.avg_ms for row in rows) == pytest.approx(total)
        assert sum(row.share for row in rows) == pytest.approx(1.0, abs=0.002) or total == 0
    assert sum(group.count for group in result.by_type) == len(result.ops)
    assert result.unprofiled_median_ms > 0 and result.profiled_median_ms > 0


def test_layers_are_those_of_the_keras_model(found):
    ops = found("float32").ops
    layer = lambda start: {op.layer for op in ops if op.node_type.startswith(start)}
    assert [op.layer for op in ops if op.node_type.startswith("Convolution")] == ["conv2d", "depthwise_conv2d"]
    assert layer("Fully Connected") == {"dense"} and layer("RESHAPE") <= {"flatten"}
    assert layer("Static Reshape") <= {""}, "a helper of the delegate's own is no layer"


def test_kernels_of_the_runtime_itself_have_no_delegate(found):
    ops = found("int16").ops  # XNNPACK has nothing for 16-bit activations
    assert [(op.node_type, op.layer) for op in ops if op.node_type in ("CONV_2D", "FULLY_CONNECTED")] == [
        ("CONV_2D", "conv2d"), ("FULLY_CONNECTED", "dense"),
    ]  # fmt: skip
    assert {op.delegate for op in ops} == {""}


def test_two_inputs_and_an_open_size_can_be_profiled(tiny):
    from mobile_bench.inputs import InputSpec

    assert [op.layer for op in profile(tiny.path("two_inputs"), runs=5).ops][:2] == ["add", "conv2d_4"]
    assert profile(tiny.path("open_size"), runs=5, spec=InputSpec(20, 24, 3)).ops
    with pytest.raises(ModelRefused, match="size open"):
        profile(tiny.path("open_size"), runs=5)


def test_an_output_that_the_library_cannot_hold_is_refused(tiny):
    with pytest.raises(ModelRefused, match="refused"):
        profile(tiny.path("two_outputs"), runs=5)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_the_runtime_gets_its_threads(tiny, run_python):
    code = (
        "import os, sys; from mobile_bench.profile import profile_in_this_process as run\n"
        "run(dict(tflite=sys.argv[1], threads=int(sys.argv[2]), runs=1, seed=0, spec=None), lambda *a, **k: None)\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    counts = []
    for threads in (1, 3):
        done = run_python("-c", code, tiny.path("float32"), threads)
        assert done.returncode == 0, done.stderr
        counts.append(int(done.stdout))
    assert counts[1] >= counts[0] + 4, "two more in each of the two models"


def test_mobilenet_by_layer(shared_model):
    result = profile(shared_model("mobilenet_v2_1.0_224_quant.tflite"), runs=5)
    layers = [op.layer for op in result.ops]
    assert layers[:4] == ["Conv", "expanded_conv/depthwise", "expanded_conv/project", "expanded_conv_1/expand"]
    assert sum(op.share for op in result.ops if op.delegate) > 0.9


@pytest.mark.parametrize("variant", ["baseline-float32", "baseline-int8", "baseline-dynamic", "qat-int8"])
def test_real_conversions_name_the_layers_of_their_model(variant):
    from mobile_bench.flatbuffer import read_model

    file = DEMOS / "demo-cifar10-jpeg/resnet8-cifar10-jpeg" / variant / "model.tflite"
    if not file.is_file():
        pytest.skip("the demo study is not here")
    model = read_model(file)
    layers = dict(zip(layers_of(model), [operator.op for operator in model.main.operators]))
    assert {"stem", "stage1_block1_conv1", "stage2_block1_shortcut"} <= set(layers)
    assert layers["stage1_block1_add"] == "ADD" and layers["pool"] == "MEAN" and "classes" in layers


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet8/conv1_act/Relu;resnet8/conv1_bn/FusedBatchNormV3;resnet8/conv1/Conv2D;resnet8/conv1/bias", "conv1"),
        ("m_1/act_1/Relu6;m_1/bn_1/batchnorm/add_1;m_1/stem_1/convolution;m_1/bn_1/batchnorm/sub1", "stem_1"),
        ("m_1/block1_act_1/Relu6;m_1/block1_bn_1/batchnorm/mul_1;m_1/block1_1/depthwise;m_1/z_1/sub1", "block1_1"),
        ("m/quant_stem_act/Relu;m/stem_bn/FusedBatchNormV3;m/quant_stem/Conv2D1", "stem"),
        ("m_1/out_1/Relu;m_1/join_1/Add", "join_1"),
        ("m_1/classes_1/MatMul;m_1/classes_1/BiasAdd", "classes_1"),
        ("m/classes/Softmax", "classes"),
        ("functional_1/flatten_1/Reshape/shape", "flatten_1"),
        ("StatefulPartitionedCall/resnet8/conv1/Conv2D", "conv1"),
        ("outer/inner/conv/Conv2D", "inner/conv"),
        (
            "MobilenetV2/expanded_conv/depthwise/Relu6;MobilenetV2/expanded_conv_5/project/Conv2D_Fold;"
            "MobilenetV2/expanded_conv/depthwise/depthwise_Fold",
            "expanded_conv/depthwise",
        ),
        ("StatefulPartitionedCall:0", ""),
        ("StatefulPartitionedCall_1:0", ""),
        ("serving_default_image:0", ""),
        ("arith.constant3", ""),
        ("Identity", ""),
        ("", ""),
        (";;/", ""),
    ],
)
def test_a_layer_in_a_tensor_name(name, layer):
    assert layer_of(name) == layer


def _model(*rows):
    names = [name for _, name, _ in rows] + [weights for _, _, weights in rows]
    operators = [
        SimpleNamespace(op=kind, inputs=(-1, len(rows) + at), outputs=(at,)) for at, (kind, _, _) in enumerate(rows)
    ]
    tensors = [SimpleNamespace(name=name) for name in names]
    return SimpleNamespace(main=SimpleNamespace(operators=operators, tensors=tensors))


def test_the_last_output_is_named_by_its_weights_and_a_common_suffix_goes():
    conv = ("CONV_2D", "m_1/conv_1/convolution", "")
    exported = _model(conv, ("FULLY_CONNECTED", "StatefulPartitionedCall:0", "m_1/dense_1/MatMul"))
    assert layers_of(exported) == ["conv", "dense"]
    own = _model(("CONV_2D", "m/conv/Conv2D", ""), ("CONV_2D", "m/conv_1/Conv2D", ""))
    assert layers_of(own) == ["conv", "conv_1"], "here the suffix is the layer's own"


def _ops(*rows):
    return [
        OpTime(at, kind, label, 0.0, 0.0, 1, "XNNPACK" if "Delegate" in label else "")
        for at, (kind, label) in enumerate(rows)
    ]


def test_operations_are_matched_only_where_that_is_certain():
    names = ("Convolution (NHWC, F32) IGEMM", "Fully Connected (NC, F32) GEMM", "Add (ND)", "Clamp (NC)")
    conv, dense, add, clamp = ((kind, "[Delegate]:0") for kind in names)
    # A 1x1 convolution runs as a dense layer.
    assert match_operators(_ops(conv, dense, dense), ["CONV_2D", "CONV_2D", "FULLY_CONNECTED"]) == [0, 1, 2]
    # But a dense layer never as a convolution.
    assert match_operators(_ops(conv, dense), ["FULLY_CONNECTED", "CONV_2D"]) == [None, None]
    # One more than in the file: none of that kind; others still.
    assert match_operators(_ops(conv, conv, add, clamp), ["CONV_2D", "ADD"]) == [None, None, 1, None]
    # Kinds that ran in another order than the file's.
    assert match_operators(_ops(add, conv), ["CONV_2D", "ADD"]) == [None, None]
    # The runtime's own kernels say where they are; if they say what is not so, they are not believed.
    softmax = ("SOFTMAX", "[Builtin]:1")
    assert match_operators(_ops(conv, softmax), ["CONV_2D", "SOFTMAX"]) == [0, 1]
    assert match_operators(_ops(softmax), ["CONV_2D", "ADD"]) == [None]
    assert match_operators(_ops(("SOFTMAX", "[Builtin]:9")), ["SOFTMAX"]) == [None]


def test_times_come_from_the_exact_sum_not_the_rounded_column():
    first, second = parse_summary(SUMMARY, runs=20)
    assert (first.node_type, first.delegate, first.name) == ("Convolution (NHWC, QC8) IGEMM", "XNNPACK", "[Delegate]:0")
    assert (second.node_type, second.delegate, second.calls) == ("SOFTMAX", "", 20)
    assert first.avg_ms == pytest.approx(0.6 * 207 / 20 / 1000)
    # Where the two do not agree, the column counts.
    assert parse_summary(SUMMARY.replace("curr=207", "curr=999999"), runs=20)[0].avg_ms == 0.006
    nothing = SUMMARY.replace("60.000%", "-nan%").replace("40.000%", "nan%").replace("curr=207", "curr=0")
    assert all(op.share >= 0 for op in parse_summary(nothing, runs=20))


@pytest.mark.parametrize("text", ["", "nothing here", SUMMARY[:180], SUMMARY.replace("[times called]", "[calls]")])
def test_a_table_of_another_form_is_an_error(text):
    with pytest.raises(JobFailed, match="LiteRT"):
        parse_summary(text, 20)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("text", ModelRefused, "not a TensorFlow Lite file"),
        ("empty", ModelRefused, "not a TensorFlow Lite file"),
        ("truncated", ModelRefused, "truncated"),
        ("custom_op", ModelRefused, "operation that this runtime does not have"),
        ("self_calling", JobFailed, "ended by SIG"),
        ("missing", InputError, "cannot be read"),
    ],
)
def test_files_that_cannot_be_profiled(tiny, name, error, words):
    with pytest.raises(error, match=words):
        profile(tiny.path(name), runs=1)


@pytest.mark.parametrize("options", [{"runs": 0}, {"runs": 10**6}, {"runs": 1.5}])
def test_options_are_checked(tiny, options):
    with pytest.raises(InputError, match="out of range"):
        profile(tiny.path("int8"), **options)


def test_without_the_runtime_it_says_which_one_has_it(monkeypatch, tmp_path):
    refused = lambda words: pytest.raises(InputError, match=words)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ai_edge_litert" else real(name))
    with refused("single operations") as caught:
        litert_c.load()
    assert "ai-edge-litert" in caught.value.received and "2.3" in caught.value.allowed
    elsewhere = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: elsewhere)
    with refused("single operations") as caught:
        litert_c.load()
    assert "without libLiteRt" in caught.value.received
    for library in litert_c._LIBRARIES.values():
        (tmp_path / library).write_bytes(b"no library")
    with refused("single operations") as caught:
        litert_c.load()
    assert "cannot be loaded" in caught.value.received


@pytest.mark.parametrize("version", ["1.4.0", "2.2.1", "3.0.0"])
def test_another_version_is_refused_before_it_is_called(monkeypatch, version):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.setattr(litert_c.ctypes, "CDLL", lambda path: pytest.fail("loaded"))
    with pytest.raises(InputError) as caught:
        litert_c.load()
    assert version in caught.value.received


def test_a_library_without_the_profiler_is_refused(monkeypatch):
    monkeypatch.setitem(litert_c._FUNCTIONS, "LiteRtGetNoSuchThing", ())
    with pytest.raises(InputError) as caught:
        litert_c.load()
    assert "LiteRtGetNoSuchThing" in caught.value.received


def test_arm_cores_without_atomics_are_refused(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU part\t: 0xd08\n")
    with pytest.raises(InputError, match="processor"):
        litert_c.check_atomics("aarch64", cpuinfo)
    litert_c.check_atomics("x86_64", cpuinfo)
    litert_c.check_atomics("aarch64", tmp_path / "none")
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd crc32 atomics fphp cpuid\n")
    litert_c.check_atomics("aarch64", cpuinfo)


def test_the_command_prints_a_table_and_both_totals(command, tiny):
    done = command(tiny.path("int8"), "--runs", "20", "--top", "3")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for words in ("the dearest 3 of", "XNNPACK", "without the profiler", "with it", "20 runs, 1 thread(s)", "Layers:"):
        assert words in text
    by_layer = command(tiny.path("int8"), "--runs", "5", "--by", "layer").stdout
    assert "conv2d" in by_layer and "(not known)" in by_layer


def test_the_command_as_json(command, tiny):
    done = command(tiny.path("int8"), "--runs", "5", "--threads", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["profile"]
    assert found["threads"] == 2 and found["ops"][0]["layer"] == "conv2d" and found["by_type"]


@pytest.mark.parametrize(
    ("args", "words"),
    [(["--by", "colour"], "no view of that name"), (["--runs", "0"], "out of range"), (["--threads", "0"], "1 to 256")],
)
def test_bad_options_are_one_clear_error(command, tiny, args, words):
    done = command(tiny.path("int8"), *args)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_crash_of_the_library_is_one_clear_error(command, tiny):
    done = command(tiny.path("self_calling"), environment={"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]})
    assert done.returncode == 1 and "ended by SIG" in done.stderr and "Traceback" not in done.stderr
