"""benchmark_model's output in every recorded form, whole and cut short."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobile_bench.benchmark_model import OpTime, arguments, doubts, failure, parse, parse_op_profile, wanted_shapes
from mobile_bench.errors import DelegateError, InputError, JobFailed, ModelRefused, Problem
from mobile_bench.inputs import InputSpec
from mobile_bench.records import Target

NEW = """\
INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Loaded model model.tflite
INFO: Initialized session in 6.395ms.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=154 first=2761 curr=3200 min=2500 max=9000 avg=3243.58 std=700 p5=2600 median=3100 p95=4000

INFO: Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=337 first=2881 curr=2703 min=2605 max=20356 avg=2942.27 std=1190 p5=2647 median=2781 p95=3169

INFO: Inference timings in us: Init: 6395, First inference: 2761, Warmup (avg): 3243.58, Inference (avg): 2942.27
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE.
INFO: Memory footprint delta from the start of the tool (MB): init=39.4531 overall=40.8281
INFO: Overall peak memory footprint (MB) via periodic monitoring: 13.1797
"""
PERCENTILES = " p5=2647 median=2781 p95=3169"
FULL = "INFO: Explicitly applied GPU delegate, and the model graph will be completely executed by the delegate.\n"
PARTIAL = (
    "INFO: Explicitly applied GPU delegate, and the model graph will be partially executed by the delegate"
    " w/ 3 delegate kernels.\n"
)
NONE = "INFO: Though GPU delegate is explicitly applied, the model graph will not be executed by the delegate.\n"
XNNPACK = FULL.replace("GPU", "XNNPACK")
OLD = "\n".join(
    line.replace(PERCENTILES, "") for line in NEW.replace("INFO: ", "").splitlines() if "peak" not in line
) + "\n"  # fmt: skip
LOGCAT = "".join(
    f"11-23 13:50:02.{number:03d}  4711  4711 I tflite  : {line.removeprefix('INFO: ')}\n"
    "11-23 13:50:02.500   812   830 D WifiHAL : count of scans avg=3 is fine\n"
    for number, line in enumerate(NEW.splitlines())
)
ONE_RUN = NEW.replace(
    "count=337 first=2881 curr=2703 min=2605 max=20356 avg=2942.27 std=1190" + PERCENTILES, "count=1 curr=2942"
).replace("Inference (avg): 2942.27", "Inference (avg): 2942")
SLOW = NEW.replace("avg=2942.27", "avg=1.04176e+06").replace("Inference (avg): 2942.27", "Inference (avg): 1.04176e+06")
CSV = """\
node type, first, avg_ms, %, cdf%, mem KB, times called, name
CONV_2D, 0.135, 0.128, 12.5%, 12.5%, 0, 1, [a/Relu6, a/add;b]:0
DEPTHWISE_CONV_2D, 0.05, 0.0402, 3.9%, 16.4%, 0, 2, [b]:1

