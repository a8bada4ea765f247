"""Roofs that are measured, work that is counted, and where a file stands below them."""

import io
import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from mobile_bench.commands.roofline import _operations_table, fitted
from mobile_bench.device import usable_cores
from mobile_bench.errors import InputError
from mobile_bench.flatbuffer import read_model
from mobile_bench.interpreter import open_model
from mobile_bench.profile import OpTime
from mobile_bench.records import Target
from mobile_bench.roofline import (
    Attained,
    Peak,
    Work,
    _cache_bytes,
    attained,
    by_operation,
    measure_peak,
    work_of,
    work_of_file,
)
from mobile_bench.roofline_picture import picture
from mobile_bench.tiny_file import one_layer

#: 100 GFLOP/s float32, 400 int8; 10 GB/s to memory, 50 in a cache of 1 MB.
PEAK = Peak(1, 100.0, 400.0, 10.0, 50.0, 10**6, {})
THREADS = min(2, usable_cores())
DENSE = ((4, 6), (5, 6), (4, 5))
CONVOLUTION = ((1, 8, 8, 3), (4, 3, 3, 3), (1, 8, 8, 4))
COMMAND = """
import typer
from mobile_bench.cli_support import run_app
from mobile_bench.commands.roofline import roofline
app = typer.Typer()
app.command()(roofline)
run_app(app)
"""


