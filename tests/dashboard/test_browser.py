"""The served pages in a real Chromium, started as `make dashboard` starts them."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

from .conftest import add_variant, write_record


@contextmanager
def _served(folder):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    url = f"http://localhost:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "dashboard", str(folder), "--headless", "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        for _ in range(240):
            if server.poll() is not None:
                pytest.fail(f"The dashboard ended: {server.stdout.read()}")
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.25)
        yield url
    finally:
        server.terminate()
        server.communicate(timeout=30)


@pytest.fixture(scope="module")
def url(study):
    with _served(study) as url:
        yield url


@contextmanager
def _opened(browser, url, **options):
    """The leaderboard, drawn; complaints and requests to other hosts are kept."""
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}, **options})
    page = context.new_page()
    page.complaints, page.elsewhere = [], []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "request", lambda r: page.elsewhere.append(r.url) if r.url.startswith("http") and url not in r.url else None
    )
    page.set_default_timeout(60_000)
    page.goto(url)
    yield page
    context.close()


def _drawn(page):
    """Wait until Streamlit has nothing left to do."""
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]")


def _is_well(page):
    assert page.locator("[data-testid=stException]").count() == 0
    assert page.complaints == [] and page.elsewhere == []


def test_every_page_opens_without_an_error(browser, url, tmp_path):
    with _opened(browser, url) as page:
        page.get_by_role("heading", name="What to ship").wait_for()
        page.locator("[data-testid=stDataFrame] canvas").first.wait_for()
        page.locator("[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg").first.wait_for()
        _drawn(page)
        _is_well(page)
        page.get_by_role("link", name="Trade-off").click()
        page.get_by_role("heading", name="On the front").wait_for()
        page.get_by_text("File size", exact=True).click()
        _drawn(page)
        _is_well(page)
        page.get_by_role("link", name="One variant").click()
        page.get_by_role("heading", name="How it came to be").wait_for()
        page.get_by_role("heading", name="The file").wait_for()
        _drawn(page)
        page.screenshot(path=tmp_path / "variant.png", full_page=True)
        _is_well(page)


def test_the_file_to_ship_downloads_whole(browser, url, study, tmp_path):
    with _opened(browser, url) as page:
        with page.expect_download() as download:
            page.get_by_role("button", name="Download .tflite").first.click()
        assert download.value.suggested_filename == "resnet8-qat-int8.tflite"
        download.value.save_as(tmp_path / "it.tflite")
        assert (tmp_path / "it.tflite").read_bytes() == (study / "resnet8/qat-int8/model.tflite").read_bytes()
        _is_well(page)


def test_a_card_leads_to_the_variants_story(browser, url):
    with _opened(browser, url) as page:
        page.get_by_role("button", name="How it came to be").nth(1).click()
        page.get_by_role("heading", name="resnet8 baseline-dynamic", exact=True).wait_for()
        page.get_by_text("No training step").wait_for()
        _is_well(page)


def test_another_deadline_changes_what_to_ship(browser, url):
    with _opened(browser, url) as page:
        page.get_by_text("resnet8 qat-int8").first.wait_for()
        field = page.get_by_role("spinbutton", name="Deadline (frames/s)")
        field.fill("2500")
        field.press("Enter")
        page.get_by_text("Ship mobilenet-w0.25 qat-int8").wait_for()
        page.get_by_role("link", name="Trade-off").click()
        page.get_by_role("heading", name="On the front").wait_for()
        assert page.get_by_role("spinbutton", name="Deadline (frames/s)").input_value() == "2500"
        _is_well(page)


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_it_fits_a_phone(browser, url, color_scheme):
    with _opened(browser, url, viewport={"width": 420, "height": 900}, color_scheme=color_scheme) as page:
        page.get_by_role("heading", name="Trade-off").wait_for()
        _drawn(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 420
        ground = page.locator("[data-testid=stApp]").evaluate("node => getComputedStyle(node).backgroundColor")
        red = int(ground.split("(")[1].split(",")[0])
        assert (red < 60) == (color_scheme == "dark")
        _is_well(page)


@pytest.mark.slow
def test_the_page_follows_a_study_that_is_being_made(browser, tmp_path):
    add_variant(tmp_path, "m", "baseline", "float32", 9000, 4000, 1.0)
    names = ("m/baseline-float32", "m/baseline-int8")
    write_record(tmp_path, names, finished=False)
    with _served(tmp_path) as url, _opened(browser, url) as page:
        page.get_by_text("1 of 2 variants are there").wait_for()
        made = add_variant(tmp_path / "elsewhere", "m", "baseline", "int8", 9100, 2000, 0.5, seed=1)
        shutil.move(made, tmp_path / "m" / "baseline-int8")
        shutil.rmtree(tmp_path / "elsewhere")
        write_record(tmp_path, names)
        page.get_by_text("Ship m baseline-int8: 91.00%").wait_for()
        assert page.get_by_text("being made").count() == 0
        _is_well(page)
