"""The page in a real Chromium: nothing fetched, no error, curves drawn, every control usable by keyboard and mouse."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ettin.cli.main import main
from tests.report.browser import Browser
from tests.report.synthetic import write_run
from tests.report.test_watch import STEP_41, look_again, served

# generous, for a machine under load; docs/benchmarks/report.md has the measured seconds
LONG_RUN_SECONDS = 10.0
FIRST = "document.querySelector('.plot')"
SHOWN = "document.getElementById('range').textContent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    opened = Browser()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write the report page of two models with two phases each, a bad step and a restart, and return its URL."""
    root = tmp_path_factory.mktemp("pair")
    for objective in ("mlm", "clm"):
        write_run(root / objective / "pretrain", objective, steps=200, loss={70: None})
        write_run(root / objective / "decay", objective, "decay", steps=100)
        with open(root / objective / "pretrain" / "history.jsonl", "a", encoding="utf-8") as history:
            history.write('{"step": 100, "changes": []}\n')
    assert main(["report", str(root), "--out", str(root / "pair.html")]) == 0
    return (root / "pair.html").as_uri()


@pytest.fixture
def opened(browser: Browser, pair: str) -> Iterator[Browser]:
    """Open the page of `pair`; after the test, assert that it had no error and requested nothing but itself."""
    browser.open(pair)
    yield browser
    assert browser.errors == []
    assert browser.requests == [pair]


def shown(browser: Browser) -> list[str]:
    """Return the first three labels of the first chart's x axis."""
    return browser.value("[...document.querySelectorAll('.plot .xtick')].slice(0, 3).map((label) => label.textContent)")


def count(browser: Browser, selector: str) -> int:
    return browser.value(f"document.querySelectorAll({selector!r}).length")


def test_report_page_of_pair_draws_every_curve_and_mark(opened: Browser) -> None:
    assert count(opened, "figure") == 4
    assert count(opened, "#chart-loss .plot path.line") == 8  # training and validation of two phases of two models
    paths = opened.value("[...document.querySelectorAll('.plot path.line')].map((path) => path.getAttribute('d'))")
    assert all("L" in path and "NaN" not in path and "undefined" not in path for path in paths if len(path) > 9)
    assert count(opened, "#chart-loss .shade") == 1
    assert count(opened, "#chart-loss .mark.restart") == 1
    assert count(opened, "#chart-loss .mark.bad") == 1
    assert opened.value("document.querySelector('#chart-loss .mark.bad title').textContent") == (
        "step 70: its loss is not a number"
    )
    assert "17m clm, validation" in opened.value("document.querySelector('#chart-loss .legend').textContent")


def test_report_page_keyboard_zooms_moves_and_resets(opened: Browser) -> None:
    opened.value(f"{FIRST}.focus()")
    before = shown(opened)
    opened.press("+")
    opened.press("+")
    assert shown(opened) != before
    assert "tokens" in opened.value(SHOWN)
    middle = opened.value(SHOWN)
    opened.press("ArrowRight")
    assert opened.value(SHOWN) != middle
    opened.press("ArrowRight", shift=True)
    assert "17m mlm, training" in opened.value("document.getElementById('announcement').textContent")
    assert opened.value("document.querySelector('#chart-lr .cursor').getAttribute('visibility')") == "visible"
    opened.press("-")
    opened.press("0")
    assert opened.value(SHOWN) == "all"
    assert shown(opened) == before