@pytest.fixture(scope="module", autouse=True)
def own_lock(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def peak():
    return measure_peak(Target(threads=THREADS))


def test_the_roofs_are_the_best_of_what_was_measured(peak):
    assert set(peak.raw) == {"float32", "int8", "memory", "cache"} and peak.threads == THREADS
    best = {name: max(max(runs) for runs in kernels.values()) for name, kernels in peak.raw.items()}
    assert (peak.gflops, peak.gops_int8, peak.gbytes_s) == (best["float32"], best["int8"], best["memory"])
    assert peak.cache_gbytes_s == max(best["cache"], best["memory"])
    assert all(min(runs) > 0 and len(runs) >= 5 for kernels in peak.raw.values() for runs in kernels.values())
    assert peak.device["runtime"] and peak.cache_bytes > 0
    json.dumps(peak.raw, allow_nan=False)


def test_a_phone_by_adb_has_no_roofs():
    with pytest.raises(InputError, match="no Python"):
        measure_peak(Target(transport="adb", address="serial"))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shapes", [DENSE, CONVOLUTION])
def test_a_made_file_holds_the_layer_that_was_asked_for(tmp_path, shapes, int8):
    content = one_layer(*shapes, int8=int8)
    model = read_model(content)
    (operator,) = model.main.operators
    assert operator.op == ("FULLY_CONNECTED" if len(shapes[0]) == 2 else "CONV_2D")
    work = work_of(model, operator)
    assert work.flop == 2 * math.prod(shapes[2]) * math.prod(shapes[1][1:])
    assert work.kind == ("int8" if int8 else "float32")
    path = tmp_path / "made.tflite"
    path.write_bytes(content)
    opened = open_model(path, batch=shapes[0][0])
    assert (opened.inputs[0].shape, opened.outputs[0].shape) == (shapes[0], shapes[2])


@pytest.mark.parametrize("int8", [False, True])
def test_a_made_dense_layer_multiplies_by_its_weights(tmp_path, int8):
    path = tmp_path / "made.tflite"
    path.write_bytes(one_layer((8, 64), (16, 64), (8, 16), int8=int8))
    model = read_model(path)
    weights = model.constant(model.main.tensors[1]).astype(np.float32) * (0.01 if int8 else 1)
    values = np.random.default_rng(0).uniform(-1, 1, (8, 64)).astype(np.float32)
    (found,) = open_model(path, batch=8).invoke(values)
    exact = values @ weights.T
    assert np.abs(found - exact).max() < (1.0 if int8 else 1e-3), "int8: half a step of 1 and the input's rounding"
    assert np.abs(exact).max() > 2


def test_below_the_ridge_memory_is_the_roof():
    # 1 MFLOP and 1 MB: 1 FLOP a byte; at 10 GB/s 0.1 ms, at 100 GFLOP/s 0.01 ms
    found = attained("x", 0.2, Work(10**6, 10**6, 10**6), PEAK)
    assert (found.bound, found.cached) == ("memory", False)
    assert found.gflops == pytest.approx(5) and found.intensity == 1 and found.roof_gflops == pytest.approx(10)
    assert found.roof_ms == pytest.approx(0.1) and found.share == pytest.approx(0.5)
    assert found.lost_ms == pytest.approx(0.1)


def test_above_the_ridge_compute_is_the_roof_of_the_kind_of_numbers():
    for kind, roof in (("float32", 100.0), ("int8", 400.0)):
        found = attained("x", 1.0, Work(4 * 10**7, 10**5, 10**5, kind), PEAK)
        assert (found.bound, found.roof_gflops) == ("compute", roof)
        assert found.share == pytest.approx(40 / roof)
    without = replace(PEAK, gops_int8=None)
    assert attained("x", 1.0, Work(4 * 10**7, 10**5, 10**5, "int8"), without).roof_gflops == 100.0


def test_what_fits_into_the_cache_has_the_roof_of_the_cache():
    inside, outside = (attained("x", 1.0, Work(10**5, 10**5, held), PEAK) for held in (5 * 10**5, 5 * 10**5 + 1))
    assert inside.cached and not outside.cached
    assert inside.roof_gflops == pytest.approx(50) and outside.roof_gflops == pytest.approx(10)


def test_work_without_arithmetic_is_a_share_of_the_bandwidth():
    found = attained("copy", 0.4, Work(0, 10**6, 10**6), PEAK)
    assert found.bound == "memory" and found.share == pytest.approx(0.25) and found.gflops == 0


def test_a_roof_that_is_passed_loses_nothing():
    assert attained("x", 0.05, Work(10**6, 10**6, 10**6), PEAK).lost_ms == 0


def test_what_the_file_does_not_say_has_a_time_and_the_reason():
    for work, time_ms in ((Work(None, None, None, note="why"), 1.0), (Work(1, 1, 1), 0.0)):
        found = attained("x", time_ms, work, PEAK)
        assert found.share is None and found.lost_ms is None and found.note


def test_a_files_work_is_that_of_its_operations(tiny):
    for name, kind in (("float32", "float32"), ("int8", "int8"), ("float16", "float32")):
        model = read_model(tiny.path(name))
        work = work_of_file(model)
        # 6 x 6 positions, 8 filters of 3 x 3 x 3; 8 channels of 3 x 3; 288 x 4
        assert work.flop == 2 * (36 * 8 * 27 + 36 * 8 * 9 + 288 * 4) and work.kind == kind
    whole = read_model(tiny.path("float16")).main
    assert any(operator.op == "DEQUANTIZE" for operator in whole.operators)
    float32, float16 = (work_of_file(read_model(tiny.path(name))) for name in ("float32", "float16"))
    assert float16.moved_bytes == float32.moved_bytes, "unpacking weights is no part of an inference"


def test_work_that_is_not_known_is_not_guessed(tiny):
    assert "size open" in work_of_file(read_model(tiny.path("open_size"))).note
    custom = work_of_file(read_model(tiny.path("custom_op")))
    assert custom.flop is None and "not known" in custom.note


def test_operations_come_dearest_first_and_strangers_have_no_figures(tiny):
    model = read_model(tiny.path("float32"))
    times = [
        OpTime(0, "CONV_2D", "[Builtin]:0", 0.1, 0.2, 1, ""),
        OpTime(1, "Copy (NC, X32)", "[Delegate]:1", 0.3, 0.6, 1, "XNNPACK"),
        OpTime(2, "DEPTHWISE_CONV_2D", "[Builtin]:1", 0.2, 0.2, 1, ""),
    ]
    rows = by_operation(model, times, PEAK)
    assert [row.name for row in rows] == ["Copy (NC, X32)", "DEPTHWISE_CONV_2D", "CONV_2D"]
    assert rows[0].share is None and "cannot be told" in rows[0].note
    assert rows[2].gflops == pytest.approx(2 * 36 * 8 * 27 / 0.1 / 1e6)


def test_the_last_level_cache_is_the_largest(tmp_path):
    for number, size in enumerate(("32K", "1024K", "32M", "odd")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{number}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(size + "\n")
    assert _cache_bytes(tmp_path) == 32 * 2**20
    assert _cache_bytes(tmp_path / "nothing") is None


def test_the_picture_names_its_roofs_and_numbers_its_dots():
    works = (Work(10**6, 10**5, 10**5), Work(10**6, 10**6, 10**6, "int8"), Work(0, 10**6, 10**6))
    rows = [attained(f"file <{n}>", 0.2, work, PEAK) for n, work in enumerate(works)]
    root = ET.fromstring(picture("A & B", rows, PEAK))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for text in ("A & B", "float32: 100 GFLOP/s", "int8: 400 GOP/s", "memory: 10 GB/s", "cache: 50 GB/s", "file <0>"):
        assert text in texts
    assert "1 without arithmetic or figures cannot be drawn" in texts
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 2, "one in the picture, one in the legend"
    assert {float(c.get("cx")) for c in circles} and texts.count("1") >= 2


def test_the_command_shows_files_operations_and_a_picture(run_python, tiny, tmp_path):
    drawn = tmp_path / "roof.svg"
    done = run_python("-c", COMMAND, tiny.path("float32"), "--ops", "--json", "--picture", drawn, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    row = found["files"][0]["roofline"]
    assert row["share"] == pytest.approx(row["roof_ms"] / row["time_ms"]) and row["bound"] in ("compute", "memory")
    assert found["peak"]["gflops"] > 0 and len(found["ops"]) > 2
    assert [op["time_ms"] for op in found["ops"]] == sorted((op["time_ms"] for op in found["ops"]), reverse=True)
    ET.parse(drawn)


@pytest.mark.parametrize(("columns", "speed"), [(80, False), (120, True)])
def test_an_operation_is_one_line_of_a_terminal(columns, speed):
    names = ["Fully Connected (NC, QU8) GEMM", "Convolution (NHWC, QU8) DWConv", "Softmax (NC, QU8)"]
    rows = [
        Attained(name, 0.2773, "int8", 139.0, 50.0, 1000.0, 0.039, 0.14, "compute", layer=f"expanded_conv_{n}/expand")
        for n, name in enumerate(names)
    ]
    rows.append(Attained("A_MADE_UP_OPERATION", 1.5, note="the file does not say what it computes, which is long"))
    console = Console(width=columns, record=True, file=io.StringIO())
    console.print(_operations_table(rows, columns))
    lines = console.export_text().splitlines()
    assert len(lines) == 3 + len(rows) + 1 and all(len(line) <= columns for line in lines), lines
    assert [f"{n}/expand: " in line for n, line in enumerate(lines[3:6])] == [True] * 3, lines
    assert "0.2383 ms" in lines[3] and "compute" in lines[3] and "unknown" in lines[6]
    assert ("_0/expand: Fully Connected (NC, QU8) GEMM" if speed else "_0/expand: GEMM ") in lines[3]
    assert ("GFLOP/s" in lines[1], "compute, int8" in lines[3]) == (speed, speed)
    assert fitted("a_long_layer/expand", "Convolution DWConv", 16) == "…/expand: DWConv"
    assert fitted("", "A_MADE_UP_OPERATION", 10) == "A_MADE_UP…" and fitted("a", "B", 10) == "a: B"


def test_bad_input_is_one_clear_error(run_python, tiny, tmp_path):
    for args, words in (
        ((tiny.path("text"),), "not a TensorFlow Lite file"),
        ((tiny.path("int8"), "--picture", tmp_path / "a.png"), "ends in .svg"),
        ((tiny.path("int8"), tiny.path("float32"), "--ops"), "takes one file"),
        ((tiny.path("int8"), "--target", "nowhere"), "nowhere"),
    ):
        done = run_python("-c", COMMAND, *args)
        assert done.returncode == 2 and words in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