node type, count, avg_ms, avg %, cdf %, mem KB, times called
CONV_2D, 1, 0.128, 12.5%, 12.5%, 0, 1
"""


def test_the_new_format_is_read_whole():
    report = parse(NEW)
    assert (report.init_ms, report.first_inference_ms, report.warmup_avg_ms) == (6.395, 2.761, 3.24358)
    assert (report.runs, report.avg_ms, report.min_ms, report.max_ms, report.std_ms) == (
        337, 2.94227, 2.605, 20.356, 1.19,
    )  # fmt: skip
    assert (report.p5_ms, report.median_ms, report.p95_ms) == (2.647, 2.781, 3.169)
    assert report.peak_memory_bytes == round(13.1797 * 2**20)
    assert report.memory_overall_bytes == round(40.8281 * 2**20)
    assert (report.delegated, report.delegate_kernels, report.errors) == ("not asked", None, ())


def test_older_versions_print_less():
    report = parse(OLD)
    assert (report.runs, report.avg_ms, report.median_ms, report.peak_memory_bytes) == (337, 2.94227, None, None)


def test_logcats_prefixes_and_other_lines_between_do_not_matter():
    assert parse(LOGCAT) == parse(NEW)
    assert parse(NEW.replace("\n", "\r\n")) == parse(NEW)


@pytest.mark.parametrize("suffix", ["", "(all same)"])
def test_one_run_has_no_spread(suffix):
    report = parse(ONE_RUN.replace("curr=2942", f"curr=2942{suffix}"))
    assert (report.runs, report.avg_ms, report.min_ms, report.max_ms, report.std_ms) == (1, 2.942, 2.942, 2.942, None)


def test_without_warm_up_there_is_no_first_inference():
    report = parse(
        NEW.replace("First inference: 2761, Warmup (avg): 3243.58", "First inference: 0, Warmup (avg): -nan")
    )
    assert (report.first_inference_ms, report.warmup_avg_ms, report.avg_ms) == (None, None, 2.94227)


def test_large_values_come_with_an_exponent():
    assert parse(SLOW).avg_ms == 1041.76


@pytest.mark.parametrize(
    ("lines", "delegated", "kernels"),
    [
        (FULL, "full", None),
        (PARTIAL, "partial", 3),
        (NONE, "none", 0),
        (XNNPACK, "full", None),
        (NONE + XNNPACK, "none", 0),  # XNNPACK took what the GPU did not
        (FULL.replace("Explicitly applied", "Applied").replace("by the", "w/ the"), "full", None),
    ],
)
def test_how_much_a_delegate_took_is_told(lines, delegated, kernels):
    report = parse(lines + NEW)
    assert (report.delegated, report.delegate_kernels) == (delegated, kernels)


def test_errors_and_flags_it_does_not_know_are_kept():
    report = parse("ERROR: Something odd\nWARN: Unconsumed cmdline flags: --use_gpu=true --a=1\n" + NEW)
    assert report.errors == ("Something odd",)
    assert report.ignored_flags == ("use_gpu", "a")


@given(st.sampled_from([NEW, OLD, LOGCAT, ONE_RUN, SLOW, PARTIAL + NEW]), st.data())
def test_a_cut_anywhere_gives_the_whole_times_or_a_problem(text, data):
    end = data.draw(st.integers(0, len(text)))
    try:
        report = parse(text[:end])
    except Problem as problem:
        assert isinstance(problem, JobFailed) and "cut short" in str(problem)
    else:
        assert report.avg_ms == parse(text).avg_ms
        assert report.peak_memory_bytes in (None, parse(text).peak_memory_bytes)


@given(st.text() | st.lists(st.sampled_from([*NEW.splitlines(), "count=1e9 avg=nan", "count=0"])).map("\n".join))
def test_no_text_raises_anything_but_a_problem(text):
    for read in (parse, parse_op_profile):
        with contextlib.suppress(Problem):
            read(text + "\n")


def test_a_missing_line_between_is_noticed():
    lines = [line for line in NEW.splitlines(keepends=True) if "count=337" not in line]
    with pytest.raises(JobFailed, match="cut short"):
        parse("".join(lines))


@pytest.mark.parametrize("value", ["-2942.27", "nan", "inf"])
def test_a_clock_that_goes_backwards_is_no_result(value):
    with pytest.raises(JobFailed, match=r"backwards|cut short"):
        parse(NEW.replace("2942.27", value))


@pytest.mark.parametrize(
    ("text", "code", "kind", "words"),
    [
        ("ERROR: Failed to load model model.tflite\nERROR: Benchmarking failed.\n", 1, ModelRefused, "Failed to load"),
        ("ERROR: Failed to initialize model loader with path model.tflite\n", 1, ModelRefused, "loader"),
        ("ERROR: Encountered unresolved custom op: Foo.\n", 1, ModelRefused, "Foo"),
        ("ERROR: Disallowed CPU fallback detected.\n", 1, DelegateError, "fallback"),
        ("INFO: x\nSegmentation fault\n", 139, JobFailed, "SIGSEGV"),
        ("Aborted\n", 134, JobFailed, "SIGABRT"),
        ("", 255, JobFailed, "signal 127"),
        ("sh: not executable\n", 126, JobFailed, "android_aarch64"),
        ("ERROR: what is this\n", 1, JobFailed, "exit code 1"),
    ],
)
def test_a_failure_has_its_kind_and_the_last_lines(text, code, kind, words):
    problem = failure(text, code, "gpu")
    assert type(problem) is kind
    assert words in str(problem)


@pytest.mark.parametrize("text", [CSV, CSV.replace("type, first", "type, start, first").replace("2D, 0", "2D, 0.0, 0")])
def test_a_profile_with_and_without_the_older_column(text):
    first = OpTime("CONV_2D", 0.128, 1, "[a/Relu6, a/add;b]:0")
    assert parse_op_profile(text) == (first, OpTime("DEPTHWISE_CONV_2D", 0.0402, 2, "[b]:1"))


def test_of_two_profiles_the_one_of_the_runs_counts():
    loading = "Profiling Info for Benchmark Initialization:\n" + CSV.replace("CONV_2D", "AllocateTensors")
    text = loading + "Operator-wise Profiling Info for Regular Benchmark Runs:\n==== Run Order ====\n" + CSV
    assert parse_op_profile(text)[0].node_type == "CONV_2D"


@pytest.mark.parametrize("text", ["", "no table", CSV.replace("avg_ms", "avg"), CSV.replace("0.128", "fast")])
def test_a_profile_that_is_none(text):
    with pytest.raises(JobFailed):
        parse_op_profile(text)


def test_the_command_line():
    flags = arguments("model.tflite", Target("adb", threads=4), runs=10, warmup_runs=2, max_secs=12.5)
    assert flags[0] == "--graph=model.tflite"
    assert {"--num_threads=4", "--num_runs=10", "--max_secs=12.5", "--min_secs=0", "--use_xnnpack=true"} <= set(flags)
    gpu = arguments("m", Target("adb", "gpu"), runs=1, warmup_runs=0, full_delegation=True, profile="p.csv")
    assert {"--use_gpu=true", "--require_full_delegation=true", "--op_profiling_output_file=p.csv"} <= set(gpu)
    assert "--use_nnapi=true" in arguments("m", Target("adb", "nnapi"), runs=1, warmup_runs=0)
    external = arguments("m", Target("adb", "external"), runs=1, warmup_runs=0, delegate="./d.so")
    assert "--external_delegate_path=./d.so" in external


def test_inputs_are_named_with_their_shapes_and_files():
    flags = arguments(
        "m", Target("adb"), runs=1, warmup_runs=0, inputs={"a:0": (1, 8, 8, 3), "b": (1, 2)},
        value_files={"a:0": "in.raw", "b": "b.raw"}, output="out.raw",
    )  # fmt: skip
    assert {
        "--input_layer=a:0,b", "--input_layer_shape=1,8,8,3:1,2", "--input_layer_value_files=a::0:in.raw,b:b.raw",
        "--output_filepath=out.raw",
    } <= set(flags)  # fmt: skip


@pytest.mark.parametrize("accelerator", ["edgetpu", "external"])
def test_an_accelerator_it_cannot_use(accelerator):
    with pytest.raises(InputError):
        arguments("m", Target("adb", accelerator), runs=1, warmup_runs=0)


def test_shapes_are_asked_for_only_where_the_files_own_will_not_do(tiny):
    assert wanted_shapes(tiny.path("int8"), 1, None) == (None, (1, 12, 12, 3))
    shapes, first = wanted_shapes(tiny.path("int8"), 4, None)
    assert first == (4, 12, 12, 3) and list(map(tuple, shapes.values())) == [first]
    assert wanted_shapes(tiny.path("open_size"), 1, InputSpec(20, 24, 3))[1] == (1, 20, 24, 3)
    assert wanted_shapes(tiny.path("text"), 1, None) == (None, ())


def test_what_makes_it_doubtful():
    whole, part = parse(FULL + NEW), parse("WARN: Unconsumed cmdline flags: --x=1\n" + PARTIAL + ONE_RUN)
    assert doubts([whole], 1, None) == []
    words = " ".join(doubts([whole, part], 3, 60))
    assert all(text in words for text in ("2 of 3 samples", "part of the model", "--x", "differing numbers"))
