"""The chat in a real browser: types, sees the answer stream, stops it, resets, and looks at the shades.

Needs Gradio (pip install -r requirements-web.txt), Playwright for Python (pip install playwright) and Chromium
(Debian: apt-get install chromium; or CHROMIUM=/path/to/it); skipped, with what is missing, where one is absent.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

pytest.importorskip("gradio", reason="Gradio is not installed: pip install -r requirements-web.txt")

import torch  # noqa: E402
from test_chat import adapted, chat_of, endless, saved  # noqa: E402, F401 - fixtures

from bhpeft.chat_settings import Settings  # noqa: E402
from bhpeft.errors import InputError  # noqa: E402
from bhpeft.token_uncertainty import TokenUncertainty, token_uncertainty  # noqa: E402
from bhpeft.web_chat import ALL, WEIGHTS, Session, Turn, around, as_html, free_port, messages, opacity  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


# ---------------------------------------------------------------------------------------------- without a browser


def test_what_is_said_is_never_markup():
    text = "<img src=x onerror=alert(1)>\n\n# **not** bold & `so`"
    assert as_html(text) == "&lt;img src=x onerror=alert(1)&gt;<br><br># **not** bold &amp; `so`"
    sure = TokenUncertainty([0.5], [0.1], 8, 100)
    [asked, answered] = messages([Turn(text, [text], uncertainty=sure)], WEIGHTS)
    assert "<img" not in asked["content"] + answered["content"] and "\n" not in answered["content"]


def test_a_shade_is_on_a_scale_of_its_own_measure():
    found = TokenUncertainty([0.0, math.log(100), 1.0], [0.0, 0.5, 0.125], samples=8, vocabulary=100)
    assert [opacity(found, i, WEIGHTS) for i in range(3)] == pytest.approx([0, 1, 0.5])
    assert [opacity(found, i, ALL) for i in range(3)] == pytest.approx([0, 1, 1 / math.log(100)])


def test_a_session_answers_on_both_sides_with_histories_of_their_own(tiny_model):
    chat = chat_of(tiny_model, "bh-peft")
    session = Session(chat, side_by_side=True, samples=4)
    talks = [[], []]
    settings = Settings(max_new_tokens=6, do_sample=False)
    for message in ("Do bees fly?", "Do cats sleep?"):
        notes = list(session.talk("page", talks, message, settings))
    assert "frozen base: " in notes[-1] and "bh-peft: " in notes[-1]
    assert list(session.sides) == ["frozen base", "bh-peft"]
    base, adapter = talks
    assert len(base) == len(adapter) == 2 and base[0].uncertainty is None and base[0].reply != adapter[0].reply
    plain = chat.ask([(adapter[0].message, adapter[0].reply)], "Do cats sleep?", settings)
    assert "".join(plain).strip() == adapter[1].reply
    expected = token_uncertainty(chat.model, plain.prompt_ids, plain.ids, 4)
    assert adapter[1].uncertainty.entropy == pytest.approx(expected.entropy)
    assert not session.answers and Session(chat_of(tiny_model, "hybrid"), False, 4).samples == 0
    with pytest.raises(InputError, match="leave 122"):
        list(session.talk("page", talks, "Do bees fly? " * 60, settings))
    assert torch.is_grad_enabled()


def test_a_slider_holds_what_was_asked_for_on_the_command_line():
    assert around(0.7, 0.05, 2) == (0.05, 2, 0.7) and around(3, 0.05, 2) == (0.05, 3, 3)
    assert around(0.01, 0.05, 1) == (0.01, 1, 0.01)


def test_a_taken_port_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="--port .*: Address already in use; give another, or --port 0"):
            free_port("127.0.0.1", taken.getsockname()[1])
    assert free_port("127.0.0.1", 0) > 0


# -------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def page(saved, tmp_path):  # noqa: F811
    """The chat side by side, opened in a headless Chromium; nothing but this machine may be asked for anything."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium, or CHROMIUM=/path/to/it")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [ROOT / "demo/chat.py", "--adapter_path", saved, "--side_by_side", "--web", "--port", 0, "--greedy"]
    words += ["--max_new_tokens", 12, "--posterior_samples", 4]
    server = subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if found := re.match(r"http://127\.0\.0\.1:(\d+) ", line):
                break
        else:
            pytest.fail("".join(said))
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch_persistent_context(
                tmp_path / "profile", executable_path=CHROMIUM, headless=True, args=QUIET
            )
            opened = browser.new_page()
            opened.asked = []
            opened.on("request", lambda request: opened.asked.append(request.url))
            opened.port = int(found[1])
            opened.goto(f"http://127.0.0.1:{opened.port}/")
            opened.wait_for_selector("#message textarea", timeout=60_000)
            yield opened
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def say(page, text):
    page.fill("#message textarea", text)
    page.click("#send")


def settled(page):
    page.wait_for_function(
        "() => /bh-peft: \\d+ tokens[^…]*$/.test(document.querySelector('#status').innerText)", timeout=60_000
    )


@pytest.mark.timeout(240)
def test_talking_in_a_browser(page):
    say(page, "Do <b>bees</b> fly?")
    settled(page)
    page.wait_for_selector("#side-1 .token")
    for side in (0, 1):
        text = page.inner_text(f"#side-{side}")
        assert "Do <b>bees</b> fly?" in text  # as it was typed
    assert page.inner_text("#side-0").split("fly?")[1].strip() != page.inner_text("#side-1").split("fly?")[1].strip()
    # Shades lie under the adapter's tokens alone, and change with the measure.
    style = "e => e.map(x => x.getAttribute('style'))"
    shades = page.eval_on_selector_all("#side-1 .token", style)
    assert len(shades) >= 5 and all("rgba(220, 90, 20" in shade for shade in shades) and len(set(shades)) > 1
    assert page.locator("#side-0 .token").count() == 0
    assert "nats" in page.get_attribute("#side-1 .token", "title")
    page.click("text=all (entropy)")
    page.wait_for_function(f"() => document.querySelector('#side-1 .token').getAttribute('style') != '{shades[0]}'")

    # A long answer streams; Stop ends it.
    page.click("text=Settings")
    longest = page.locator("input[type=number]").first
    longest.fill("1000")
    longest.press("Enter")
    say(page, "Do cats fly?")
    lengths = []
    until = time.monotonic() + 60
    while len(set(lengths)) < 4 and time.monotonic() < until:
        lengths.append(len(page.inner_text("#side-0")))
        time.sleep(0.15)
    assert len(set(lengths)) >= 4 and lengths == sorted(lengths)
    page.click("#stop")
    page.wait_for_selector("#side-0 .stopped", timeout=30_000)
    stopped = page.inner_text("#side-0")
    time.sleep(1)
    assert page.inner_text("#side-0") == stopped and "[stopped]" in stopped

    # Reset forgets; then there is an answer again.
    page.click("#reset")
    page.wait_for_function("() => !document.querySelector('#side-0').innerText.includes('cats')")
    longest.fill("6")
    longest.press("Enter")
    say(page, "Do owls sleep?")
    settled(page)
    assert "bees" not in page.inner_text("#side-0") and "Do owls sleep?" in page.inner_text("#side-1")

    # Nothing but this machine was asked for anything, and it listens to this machine alone.
    assert page.asked and all(re.match(r"(http|ws)://127\.0\.0\.1:|data:|blob:", url) for url in page.asked)
    others = {a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        if not address.startswith("127."):
            with pytest.raises(OSError), socket.create_connection((address, page.port), timeout=2):
                pass
