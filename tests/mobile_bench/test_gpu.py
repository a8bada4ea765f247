"""The GPU by LiteRT's CompiledModel, run for real on SwiftShader, a Vulkan driver in software: see conftest.py."""

import pytest

from mobile_bench.errors import DelegateError, InputError, ModelRefused
from mobile_bench.flatbuffer import read_model
from mobile_bench.gpu import check_cpu, open_gpu, placement
from mobile_bench.inputs import InputSpec
from mobile_bench.jobs import run_job

from .small_graphs import write_chain

PARTLY = """\
INFO: [delegate_webgpu.cc:363] Created a WebGPU environment.
ERROR: Following operations are not supported by GPU delegate:
STRIDED_SLICE: Slice does not support shrink_axis_mask parameter. 
1 operations will run on the GPU, and the remaining 2 operations will run on the CPU.
"""


@pytest.fixture
def gpu(swiftshader):
    return swiftshader


@pytest.fixture
def run(tmp_path):
    """run(path, environment, ...) -> the worker's answer about a file on the GPU."""

    def run(path, environment, **asked):
        job = {"tflite": str(path), "threads": 1, "runtime": "auto", "batch": 1, "runs": 3, "max_runs": 3, "seed": 0}
        job |= {"spec": None, "accelerator": "gpu", **asked}
        return run_job("mobile_bench.worker", job, tmp_path, timeout_s=120, environment=environment)

    return run


