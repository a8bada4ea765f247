"""Every page through Streamlit's own test runner, with good, odd, unfinished and damaged studies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

import dashboard
from dashboard.launcher import APP, arguments
from mobile_bench import store
from mobile_bench.errors import InputError

from .conftest import FAILURE, ODD, add_variant, write_record


def _leaderboard():
    return AppTest.from_file(APP, default_timeout=60).run()


def _one(page: str):
    def script(page):
        import importlib

        from dashboard import shell

        view = shell.open_view()
        if view:
            importlib.import_module(f"dashboard.views.{page}").show(view)

    return AppTest.from_function(script, default_timeout=60, args=(page,)).run()


def _words(app) -> str:
    """Everything that the page says, tables left out."""
    kinds = (app.markdown, app.caption, app.info, app.warning, app.error, app.subheader, app.text)
    said = [element.value.replace("\\", "") for kind in kinds for element in kind]
    return "\n".join([*said, *(element.proto.body for element in app.get("html"))])


def _number(app, label):
    return next(widget for widget in app.number_input if widget.label == label)


def test_the_leaderboard_leads_with_what_to_ship(study, at_study):
    at_study(study)
    app = _leaderboard()
    assert not app.exception and not app.error
    assert [heading.value for heading in app.subheader] == ["What to ship", "All variants", "Trade-off"]
    assert "Ship <strong>resnet8 qat-int8</strong>: 84.42%" in _words(app)
    assert app.warning[0].value.startswith("**About the data:** CIFAR")
    assert "AMD EPYC 7B13, 2 cores" in _words(app) and "ai-edge-litert 2.3.0" in _words(app).replace("--", "-")
    table = app.dataframe[0].value
    assert len(table) == 29
    assert table.iloc[0][["variant", "top1", "interval"]].tolist() == [
        "qat-int8",
        pytest.approx(84.42),
        "83.70 – 85.12",
    ]
    assert set(table["verdict"]) == {"✓ in time", "✗ too slow", "not measured", "failed", "missing"}
    assert FAILURE.replace("'", "") in _words(app).replace("'", "")


def test_the_deadline_is_a_limit_that_can_be_moved(study, at_study):
    at_study(study)
    app = _leaderboard()
    _number(app, "Deadline (frames/s)").set_value(2500.0).run()
    table = app.dataframe[0].value
    late = table[table["verdict"] == "✗ too slow"]
    assert set(late["model"]) == {"resnet8", ODD} and (late["budget"] > 100).all()
    assert "Ship <strong>mobilenet-w0.25 qat-int8</strong>" in _words(app)
    app.toggle[0].set_value(True).run()
    assert set(app.dataframe[0].value["verdict"]) == {"✓ in time"}
    _number(app, "Deadline (frames/s)").set_value(10_000.0).run()
    assert "Nothing meets" not in _words(app) or not len(app.dataframe)
    assert not app.exception


def test_the_points_that_may_be_lost_change_the_small_pick(study, at_study):
    at_study(study)
    app = _leaderboard()
    assert "To save space, <strong>resnet8 baseline-dynamic</strong>" in _words(app)
    _number(app, "May lose (points)").set_value(5.5).run()
    assert "To save space, <strong>mobilenet-w0.25 distill_prune_qat-int8</strong>" in _words(app)


def test_the_trade_off_follows_its_filters(study, at_study):
    at_study(study)
    app = _one("trade_off")
    assert not app.exception and app.subheader[0].value == "Trade-off"
    assert "mobilenet-w0.25 distill-int8" in _words(app)
    app.multiselect[2].set_value(["float16"]).run()
    app.multiselect[1].set_value(["qat"]).run()
    assert "None of these variants" in _words(app) and not app.exception


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "resnet8/distill_prune_qat-int8",
            ["3 steps, then exported in full int8", "validation 77.90% → 81.10%", "conv1, dense"],
        ),
        ("resnet8/baseline-float32", ["No training step", "400 timed runs"]),
        (f"{ODD}/qat-int8", ["There is no file", "CUMSUM"]),
        (f"{ODD}/baseline-int8", ["No time to show", "not measured"]),
        (f"{ODD}/prune-int8", ["unresolved custom op"]),
        (f"{ODD}/lowrank-float32", ["not there", "the study ended without it"]),
    ],
)
def test_one_variant_tells_its_story(study, at_study, key, said):
    at_study(study)
    app = _one("variant")
    app.selectbox[1].set_value(key).run()
    assert not app.exception
    for words in said:
        assert words in _words(app)


def test_one_variant_shows_quantization_and_settings(study, at_study):
    at_study(study)
    app = _one("variant")  # opens with what to ship
    tables = [table.value for table in app.dataframe]
    said = " ".join(str(value) for table in tables for value in table.to_numpy().ravel())
    assert "scale 0.0078, zero point -1" in said and "train.learning_rate" in said and "SHA-256" in said


def test_a_folder_of_studies_is_a_choice(study, tmp_path, at_study):
    write_record(tmp_path / "small", (), name="small")
    add_variant(tmp_path / "big", "m", "baseline", "int8", 9000, 4000, 1.0)
    write_record(tmp_path / "big", ("m/baseline-int8",), name="big")
    at_study(tmp_path)
    app = _leaderboard()
    assert sorted(app.selectbox[0].options) == ["big", "small"]
    app.selectbox[0].set_value(tmp_path / "big").run()
    assert "Ship <strong>m baseline-int8</strong>" in _words(app) and not app.exception


def test_a_choice_of_machine_appears_where_there_are_two(own_study, at_study):
    from .conftest import DEVICE, measurement

    folder = own_study / "resnet8/qat-int8"
    sha = store.read_entry(folder).variant.sha256
    store.write_measurement(folder, measurement(sha, 9.0, 5, {**DEVICE, "cpu": "Cortex-A72"}))
    at_study(own_study)
    app = _leaderboard()
    places = app.selectbox[1]
    assert [("EPYC" in option, "A72" in option) for option in places.options] == [(True, False), (False, True)]
    places.select_index(1).run()
    medians = app.dataframe[0].value["median"].dropna()
    assert len(medians) == 1 and medians.iloc[0] == pytest.approx(9, rel=0.1)


PAGES = ("leaderboard", "trade_off", "variant", "xray")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("finished", [True, False])
def test_an_empty_study_is_said_in_words(tmp_path, at_study, page, finished):
    write_record(tmp_path, (), finished=finished)
    at_study(tmp_path)
    app = _one(page)
    assert not app.exception and app.info
    assert ("being made" in _words(app)) != finished


@pytest.mark.parametrize("page", PAGES)
def test_a_study_being_written_says_how_far_it_is(tmp_path, at_study, page):
    add_variant(tmp_path, "m", "baseline", "float32", 9000, 4000, None)
    half = tmp_path / "m/baseline-int8"
    half.mkdir()
    (half / "model.tflite").write_bytes(b"TFL3")
    write_record(tmp_path, ("m/baseline-float32", "m/baseline-int8"), finished=False)
    at_study(tmp_path)
    app = _one(page)
    assert not app.exception and "1 of 2 variants are there" in _words(app)


DAMAGE = {
    "truncated": '{"schema_version": 1, "name"',
    "a list": "[]",
    "another version": '{"schema_version": 99}',
    "fields gone": '{"schema_version": 1}',
    "binary": "\0\x07",
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_study_record_is_an_error_in_words(own_study, at_study, page, content):
    (own_study / "study.json").write_text(content)
    at_study(own_study)
    app = _one(page)
    assert not app.exception and "This study cannot be read" in app.error[0].value


@pytest.mark.parametrize("change", [{"data": None}, {"deadline_ms": "30"}, {"deadline_ms": 0}, {"expected": [1]}])
def test_a_study_record_with_wrong_values_is_an_error_in_words(own_study, at_study, change):
    path = own_study / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    at_study(own_study)
    app = _leaderboard()
    assert not app.exception and "This study cannot be read" in app.error[0].value


@pytest.mark.parametrize("page", PAGES)
def test_damaged_variants_and_measurements_are_named_and_the_rest_is_shown(own_study, at_study, page):
    (own_study / "resnet8/qat-int8/variant.json").write_bytes(b"\xff\xfe{")
    broken = own_study / "resnet8/baseline-int8"
    next((broken / "bench").iterdir()).write_text('{"schema_version": 1, "latency_ms": ["fast"]}')
    next((broken / "quality").iterdir()).write_text("")
    (own_study / "resnet8/prune-int8/model.tflite").unlink()
    at_study(own_study)
    app = _one(page)
    assert not app.exception
    assert app.expander[0].label == "4 files are missing or damaged"
    assert "qat-int8/variant.json" in _words(app)
    assert "prune-int8/model.tflite is gone" in _words(app)


def test_no_study_and_no_folder_are_said_in_words(tmp_path, at_study):
    at_study(tmp_path)
    assert "There is no study in" in _leaderboard().info[0].value
    at_study(tmp_path / "nowhere")
    app = _leaderboard()
    assert "There is no folder" in app.error[0].value and not app.exception


def test_the_pages_start_without_tensorflow(study):
    code = (
        "import sys; from streamlit.testing.v1 import AppTest; from dashboard.launcher import APP;"
        f"sys.argv = ['app.py', {str(study)!r}]; app = AppTest.from_file(APP, default_timeout=60).run();"
        "assert len(app.dataframe) == 1, app;"
        "print([m for m in ('tensorflow', 'tf_keras', 'keras', 'tfopt') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_launch_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        dashboard.launch(tmp_path / "nowhere")
    with pytest.raises(InputError, match="port is out of range"):
        dashboard.launch(tmp_path, port=70_000)
    done = subprocess.run([sys.executable, "-m", "dashboard", str(tmp_path / "no")], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "no such folder" in done.stderr


def test_launch_sends_no_statistics():
    given = arguments(Path("study"), port=8600, headless=True)
    assert {"--browser.gatherUsageStats=false", "--server.fileWatcherType=none", "--server.port=8600"} <= set(given)
    assert given[-2:] == ["--", "study"]