def test_report_page_tab_key_reaches_every_control_in_order(opened: Browser) -> None:
    reached = []
    for _ in range(15):
        opened.press("Tab")
        reached.append(opened.value("document.activeElement.id || document.activeElement.className"))
        assert opened.value("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert reached[:7] == ["skip", "theme", "axis", "smooth", "in", "out", ""]  # the first chart's log button
    assert reached.count("plot") == 4
    assert opened.value("document.activeElement.closest('section').id") == "comparison"


def test_report_page_drag_zooms_and_double_click_resets(opened: Browser) -> None:
    box = opened.value(
        f"(({FIRST}).scrollIntoView({{block: 'center'}}), (({{x, y, width, height}}) => [x, y, width, height])"
        f"({FIRST}.getBoundingClientRect()))"
    )
    y = box[1] + box[3] / 2
    left, right = box[0] + box[2] * 0.4, box[0] + box[2] * 0.6
    opened.mouse("mouseMoved", left, y)
    opened.mouse("mousePressed", left, y, button="left", buttons=1, clickCount=1)
    opened.mouse("mouseMoved", right, y, button="left", buttons=1)
    assert count(opened, "rect.select") == 1
    opened.mouse("mouseReleased", right, y, button="left", clickCount=1)
    assert count(opened, "rect.select") == 0
    low, high = (float(part.strip("M tokens")) for part in opened.value(SHOWN).split(" to "))
    # in millions of the 19.2 M tokens of the whole run
    assert 6 < low < 9
    assert 10.5 < high < 13.5
    opened.mouse("mousePressed", left, y, button="left", clickCount=2)
    opened.mouse("mouseReleased", left, y, button="left", clickCount=2)
    assert opened.value(SHOWN) == "all"
    opened.mouse("mouseWheel", left, y, deltaX=0, deltaY=-100, modifiers=2)
    assert opened.value(SHOWN) != "all"


def test_report_page_axis_menu_and_log_button_redraw_the_curves(opened: Browser) -> None:
    opened.value(f"{FIRST}.focus()")
    opened.press("+")
    for axis, unit in (("steps", "steps"), ("hours", "hours in steps"), ("tokens", "tokens")):
        opened.value(
            f"(document.getElementById('axis').value = '{axis}',"
            " document.getElementById('axis').dispatchEvent(new Event('change')))"
        )
        assert opened.value(SHOWN).endswith(unit)
    log = "document.querySelector('#chart-loss figcaption button')"
    before = opened.value("document.querySelector('#chart-loss .plot path.line').getAttribute('d')")
    opened.value(f"{log}.click()")
    assert opened.value(f"{log}.getAttribute('aria-pressed')") == "true"
    assert opened.value("document.querySelector('#chart-loss .plot path.line').getAttribute('d')") != before


COLOUR = r"""[...document.querySelectorAll('.legend span')].map((entry) => [entry.textContent.slice(4, 7),
    entry.querySelector('path').getAttribute('class').match(/s(\d)/)[1]])"""


def test_report_page_model_has_one_colour_in_every_chart(opened: Browser) -> None:
    assert {tuple(pair) for pair in opened.value(COLOUR)} == {("mlm", "0"), ("clm", "1")}


def test_report_page_draws_a_dot_at_each_evaluation_of_a_short_phase(opened: Browser) -> None:
    dots = (
        "[...document.querySelectorAll('#chart-loss .dot')].map((dot) => dot.getAttribute('d').split('M').length - 1)"
    )
    assert opened.value(dots) == [4, 2, 4, 2]


def test_report_page_smoothing_slider_moves_the_line_over_the_raw_curve(opened: Browser) -> None:
    line = "document.querySelector('#chart-loss .plot path.line').getAttribute('d')"
    slider = "document.getElementById('smooth')"

    def drawn(value: int) -> str:
        opened.value(f"({slider}.value = {value}, {slider}.dispatchEvent(new Event('input')))")
        return opened.value(line)

    raw = drawn(0)
    assert count(opened, "#chart-loss .raw") == 0
    assert len({raw, drawn(20), drawn(100)}) == 3
    assert opened.value("document.querySelector('#chart-loss .raw').getAttribute('d')") == raw
    drawn(20)


def test_report_page_marks_gradient_norms_above_the_axis(opened: Browser) -> None:
    assert count(opened, "#chart-grad_norm .above") == 6  # step 96 and 193 of the longer phase, 96 of the other
    assert count(opened, "#chart-loss .above") == 0


def test_report_page_tables_fit_a_screen_of_1280(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    location = "/scratch/of/a/large/site/" * 4 + "step_000000120"
    launch = {"time": "2026-11-29T16:34:37+0000", "version": "0.1.0", "code": "0123456789ab", "commit": "0123456789ab"}
    launch |= {
        "host": "node-0017.site",
        "from": f"weights of {location}",
        "init_from": location,
        "layout": "tp 2 pp 4 dp 8",
    }
    launch |= {
        "world": 64,
        "threads": 12,
        "torch": "2.13.0+cu130",
        "step": 0,
        "changes": ["run.tokens"],
        "device": "gpu",
    }
    (run / "history.jsonl").write_text(json.dumps(launch) + "\n")
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    browser.open((tmp_path / "page.html").as_uri())
    browser.ask("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    browser.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    wide = "[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > one.clientWidth)"
    shown = browser.value(f"{wide}.map((one) => one.getAttribute('aria-label'))")
    browser.ask("Emulation.clearDeviceMetricsOverride")
    assert shown == []


def test_report_page_colours_follow_the_system_and_the_theme_button(opened: Browser) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    opened.colours("light")
    assert opened.value(paper) == "rgb(255, 255, 255)"
    opened.colours("dark")
    assert opened.value(paper) == "rgb(21, 24, 27)"
    theme = "document.getElementById('theme')"
    for name, colour in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 24, 27)"), ("auto", "rgb(21, 24, 27)")):
        opened.value(f"{theme}.click()")
        assert opened.value(f"{theme}.textContent") == f"Colours: {name}"
        assert opened.value(paper) == colour
    opened.colours("light")


@pytest.mark.parametrize("width", [320, *(pytest.param(width, marks=pytest.mark.full) for width in (390, 1200))])
def test_report_page_narrow_screen_does_not_scroll_sideways(opened: Browser, width: int, tmp_path: Path) -> None:
    opened.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    opened.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    opened.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert opened.value("document.documentElement.scrollWidth") <= width
    opened.screenshot(tmp_path / "page.png")
    opened.ask("Emulation.clearDeviceMetricsOverride")


def test_report_page_accessibility_tree_names_controls_and_curves(opened: Browser) -> None:
    nodes = opened.ask("Accessibility.getFullAXTree")["nodes"]
    heard = {(node.get("role", {}).get("value"), node.get("name", {}).get("value")) for node in nodes}
    assert ("button", "zoom in") in heard
    assert ("combobox", "Against") in heard
    shown = next(name for role, name in heard if name and name.startswith("Loss: "))
    assert "17m mlm, training from 10." in shown
    assert "17m clm, validation" in shown


def test_report_page_hostile_text_runs_no_script(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    hostile = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(f'{{"step": 41, "validation_loss/{hostile}": 1.0, "bad": "{hostile}", "tokens": 2700000}}\n')
    assert main(["report", str(run), "--title", hostile, "--out", str(tmp_path / "page.html")]) == 0
    browser.open((tmp_path / "page.html").as_uri())
    assert browser.errors == []
    assert len(browser.requests) == 1
    assert count(browser, "img") == 0
    assert browser.value("document.title") == hostile
    assert hostile in browser.value("document.querySelector('#chart-sources .legend').textContent")


def test_live_page_adds_new_steps_and_keeps_zoom_and_focus(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    all_lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("")
    with served(run) as (port, source):
        browser.open(f"http://127.0.0.1:{port}/")
        assert browser.value("!document.getElementById('empty').hidden")
        assert count(browser, "figure") == 0
        browser.value("document.querySelector('details').open = true")
        (run / "metrics.jsonl").write_text(all_lines)
        look_again(source)
        browser.until("document.querySelectorAll('figure').length === 4")
        assert browser.value("document.getElementById('empty').hidden")
        assert browser.value("document.querySelector('.cards').textContent").startswith("steps40")
        browser.value(f"{FIRST}.focus()")
        browser.press("+")
        zoomed = browser.value(SHOWN)
        with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(STEP_41)
        look_again(source)
        browser.until("document.querySelector('.cards').textContent.startsWith('steps41')")
        assert browser.value(SHOWN) == zoomed
        assert browser.value("document.querySelector('details').open")
        assert browser.value(f"document.activeElement === {FIRST}")
        assert browser.errors == []
    browser.until("document.getElementById('live').textContent.startsWith('no answer')")
    browser.ask("Page.navigate", url="about:blank")


def test_live_page_of_a_folder_takes_the_name_of_a_run_that_is_new(browser: Browser, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "mlm")
    with served(tmp_path / "runs") as (port, source):
        browser.open(f"http://127.0.0.1:{port}/")
        assert browser.value("document.title") == "17m mlm"
        write_run(tmp_path / "runs" / "clm", "clm")
        look_again(source)
        browser.until("document.title.includes('17m clm')")
        assert browser.value("document.querySelector('h1').textContent === document.title")
        assert browser.errors == []
    browser.ask("Page.navigate", url="about:blank")


@pytest.mark.full
def test_report_page_of_100_000_steps_opens_in_time_and_zooms_to_steps(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=100_000)
    page, began = tmp_path / "page.html", time.monotonic()
    assert main(["report", str(run), "--out", str(page)]) == 0
    made = time.monotonic() - began
    assert page.stat().st_size < 10_000_000
    began = time.monotonic()
    browser.open(page.as_uri())
    assert count(browser, "#chart-loss .plot path.line") == 2
    seconds = time.monotonic() - began
    assert seconds < LONG_RUN_SECONDS
    curves = browser.value("performance.getEntriesByName('first-curve')[0].startTime")
    browser.value(f"{FIRST}.focus()")
    began = time.monotonic()
    for _ in range(14):
        browser.press("+")
    zoom = (time.monotonic() - began) / 14
    print(f"made in {made:.1f} s, opened in {seconds:.2f} s, curves after {curves:.0f} ms, a zoom {zoom * 1000:.0f} ms")
    points = browser.value("document.querySelector('#chart-loss .plot path.line').getAttribute('d').split('L').length")
    assert 5 < points < 12  # 100,000 / 2^14: single steps are drawn
    assert browser.errors == []
