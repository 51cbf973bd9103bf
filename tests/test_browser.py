"""The report and the annotation page in a real browser; skipped where playwright or a browser is not installed."""

import shutil
import threading

import pytest
from made_results import make_results

from bhpeft.annotation import Session
from bhpeft.annotation_web import AnnotationServer
from bhpeft.html_report import write_report
from bhpeft.results import ModelOutput, read_human_evaluation, write_model_outputs

PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        try:
            found = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"Chromium cannot be started: {str(error).splitlines()[0]}")
        yield found
        found.close()


def open_page(browser, url, scheme="light"):
    offline = url.startswith("file:")
    page = browser.new_context(viewport=PHONE, color_scheme=scheme, offline=offline).new_page()
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: said.type in ("error", "warning") and page.complaints.append(said.text))
    page.goto(url)
    return page


def test_the_report_at_phone_width_in_light_and_dark(browser, tmp_path):
    make_results(tmp_path)
    write_report(tmp_path)
    papers, inks = [], []
    for scheme in ("light", "dark"):
        page = open_page(browser, (tmp_path / "report.html").as_uri(), scheme)
        assert page.complaints == []
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        sizes = page.evaluate("[...document.querySelectorAll('svg')].map(s => [s.clientWidth, s.clientHeight])")
        assert len(sizes) >= 15 and all(width > 250 and height > 50 for width, height in sizes)
        assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 15
        papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        inks.append(page.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
        assert page.locator("text=film <script>alert(1)</script>").count() > 0
        page.context.close()
    assert len(set(papers)) == len(set(inks)) == 2


def test_judging_in_a_browser_by_keyboard(browser, tmp_path):
    outputs = tmp_path / "model_outputs" / "run.txt"
    rows = [ModelOutput(f"All a{i} fly.", f"False, <b>b{i}</b> do not." + " long" * 300 * i, "") for i in range(2)]
    write_model_outputs(outputs, rows)
    with AnnotationServer(Session([outputs], "anna", seed=1)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        page = open_page(browser, server.url)
        page.wait_for_selector("#item:not([hidden])")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert "<b>b" in page.inner_text("#output")
        for key, wait in (("y", "justifies"), ("b", "was: yes"), ("n", "justifies"), ("y", "1 of 2 judged")):
            page.keyboard.press(key)
            page.wait_for_selector(f"text={wait}", timeout=5000)
        page.click("button[data-key=s]")
        page.wait_for_selector("text=Nothing is left", timeout=5000)
        page.keyboard.press("q")
        page.wait_for_selector("text=Saved.", timeout=5000)
        thread.join(timeout=5)
        assert not thread.is_alive() and page.complaints == []
        page.context.close()
    scores = read_human_evaluation(tmp_path / "human_evaluation" / "run.anna.csv")
    assert sorted((s.factual, s.justifies) for s in scores if s.factual is not None) == [(0, 1)]
    assert sum(s.factual is None for s in scores) == 1
