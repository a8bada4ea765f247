"""The report as a file and in a real browser without a network."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from dashboard import story
from dashboard.report import markdown_table, write_report
from mobile_bench.errors import InputError
from mobile_bench.store import read_study

from .conftest import NOTE, ODD, write_record


@pytest.fixture(scope="module")
def report(study, tmp_path_factory):
    return write_report(study, tmp_path_factory.mktemp("report") / "report.html")


def _page(browser, report, **options):
    """The opened report with everything it asked for and complained about."""
    context = browser.new_context(offline=True, **options)
    page = context.new_page()
    page.requests, page.complaints = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn=all]", timeout=120_000)
    return page


def test_it_opens_offline_and_loads_nothing(browser, report):
    page = _page(browser, report, viewport={"width": 1400, "height": 1000})
    assert page.requests == [report.as_uri()]
    assert page.complaints == []
    assert page.locator("figure").count() == page.locator("figure > svg, figure svg.marks").count() > 40
    assert page.locator("#trade-off svg").get_by_text("deadline 33.3 ms (30 frames/s)").count() == 1
    assert report.stat().st_size < 3_000_000


def test_records_cannot_become_markup(browser, report):
    page = _page(browser, report)
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    assert page.locator("img").count() == 0 and not dialogs
    assert NOTE in page.locator(".note").first.inner_text()
    assert ODD in page.locator("#variants").inner_text()
    assert "<script>alert(1)</script>" not in report.read_text()


def test_it_says_what_to_ship_and_shows_every_variant(browser, report, study):
    page = _page(browser, report)
    assert page.locator(".advice").inner_text().startswith("Ship resnet8 qat-int8: 84.42%")
    rows = page.locator("#variants tbody tr")
    assert rows.count() == len(read_study(study).record.expected)
    assert "The converter refused the model" in page.locator("#variants tr.bad").first.inner_text()
    assert page.locator("details").count() == rows.count()


def test_headings_sort_and_names_open_the_story(browser, report):
    page = _page(browser, report, viewport={"width": 1400, "height": 1000})
    size = page.locator("#variants thead button", has_text="Size")
    size.click()
    size.click()
    first = page.locator("#variants tbody tr").first
    assert "mobilenet-w0.25 distill-int8" in first.inner_text()
    assert page.locator("#variants tbody tr").last.get_attribute("class") == "bad"
    first.locator("a").click()
    page.wait_for_selector("details[open]")
    story = page.locator("details[open]")
    assert story.count() == 1
    text = story.inner_text()
    assert "validation 75.31% → 78.51%" in text and "first or last layer: conv1, dense" in text
    assert "scale 0.0078, zero point -1" in text and "train.learning_rate" in text and "Peak memory" in text


def test_it_fits_a_phone_in_the_dark(browser, report):
    page = _page(browser, report, viewport={"width": 420, "height": 900}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 420
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert sum(map(int, re.findall(r"\d+", ground)[:3])) < 150 < 450 < sum(map(int, re.findall(r"\d+", ink)[:3]))
    label = page.locator("#trade-off svg text").first
    assert label.evaluate("node => getComputedStyle(node).fill") == ink


def test_a_print_holds_the_stories(browser, report):
    page = _page(browser, report)
    short = len(page.pdf(format="A4"))
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert short > 50_000


def test_the_default_place_is_the_study_itself(own_study):
    assert write_report(own_study) == own_study / "report.html"


@pytest.mark.parametrize("finished", [True, False])
def test_an_empty_study_has_a_report(browser, tmp_path, finished):
    write_record(tmp_path, (), finished=finished)
    page = _page(browser, write_report(tmp_path))
    assert page.complaints == [] and "No variant is there yet." in page.locator(".advice").inner_text()
    assert ("still being made" in page.locator("header").inner_text()) != finished


def test_a_study_with_a_damaged_record_is_reported_with_the_rest(browser, own_study):
    (own_study / "resnet8/qat-int8/variant.json").write_text("{")
    page = _page(browser, write_report(own_study))
    text = page.locator("main").inner_text()
    assert "Missing or damaged files" in text and "qat-int8/variant.json" in text
    assert page.complaints == []


def test_no_study_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="not a study"):
        write_report(tmp_path)


def test_the_readme_table_is_markdown_that_holds(study):
    lines = markdown_table(study).splitlines()
    assert lines[0].startswith("| model | variant | top-1 [95%] | size | median | frames/s | meets 33 ms | on front |")
    assert len(lines) == 2 + len(read_study(study).record.expected)
    (row,) = [line for line in lines if "| resnet8 | qat-int8 |" in line]
    assert "84.42% [83.70, 85.12] | 99.1 kB | 0.721 ms | 1,388 | yes | ● |" in row
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {9}
    assert "<img" not in "".join(lines) and any("failed: The converter refused" in line for line in lines)
    assert any("| 21 | no |" in line for line in lines)


def test_writing_it_needs_neither_tensorflow_nor_streamlit(study, tmp_path):
    code = (
        "import json, sys; from dashboard.report import write_report; write_report(*sys.argv[1:]);"
        "print(json.dumps([m for m in ('tensorflow', 'keras', 'tfopt', 'streamlit') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(study), str(tmp_path / "r.html")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []


def test_a_variants_origin_says_what_its_file_kept(study):
    entry = next(entry for entry in read_study(study).entries if entry.variant.status == "ok")
    weights = {"sparsity": 0.5, "most_values": 979, "most_channel_values": 16, "layers": [{"layer": "stem"}]}
    variant = dataclasses.replace(entry.variant, properties={"sparse": True, "weights": weights})
    pairs = dict(story.origin(dataclasses.replace(entry, variant=variant)))
    assert pairs["Zeros in the file's kernels"] == "50.00%" and "weights" not in pairs and "sparse" in pairs
    assert pairs["Values of a kernel, at most"] == "979"
    assert pairs["Values of one output channel, at most"] == "16"