def test_a_network_on_the_gpu(run, gpu, tiny):
    found = run(tiny.path("open_size"), gpu, spec=InputSpec(12, 16, 3).to_dict(), batch=2)
    assert {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"} <= set(found["delegated_ops"])
    assert found["fallback_ops"] == [] and 0 <= found["output_drift"] < 1e-4
    assert found["input_shape"] == [2, 12, 16, 3] and len(found["latency_ms"]) == 3
    device = found["device"]
    assert device["accelerator"].startswith("SwiftShader") and device["fully_accelerated"] is True
    assert device["timed"] == "run and read of the output" and device["runtime"] == "ai-edge-litert"
    assert any("software on the CPU" in warning for warning in found["warnings"])


def test_what_is_timed_is_the_answer_to_the_input_in_place(gpu, tiny, run_python):
    code = """
import sys, numpy as np
from mobile_bench.gpu import open_gpu
from mobile_bench.interpreter import open_model
options = {"batch": 3, "size": (12, 16)}
gpu, cpu = open_gpu(sys.argv[1], **options), open_model(sys.argv[1], **options)
assert [(t.shape, t.dtype) for t in gpu.inputs + gpu.outputs] == [(t.shape, t.dtype) for t in cpu.inputs + cpu.outputs]
random, seen = np.random.default_rng(0), []
for _ in range(3):
    values = random.uniform(-1, 1, (3, 12, 16, 3)).astype(np.float32)
    (expected,) = cpu.invoke(values)
    np.testing.assert_allclose(gpu.invoke(values)[0], expected, atol=1e-5)
    gpu.set_inputs(-values)
    gpu.bare_invoke()
    np.testing.assert_allclose(gpu.get_outputs()[0], cpu.invoke(-values)[0], atol=1e-5)
    seen.append(expected)
assert np.abs(seen[0] - seen[1]).max() > 1e-3
"""
    done = run_python("-c", code, tiny.path("open_size"), environment=gpu)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_wrong_answer_is_refused(run, gpu, tmp_path, run_python):
    path = write_chain(tmp_path / "reversed.tflite", "LOGISTIC", "REVERSED")
    code = """
import sys, numpy as np
from mobile_bench.gpu import open_gpu
from mobile_bench.interpreter import open_model
values = np.linspace(0, 1, 8, dtype=np.float32)[None]
print(np.abs(open_gpu(sys.argv[1]).invoke(values)[0] - open_model(sys.argv[1]).invoke(values)[0]).max())
"""
    done = run_python("-c", code, path, environment=gpu)
    if float(done.stdout.split()[-1]) < 0.1:
        pytest.skip("this LiteRT computes a reversed CUMSUM as it should")
    with pytest.raises(DelegateError, match=r"'reversed_1' differs from the CPU by \d.*enforce_f32=true"):
        run(path, gpu)
    right = run(write_chain(tmp_path / "right.tflite", "LOGISTIC", "CUMSUM"), gpu)
    assert right["delegated_ops"] == ["LOGISTIC", "CUMSUM"] and right["output_drift"] < 1e-4


def test_what_is_left_to_the_cpu_must_be_allowed(run, gpu, tmp_path):
    path = write_chain(tmp_path / "cut.tflite", "LOGISTIC", "CUT", "LOGISTIC", shape=(1, 4, 6))
    words = r"leaves 2 of 3 operations to the CPU.*1 STRIDED_SLICE, 1 not named.*shrink_axis_mask.*--allow-fallback"
    with pytest.raises(DelegateError, match=words):
        run(path, gpu)
    found = run(path, gpu, allow_fallback=True)
    assert found["delegated_ops"] == ["not named"] and found["fallback_ops"] == ["STRIDED_SLICE", "not named"]
    assert found["device"]["fully_accelerated"] is False and any("2 of 3" in text for text in found["warnings"])
    with pytest.raises(DelegateError, match=r"takes none of the file's operations.*shrink_axis_mask"):
        run(write_chain(tmp_path / "all.tflite", "CUT", shape=(1, 4, 6)), gpu, allow_fallback=True)


def test_integers_of_64_bits_come_back(run, gpu, tmp_path, run_python):
    path = write_chain(tmp_path / "wide.tflite", "EXP", "INT64")
    with pytest.raises(DelegateError, match="leaves 1 of 2 operations to the CPU"):
        run(path, gpu)
    found = run(path, gpu, allow_fallback=True)
    assert (found["delegated_ops"], found["fallback_ops"]) == (["EXP"], ["CAST"])
    assert found["device"]["fully_accelerated"] is False and found["output_drift"] < 1e-3
    code = """
import sys, numpy as np
from mobile_bench.gpu import open_gpu
model = open_gpu(sys.argv[1], allow_fallback=True)
model.set_inputs(np.full((1, 8), 23, np.float32))
model.run()
(found,) = model.get_outputs()
print(found.dtype, found.shape, abs(int(found[0, 7]) / np.exp(23) - 1) < 1e-3)
"""
    done = run_python("-c", code, path, environment=gpu)
    assert done.stdout.endswith("\nint64 (1, 8) True\n"), done.stderr[-2000:]


def test_files_in_turns(gpu, tmp_path):
    one, two = (write_chain(tmp_path / f"{n}.tflite", *["LOGISTIC"] * n) for n in (1, 2))
    job = {
        "tflites": 2, "specs": [None, None], "threads": 1, "runtime": "auto", "batch": 1, "seed": 0, "order_seed": 1,
        "seconds": 0.05, "tflite_0": str(one), "tflite_1": str(two), "accelerator": "gpu",
    }  # fmt: skip
    found = run_job("mobile_bench.interleave", job, tmp_path, timeout_s=120, environment=gpu)
    assert found["delegated_ops"] == [["LOGISTIC"], ["LOGISTIC", "LOGISTIC"]] and max(found["output_drift"]) < 1e-4
    assert found["device"]["timed"] == "run and read of the output"
    assert sum("software on the CPU" in warning for warning in found["warnings"]) == 1


def test_what_the_gpu_cannot_take(run, gpu, tiny, tmp_path):
    with pytest.raises(DelegateError, match=r"only files in which every size is fixed"):
        run(tiny.path("two_inputs"), gpu)
    with pytest.raises(ModelRefused, match=r"does not have. Received: made-up-op"):
        run(tiny.path("custom_op"), gpu)


def test_without_a_gpu(run, tmp_path):
    nothing = {"VK_DRIVER_FILES": str(tmp_path / "none.json"), "XDG_RUNTIME_DIR": str(tmp_path)}
    with pytest.raises(DelegateError, match=r"There is no GPU that LiteRT can use here.*libvulkan1"):
        run(write_chain(tmp_path / "one.tflite", "LOGISTIC"), nothing)


def test_options_and_runtimes_that_are_not_there(tmp_path):
    path = write_chain(tmp_path / "one.tflite", "LOGISTIC")
    for options in ({"colour": "true"}, {"enforce_f32": "perhaps"}):
        with pytest.raises(InputError, match=r"no such option.*Allowed: enforce_f32=true"):
            open_gpu(path, options=options)
    with pytest.raises(InputError, match=r"Only LiteRT reaches the GPU. Received: the runtime tflite-runtime"):
        open_gpu(path, runtime="tflite-runtime")


@pytest.mark.parametrize(("features", "refused"), [("fp asimd crc32", True), ("fp asimd crc32 atomics", False)])
def test_an_arm_core_without_atomics_is_refused(tmp_path, features, refused):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nFeatures\t: {features}\nprocessor\t: 1\nFeatures\t: {features}\n")
    check_cpu("x86_64", cpuinfo)
    if refused:
        with pytest.raises(DelegateError, match=r"GPU accelerator ends with an illegal.*--accelerator cpu"):
            check_cpu("aarch64", cpuinfo)
    else:
        check_cpu("aarch64", cpuinfo)


def test_which_operations_stay_on_the_cpu(tmp_path):
    def placed(*operations, text=PARTLY, full=False):
        path = write_chain(tmp_path / "x.tflite", *operations, shape=(1, 4, 6))
        return placement(text, read_model(path).main.operators, full)

    why = "STRIDED_SLICE: Slice does not support shrink_axis_mask parameter."
    assert placed("LOGISTIC", "CUT", "EXP") == (("not named",), ("STRIDED_SLICE", "not named"), why)
    two = PARTLY.replace("1 operations", "2 operations").replace("remaining 2", "remaining 1")
    assert placed("LOGISTIC", "EXP", "CUT", text=two) == (("LOGISTIC", "EXP"), ("STRIDED_SLICE",), why)
    again = PARTLY.replace("STRIDED_SLICE", "EXP") + two
    assert placed("LOGISTIC", "EXP", "CUT", text=again) == (("LOGISTIC", "EXP"), ("STRIDED_SLICE",), why)
    none = PARTLY.replace("1 operations", "No operations").replace("the remaining 2", "all 1")
    assert placed("CUT", text=none) == ((), ("STRIDED_SLICE",), why)
    assert placed("LOGISTIC", "CUT", "EXP", full=True)[1] == ("STRIDED_SLICE", "not named"), "XNNPACK has the rest"
    assert placed("LOGISTIC", "EXP", text="", full=True) == (("LOGISTIC", "EXP"), (), "")
    assert placed("LOGISTIC", "EXP", text="")[0] == (), "what did not say that it runs there does not"


def test_the_input_must_fit(gpu, tmp_path, run_python):
    path = write_chain(tmp_path / "one.tflite", "LOGISTIC")
    code = """
import sys, numpy as np
from mobile_bench.errors import ModelRefused
from mobile_bench.gpu import open_gpu
model = open_gpu(sys.argv[1])
for values in (np.zeros((1, 9), np.float32), np.zeros((1, 8), np.int32)):
    try:
        model.set_inputs(values)
    except ModelRefused:
        print("refused")
"""
    assert run_python("-c", code, path, environment=gpu).stdout.split().count("refused") == 2
