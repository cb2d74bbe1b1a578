# SPDX-License-Identifier: Apache-2.0
"""The page in headless Chromium, in front of page_backend.py. Screenshots are left in build/page.

Needs Chromium or Chrome on the PATH and requirements/browser.txt (make test-page installs those packages).
"""

import re
import shutil
import threading
from pathlib import Path

import pytest

from tests.test_server import page_backend

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: make test-page installs it"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)", allow_module_level=True)
expect = playwright.expect

pytestmark = pytest.mark.slow
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "page"
ARGUMENTS = [  # none of Chromium's own connections, and root may run it
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
KEY = "correct horse"
LATER_MS = 15_000  # a poll comes every two seconds; the machine may be busy


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def backend():
    with page_backend.running() as backend:
        yield backend


@pytest.fixture
def open_page(browser, backend):
    """Return a function: settings of the browser -> the page; fails at the end if the page threw an error or
    broke its policy."""
    contexts, complaints = [], []

    def make(**settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LATER_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                re.search(r"Content Security Policy|Error:", message.text) and complaints.append(message.text)
            ),
        )
        page.goto(backend.url)
        return page

    yield make
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def page(open_page):
    return open_page()


def shows(page, selector, text, timeout=LATER_MS):
    expect(page.locator(selector)).to_have_text(text, timeout=timeout)


def cells(page, row):
    return page.locator(f"#{row} td").all_text_contents()


def test_figures_come_from_the_metrics(page, backend):
    shows(page, "#state", "Ready")
    shows(page, "#name", "smollm2")
    shows(page, "#finished", "3")
    shows(page, "#left", "1")
    shows(page, "#refused", "0")  # one had no valid key, which says nothing of the load
    shows(page, "#ttft small", "since start")
    shows(page, "#generated", "0")  # a second sample, and nothing happened
    backend.set_metric("vllm:num_requests_running", 7)
    backend.set_metric("vllm:num_requests_waiting", 1234)
    backend.set_metric("vllm:kv_cache_usage_perc", 0.25)
    shows(page, "#running", "7")
    shows(page, "#waiting", "1,234")
    shows(page, "#cache", "25% of 46,592 tokens")
    expect(page.get_by_role("meter", name="KV cache in use")).to_have_attribute("aria-valuenow", "25")
    backend.set_metric("vllm:generation_tokens_total", 30 + 4000)
    expect(page.locator("#generated")).to_have_text(
        re.compile(r"^[\d,]{3,}$"), timeout=LATER_MS
    )  # 4000 tokens in at most ten seconds
    assert 400 <= int(page.locator("#generated").text_content().replace(",", "")) <= 2000
    assert page.locator("#line").get_attribute("d").startswith("M")


def test_quantiles_are_those_of_prometheus(page):
    found = page.evaluate(
        """async () => {
          const { parseMetrics, quantile } = await import("./page/prometheus.js");
          const { duration } = await import("./page/numbers.js");
          const buckets = [[0.1, 10], [0.2, 10], [0.4, 90], [Infinity, 100]];
          const [sample] = parseMetrics('# x\\nm_bucket{le="+Inf",a="q\\\\"}, b"} 5\\nnot a sample\\nm NaN').get("m_bucket");
          return [quantile(0.05, buckets), quantile(0.5, buckets), quantile(0.99, buckets) === Infinity,
                  quantile(0.5, [[1, 0], [Infinity, 0]]), quantile(0.5, null), sample,
                  [0.0042, 0.083, 1.239, 12.4].map((value) => duration(value))];
        }"""
    )
    # 0.05 of 100 is the 5th of the 10 in (0, 0.1]; 0.5 the 40th of the 80 in (0.2, 0.4]
    assert found[0] == pytest.approx(0.05) and found[1] == pytest.approx(0.3)
    assert found[2:5] == [True, None, None]
    assert found[5] == {"labels": {"le": "+Inf", "a": 'q\\"}, b'}, "value": 5}
    assert found[6:] == [["4.2 ms", "83 ms", "1.24 s", "12 s"]]


def test_percentiles_of_the_last_minute_replace_those_since_the_start(page, backend):
    shows(page, "#ttft small", "since start")
    backend.observe("vllm:time_to_first_token_seconds", 0.5, 100)  # each between 0.25 and 0.5 s
    shows(page, "#ttft small", "last minute")
    assert cells(page, "ttft") == ["375 ms", "475 ms", "498 ms"]
    assert cells(page, "queue") == ["< 300 ms"] * 3  # the first bucket says no more than that


