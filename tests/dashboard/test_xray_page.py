"""The page 'What runs where', by Streamlit's test runner and in a real Chromium."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboard import charts, frames
from mobile_bench import store
from mobile_bench.files import sha256_of
from mobile_bench.records import to_dict
from mobile_bench.xray import OpVerdict, XrayReport
from mobile_bench.xray.record import write_record

from .conftest import add_variant
from .conftest import write_record as write_study
from .test_browser import _drawn, _is_well, _opened, _served

OPS = (
    OpVerdict(0, "CONV_2D", "delegate", layer="conv1"),
    OpVerdict(1, "CUMSUM", "cpu", "there is no kernel for <CUMSUM>", "sum otherwise", "a file, VisitNode", "tête"),
    OpVerdict(2, "CONV_2D", "delegate", layer="conv2"),
)
REPORT = XrayReport(
    "cpu", "xnnpack", OPS, 2, 4200, 1700, "XNNPACK in ai-edge-litert 2.3.0", ("our rule was wrong",), ("Kernels: 2",)
)


@pytest.fixture
def seen(tmp_path, tiny) -> Path:
    """A study of a real file and of one that is none, the first with a stored look at the CPU."""
    folder = add_variant(tmp_path, "net", "baseline", "int8", 9000, 100, 1.0)
    file = folder / "model.tflite"
    file.write_bytes(tiny.path("int8").read_bytes())
    record = json.loads((folder / "variant.json").read_text())
    facts = {"sha256": sha256_of(file), "size_bytes": file.stat().st_size}
    (folder / "variant.json").write_text(json.dumps({**record, **facts}))
    write_record(file, REPORT)
    add_variant(tmp_path, "net", "baseline", "float32", 9000, 100, 1.0)
    write_study(tmp_path, ("net/baseline-int8", "net/baseline-float32"))
    return tmp_path


@pytest.fixture
def page(seen, at_study):
    def script():
        from dashboard import shell
        from dashboard.views import xray

        view = shell.open_view()
        if view:
            xray.show(view)

    at_study(seen)
    return AppTest.from_function(script, default_timeout=60).run()


def _words(app) -> str:
    kinds = (app.markdown, app.caption, app.info, app.warning, app.error, app.success, app.subheader, app.code)
    return "\n".join(element.value.replace("\\", "") for kind in kinds for element in kind)


def _choose(app, delegate: str):
    return next(widget for widget in app.button_group if widget.label == "Delegate").set_value(delegate).run()


def test_a_stored_look_is_shown(page):
    assert not page.exception and not page.error
    assert {m.label: m.value for m in page.metric} == {
        "On XNNPACK": "2 of 3", "Left to the CPU": "1", "Pieces": "2", "Weights there": "4.2 kB",
    }  # fmt: skip
    assert page.dataframe[0].value.to_dict("records") == [
        {
            "index": 1, "op": "CUMSUM", "layer": "tête", "reason": "there is no kernel for <CUMSUM>",
            "fix": "sum otherwise", "source": "a file, VisitNode",
        }
    ]  # fmt: skip
    said = _words(page)
    assert "| 1 × CUMSUM | there is no kernel for <CUMSUM> | sum otherwise |" in said
    assert "ai-edge-litert 2.3.0" in said.replace("--", "-") and "our rule was wrong" in said and "Kernels: 2" in said


def test_where_nobody_looked_the_command_is_named(page, seen):
    page.selectbox[1].set_value("net/baseline-float32").run()
    command = f"mobile-bench xray '{seen}/net/baseline-float32/model.tflite' --delegate cpu --save"
    assert command in _words(page) and not page.exception and not page.metric


@pytest.mark.parametrize(("delegate", "there"), [("gpu", "GPU"), ("edgetpu", "Edge TPU")])
def test_rules_are_applied_on_the_spot(page, delegate, there):
    pytest.importorskip(f"mobile_bench.xray.{delegate}", reason=f"the rules of {delegate} are not in this checkout")
    _choose(page, delegate)
    assert not page.exception and not page.error
    labels = {m.label: m.value for m in page.metric}
    assert labels[f"On {there}"].endswith(" of 8") and "nothing was run" in _words(page)
    page.selectbox[1].set_value("net/baseline-float32").run()
    assert "This file cannot be looked at" in page.error[0].value and not page.exception


def test_a_damaged_record_is_named_and_the_command_shown(seen, at_study, page):
    (seen / "net/baseline-int8/xray/cpu.json").write_text('{"schema_version": 1, "sha256"')
    page.run()
    assert not page.exception and "--delegate cpu --save" in _words(page)
    assert page.expander[0].label == "1 file is missing or damaged"


def test_a_file_that_is_gone_is_said(seen, page):
    (seen / "net/baseline-int8/model.tflite").unlink()
    page.run()
    assert "not there" in _words(page) and not page.exception


def test_an_empty_study(tmp_path, at_study, page):
    write_study(tmp_path / "empty", ())
    at_study(tmp_path / "empty")
    page.run()
    assert page.info[0].value == "The study holds no file yet." and not page.exception


def test_the_picture_has_a_cell_an_operation():
    frame = frames.operations_frame(REPORT)
    assert frame["place"].tolist() == ["XNNPACK", "plain CPU", "XNNPACK"]
    drawn = charts.operations(frame, ("XNNPACK", "plain CPU")).to_dict()
    (rows,) = drawn["datasets"].values()
    assert [(row["start"], row["end"]) for row in rows] == [(-0.5, 0.5), (0.5, 1.5), (1.5, 2.5)]
    assert rows[1]["top"] < rows[0]["top"]  # readable without colors
    assert drawn["encoding"]["color"]["scale"]["domain"] == ["XNNPACK", "plain CPU"]


def test_in_a_browser(browser, seen, tmp_path):
    with _served(seen) as url, _opened(browser, url) as page:
        page.get_by_role("link", name="What runs where").click()
        page.get_by_role("heading", name="What runs where").wait_for()
        page.get_by_text("1 operation left to the CPU, and why").wait_for()
        page.locator("[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg").first.wait_for()
        _drawn(page)
        page.screenshot(path=tmp_path / "xray.png", full_page=True)
        _is_well(page)


def test_the_record_is_what_the_study_reads(seen):
    entry = store.read_study(seen).entries[0]
    assert entry.xray("cpu") == REPORT and to_dict(entry.xrays[0])["report"]["partitions"] == 2
