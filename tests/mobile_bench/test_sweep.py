"""How a file scales: each combination measured for itself, in the order asked."""

import json

import pytest

from mobile_bench.cli import app
from mobile_bench.cli_support import exit_code_of
from mobile_bench.commands.sweep import _counts
from mobile_bench.errors import InputError, ModelRefused
from mobile_bench.interpreter import open_model
from mobile_bench.measure import measure

from .small_graphs import write_chain


@pytest.fixture
def sweep(run_python, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    return lambda *args: run_python("-m", "mobile_bench", "sweep", *args, environment=environment)


def test_every_combination_is_measured(sweep, tiny):
    done = sweep(tiny.path("int8"), "--threads", "1,2", "--batch", "1,8", "--json")
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    settings = [(p["measurement"]["batch"], p["measurement"]["target"]["threads"]) for p in points]
    assert settings == [(1, 1), (1, 2), (8, 1), (8, 2)]
    for point in points:
        measurement, summary = point["measurement"], point["summary"]
        assert measurement["kind"] == "sweep" and measurement["input_shape"][0] == measurement["batch"]
        assert summary["fps"] == pytest.approx(1000 * measurement["batch"] / summary["median_ms"])


def test_a_person_sees_throughput_and_what_it_costs(sweep, tiny):
    done = sweep(tiny.path("float32"), "--threads", "1", "--batch", "1,16")
    assert done.returncode == 0, done.stderr
    for word in ("Images/s", "1.00x", "Peak memory", "core(s)"):
        assert word in done.stdout


def test_a_point_that_fails_is_a_row_with_its_reason(sweep, tiny):
    done = sweep(tiny.path("self_calling"), "--threads", "1", "--batch", "1")
    assert done.returncode == 1 and "failed" in done.stdout and "Traceback" not in done.stderr


def test_an_interrupted_sweep_keeps_the_points_before(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = []

    def measure_two(*args, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(measure(*args, **{**options, "rounds": 1, "seconds": 0}))
        return done[-1]

    monkeypatch.setattr("mobile_bench.measure.measure", measure_two)
    command = ["sweep", str(tiny.path("int8")), "--threads", "1", "--batch", "1,2,3"]
    assert exit_code_of(lambda **_: app([*command, "--json"], standalone_mode=False)) == 130
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["interrupted"] is True and len(found["points"]) == 2 and "2 of 3 points" in said.err
    assert exit_code_of(lambda **_: app(command, standalone_mode=False)) == 130
    assert capsys.readouterr().out == "", "nothing was measured"


def test_a_file_that_cannot_be_used_exits_2(sweep, tiny):
    done = sweep(tiny.path("truncated"), "--threads", "1", "--batch", "1")
    assert done.returncode == 2 and "truncated" in done.stderr


def test_sizes_are_measured_where_the_file_leaves_them_open(sweep, tiny):
    done = sweep(tiny.path("open_size"), "--size", "16,24", "--threads", "1", "--batch", "1,2", "--json")
    assert done.returncode == 0, done.stderr
    shapes = [tuple(p["measurement"]["input_shape"]) for p in json.loads(done.stdout)["points"]]
    assert shapes == [(1, 16, 16, 3), (2, 16, 16, 3), (1, 24, 24, 3), (2, 24, 24, 3)]


def test_a_fixed_size_is_changed_where_the_operations_allow_it(sweep, tmp_path):
    file = write_chain(tmp_path / "chain.tflite", "LOGISTIC", "EXP", shape=(1, 8, 8, 3))
    done = sweep(file, "--size", "8,16", "--threads", "1", "--batch", "1", "--json")
    assert done.returncode == 0, done.stderr
    shapes = [tuple(p["measurement"]["input_shape"]) for p in json.loads(done.stdout)["points"]]
    assert shapes == [(1, 8, 8, 3), (1, 16, 16, 3)]


def test_a_size_that_changes_the_answers_form_is_refused(tmp_path):
    """Twice the side makes four rows of one image: fast, and no answer."""
    rows = write_chain(tmp_path / "rows.tflite", "LOGISTIC", "ROWS", shape=(1, 8, 8, 3))
    with pytest.raises(ModelRefused, match=r"another form.*\(4, 192\) at 16x16.*\(1, 192\)"):
        open_model(rows, size=(16, 16), resize=True)
    assert open_model(rows, size=(8, 8), batch=3, resize=True).outputs[0].shape == (3, 192)
    pixel = write_chain(tmp_path / "pixel.tflite", "LOGISTIC", shape=(1, 1, 1, 3))
    with pytest.raises(ModelRefused, match="another form"):
        open_model(pixel, size=(2, 2), resize=True)


def test_the_size_of_a_real_classifier_is_changed_as_far_as_its_pooling_allows(shared_model):
    file = shared_model("mobilenet_v1_0.25_128_quant.tflite")
    model = open_model(file, size=(160, 160), resize=True)
    assert (model.inputs[0].shape, model.outputs[0].shape) == ((1, 160, 160, 3), (1, 1001))
    with pytest.raises(ModelRefused, match=r"fixes its input size.*256x256"):
        open_model(file, size=(256, 256), resize=True)
    with pytest.raises(ModelRefused, match=r"160x160 in a batch of 2, which may be"):
        open_model(file, size=(160, 160), batch=2, resize=True)
    with pytest.raises(ModelRefused, match="compiled for the Edge TPU"):
        open_model(shared_model("mobilenet_v1_0.25_128_quant_edgetpu.tflite"), size=(160, 160), resize=True)


def test_a_size_that_the_file_does_not_have_is_refused_and_the_others_go_on(sweep, tiny):
    done = sweep(tiny.path("int8"), "--size", "16,12", "--threads", "1", "--batch", "1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for text in ("Size", "16x16", "refused", "12x12", "1.00x"):
        assert text in done.stdout
    assert "not measured: The file fixes its input size" in done.stderr
    plain = sweep(tiny.path("int8"), "--threads", "1", "--batch", "1")
    assert plain.returncode == 0 and "Size" not in plain.stdout


@pytest.mark.parametrize("text", ["", "0", "1,,2", "a", "-1", "1.5", "1;2", "9999"])
def test_counts_are_checked(text):
    with pytest.raises(InputError, match="not a list of counts"):
        _counts("threads", text, 256)


def test_counts_come_once_each_in_order():
    assert _counts("batch", "4, 1,4", 9) == [4, 1]


def test_bad_input_is_one_clear_error(sweep, tiny):
    for args, words in (
        ((tiny.path("text"),), "not a TensorFlow Lite file"),
        ((tiny.path("int8"), "--threads", "0"), "1 to 256"),
        ((tiny.path("int8"), "--batch", ",".join(map(str, range(1, 65)))), "up to 64"),
    ):
        done = sweep(*args)
        assert done.returncode == 2 and words in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