def test_an_answer_is_streamed(page, backend):
    backend.hold_at = 2
    shows(page, "#state", "Ready")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#text")).to_have_text("The capital", timeout=LATER_MS)  # not yet the whole
    expect(page.get_by_role("region", name="Answer")).to_have_attribute("aria-busy", "true")
    backend.hold_at = None
    shows(page, "#text", "The capital of France is Paris.")
    expect(page.locator("#outcome")).to_have_text(
        re.compile(r"^7 tokens in .*s, first token after .* tokens/s\.$")
    )
    expect(page.get_by_role("region", name="Answer")).to_have_attribute("aria-busy", "false")
    (request,) = backend.requests
    assert request["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("smollm2", 256, 0.7)


def test_plain_text_goes_to_completions(page, backend):
    shows(page, "#state", "Ready")
    page.get_by_role("combobox", name="Send as", exact=True).select_option("plain text")
    page.get_by_role("textbox", name="Prompt").fill("Once upon a time")
    page.get_by_label("Tokens at most").fill("9")
    page.get_by_role("button", name="Send").click()
    shows(page, "#text", "The capital of France is Paris.")
    (request,) = backend.requests
    assert request["prompt"] == "Once upon a time" and request["max_tokens"] == 9


def test_stop_ends_the_answer_at_the_server_too(page, backend):
    backend.hold_at = 1
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#text")).to_have_text("The", timeout=LATER_MS)
    page.get_by_role("button", name="Stop").click()
    shows(page, "#outcome", "Stopped.")
    shows(page, "#text", re.compile("^The"))  # what came stays
    deadline = threading.Event()
    for _ in range(50):
        if backend.disconnects or deadline.wait(0.1):
            break
    assert backend.disconnects == 1


def test_by_keyboard_alone(page, backend):
    backend.hold_at = 1
    shows(page, "#name", "smollm2")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("textbox", name="Prompt")).to_be_focused()
    order = ["mode", "max-tokens", "temperature", "send"]
    for name in order:
        page.keyboard.press("Tab")
        expect(page.locator(f"#{name}")).to_be_focused()
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", name
    page.keyboard.press("Enter")
    expect(page.locator("#text")).to_have_text("The", timeout=LATER_MS)
    page.keyboard.press("Escape")
    shows(page, "#outcome", "Stopped.")
    page.get_by_role("textbox", name="Prompt").focus()
    page.keyboard.press("Control+Enter")
    shows(page, "#outcome", "Answering …")
    assert len(backend.requests) == 2


def test_the_key_is_asked_for_once_and_kept_in_the_tab_only(open_page, backend):
    backend.key = KEY
    page = open_page()
    box = page.get_by_label("Key", exact=True)
    expect(box).to_be_focused(timeout=LATER_MS)
    shows(page, "#running", "0")  # /metrics is open, and so is what it says
    box.fill("wrong")
    page.keyboard.press("Enter")
    shows(page, "#key-error", "The server refuses this key.")
    expect(page.get_by_role("heading", name="API key")).to_be_visible()
    box.fill(KEY)
    page.get_by_role("button", name="Use key").click()
    shows(page, "#name", "smollm2")
    expect(page.locator("#key-form")).to_be_hidden()
    assert page.evaluate("[localStorage.length, document.cookie, location.href]") == [
        0,
        "",
        backend.url + "/",
    ]
    page.get_by_role("button", name="Send").click()
    shows(page, "#text", "The capital of France is Paris.")
    page.reload()
    shows(page, "#name", "smollm2")  # kept over a reload
    page.get_by_role("button", name="Forget key").click()
    expect(page.locator("#key-form")).to_be_visible(timeout=LATER_MS)
    assert page.evaluate("sessionStorage.length") == 0
    expect(page.locator("#facts")).not_to_contain_text("LlamaForCausalLM")


@pytest.mark.parametrize(
    ("reason", "state", "name"),
    [
        ("the model is loading", "waiting", "Loading"),
        ("the server is shutting down", "waiting", "Draining"),
        ("the engine sleeps", "waiting", "Not ready"),
        ("the engine died", "failed", "Failed"),
    ],
)
def test_a_server_that_is_not_ready(open_page, backend, reason, state, name):
    backend.ready = (503, {"ready": False, "reason": reason})
    page = open_page()
    shows(page, "#state", name)
    expect(page.locator("#state")).to_have_attribute("data-state", state)
    expect(page.locator("#reason")).to_contain_text(reason)
    backend.ready = (200, {"ready": True, "reason": ""})
    shows(page, "#state", "Ready")
    expect(page.locator("#reason")).to_be_hidden()
    shows(page, "#name", "smollm2")


def test_a_server_that_is_gone_and_comes_back_with_counters_at_zero(browser, backend, open_page):
    page = open_page()
    shows(page, "#generated", "0")
    page.context.set_offline(True)
    shows(page, "#state", "Unreachable")
    shows(page, "#running", "–")
    backend.set_metric("vllm:generation_tokens_total", 0)
    page.context.set_offline(False)
    shows(page, "#state", "Ready")
    shows(page, "#generated", "0")


def test_a_model_without_quantization(open_page, backend):
    backend.info = {**backend.info, "quantization": None, "quantization_config": None, "weight_bytes": None}
    page = open_page()
    expect(page.locator("#facts div", has_text="Quantization").locator("dd")).to_have_text(
        "none", timeout=LATER_MS
    )
    expect(page.locator("#facts div", has_text="Weights on disk").locator("dd")).to_have_text("–")
    expect(page.locator("#facts")).not_to_contain_text("Codebook")


@pytest.mark.parametrize("text", ["", "another_metric 1\n", "<html>not metrics { } 5</html>"])
def test_missing_metrics_are_dashes(open_page, backend, text):
    backend.metrics, backend.info = text, {}
    page = open_page()
    shows(page, "#state", "Ready")
    figures = page.locator("#generated, .figures dd, tbody td, #cache").all_text_contents()
    assert len(figures) == 1 + 2 + 4 + 3 + 9 + 1 and set(figures) == {"–"}
    expect(page.get_by_role("meter")).to_have_attribute("aria-valuetext", "unknown")


def test_two_engines_are_added(open_page, backend):
    lines = [line for line in backend.metrics.splitlines() if not line.startswith("#")]
    backend.set_metric("vllm:num_requests_running", 3)
    second = [line.replace('engine="0"', 'engine="1"') for line in lines if 'engine="0"' in line]
    backend.metrics += "\n".join(second) + "\n"
    page = open_page()
    shows(page, "#running", "3")  # 3 + 0
    shows(page, "#finished", "6")


@pytest.mark.parametrize(
    ("refusal", "text"),
    [
        (
            (429, {"error": {"message": "too many requests wait"}}, {"Retry-After": "7"}),
            "The server answered 429: too many requests wait Try again in 7 s.",
        ),
        ((503, {"error": {"message": "shutting down: try later"}}, {}), "503: shutting down: try later"),
        ((400, {"message": "no chat template"}, {}), "400: no chat template"),
        ((500, {}, {}), "The server answered 500."),
        ((401, {}, {}), "The server asks for a valid key."),
    ],
)
def test_a_refused_prompt(page, backend, refusal, text):
    backend.refusal = refusal
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#outcome.error")).to_contain_text(text, timeout=LATER_MS)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    expect(page.locator("#answer")).to_be_hidden()


@pytest.mark.parametrize(
    ("name", "text"),
    [("break_after", "The server cannot be reached|connection ended"), ("error_after", "EngineCore died")],
)
def test_an_answer_that_breaks_off(page, backend, name, text):
    setattr(backend, name, 3)
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#outcome.error")).to_have_text(re.compile(text), timeout=LATER_MS)
    shows(page, "#text", "The capital of")


def test_markup_in_an_answer_stays_text(page, monkeypatch):
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    monkeypatch.setattr(page_backend, "ANSWER", [markup])
    page.get_by_role("button", name="Send").click()
    shows(page, "#text", markup)
    assert page.locator("#answer img, #answer script").count() == 0


def test_no_animation_where_motion_is_unwanted(open_page, backend):
    backend.pace_s = 0.5
    page = open_page(reduced_motion="reduce")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer[aria-busy=true]")).to_be_visible()
    assert (
        page.evaluate("getComputedStyle(document.querySelector('#text'), '::after').animationName") == "none"
    )


@pytest.mark.vllm
def test_a_real_server(browser, served):
    """From the key to the first streamed token, against vLLM with a tiny model."""
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(served.url)
        page.get_by_label("Key", exact=True).fill(served.key, timeout=LATER_MS)
        page.keyboard.press("Enter")
        shows(page, "#name", "tiny")
        expect(page.locator("#facts")).to_contain_text("LlamaForCausalLM")
        page.get_by_label("Tokens at most").fill("20")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#outcome")).to_have_text(re.compile(r"^\d+ tokens? in "), timeout=60_000)
        for row in ("ttft", "per-token", "queue"):
            shows(page, f"#{row} small", "last minute")
            assert all(re.fullmatch(r"[<>]? ?[\d.]+ m?s", cell) for cell in cells(page, row)), row
        figures = page.locator("#generated, .figures dd").all_text_contents()
        assert sum(figure == "–" for figure in figures) <= 1, figures  # the cache's share before any prompt
    finally:
        context.close()


def test_screenshots(page, backend):
    """Light and dark, wide and narrow: nothing scrolls sideways, not even at 320 pixels (WCAG 1.4.10)."""
    mover = threading.Thread(target=page_backend.move, args=(backend, 6), daemon=True)
    mover.start()
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#outcome")).to_contain_text("tokens/s", timeout=LATER_MS)
    mover.join()
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) > 380) == (scheme == "light")
        for width in (1280, 390, 320):
            page.set_viewport_size({"width": width, "height": 800})
            path = SCREENSHOTS / f"{scheme}-{width}.png"
            page.screenshot(path=path, full_page=True)
            assert path.stat().st_size > 20_000
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
            wide = "[...document.querySelectorAll('.card')].filter((card) => card.scrollWidth > card.clientWidth)"
            assert page.evaluate(f"{wide}.map((card) => card.className)") == [], path.name
