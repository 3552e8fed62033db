"""The page in a real browser: nothing leaves it, nothing breaks in it, and everybody can read it.

Six sweeps of different ends, on a desk's screen and a phone's, light and dark, and printed.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import axe_script, browser, needs_chromium
from golden_runs import GOLDEN, HOSTILE, golden_run
from playwright.sync_api import Browser, Page
from synthetic import Surface, make_trials, write_run

from analysis.pick_beta import write_report

pytestmark = needs_chromium
SCREENS = {"desk": (1280, 800), "phone": (390, 844)}
SMALLEST = 12
"""Pixels of text, as it comes out on the screen, figures included."""
SMALL_TEXT = """(least) => {
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const of = node.parentElement, text = node.textContent.trim();
    if (!text || !of.checkVisibility() || ["SCRIPT", "STYLE", "title", "desc"].includes(of.tagName)) continue;
    const drawn = of instanceof SVGElement ? of.getScreenCTM() : { a: 1, b: 0 };
    const size = parseFloat(getComputedStyle(of).fontSize) * Math.hypot(drawn.a, drawn.b);
    if (size < least - 0.05) found.push([size, text.slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run directory of each case, with its report."""
    made = {}
    for name in GOLDEN:
        made[name] = golden_run(tmp_path_factory.mktemp("golden") / name.replace(" ", "-"), name)
        write_report(made[name])
    return made


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return axe_script(tmp_path_factory.mktemp("axe"))


def opened(chromium: Browser, run: Path, screen: str, scheme: str = "light") -> tuple[Page, list[str]]:
    """The report on a screen; and what went wrong: requests beyond the file itself, errors of the console."""
    width, height = SCREENS[screen]
    page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    troubles: list[str] = []
    address = (run / "report" / "report.html").resolve().as_uri()
    page.on("request", lambda request: None if request.url == address else troubles.append(f"request {request.url}"))
    page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error {error}"))
    page.goto(address)
    return page, troubles


@pytest.mark.parametrize("name", GOLDEN)
def test_a_page_fits_and_is_read_by_everybody(chromium: Browser, runs: dict[str, Path], axe: str, name: str) -> None:
    for screen, scheme in (("desk", "dark"), ("phone", "light")):
        page, troubles = opened(chromium, runs[name], screen, scheme)
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen][0], "scrolls sideways"
        assert page.evaluate(SMALL_TEXT, SMALLEST) == []
        assert troubles == []
        page.evaluate(axe)  # as a debugger would, which the page's own policy does not bind
        found = page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
        told = [(each["id"], each["nodes"][0]["html"][:200], each["nodes"][0].get("failureSummary")) for each in found]
        assert told == [], json.dumps(told, indent=1)
        page.close()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_first_screen_holds_answer_and_evidence(chromium: Browser, runs: dict[str, Path], name: str) -> None:
    page, _ = opened(chromium, runs[name], "desk")
    first = page.locator(".first").bounding_box()
    command = page.locator(".first pre").first.bounding_box()
    picture = page.locator(".first svg.wide").bounding_box()
    assert first is not None
    assert command is not None
    assert picture is not None
    assert first["y"] + first["height"] <= SCREENS["desk"][1]
    assert command["x"] + command["width"] <= picture["x"], "the figure is not beside the command"
    assert [page.locator(f"svg.{width}").first.is_visible() for width in ("wide", "narrow")] == [True, False]
    page.close()
    page, _ = opened(chromium, runs[name], "phone")
    tops = [page.locator(f".first {what}").first.bounding_box() for what in (".badge", "h1", "dl", "pre", "svg.narrow")]
    heights = [box["y"] for box in tops if box is not None]
    assert len(heights) == len(tops)
    assert heights == sorted(heights), "another order than on the desk"
    page.close()


def test_a_running_sweep_does_not_look_like_a_finished_one(chromium: Browser, runs: dict[str, Path]) -> None:
    page, _ = opened(chromium, runs["running"], "desk")
    assert page.locator(".badge").inner_text() == "RUNNING · 11 of 20"
    assert page.locator("h1").inner_text().startswith("So far: beta_kl")
    assert "do not ship it" in page.locator(".state").inner_text()
    assert "cbtrain.train" not in page.locator("body").inner_text()
    page.close()


def test_text_of_rows_names_and_errors_is_shown_and_not_run(chromium: Browser, tmp_path: Path) -> None:
    run = golden_run(tmp_path / """a "run" <b>named</b> 'so'""", "choose")
    trials = make_trials(Surface())
    trials.loc[9, "status"], trials.loc[9, "error"] = "failed", HOSTILE
    write_run(run, trials)
    write_report(run)
    page, troubles = opened(chromium, run, "desk")
    page.on("dialog", lambda dialog: troubles.append(f"dialog {dialog.message}"))
    assert page.locator("img").count() == 0
    assert page.locator("b:text('named')").count() == 0
    shown = page.locator("body").text_content() or ""
    assert shown.count(HOSTILE) >= 3, "the error, and completions of both kinds"
    assert troubles == []
    markdown = (run / "report" / "report.md").read_text()
    assert HOSTILE not in markdown
    assert "&lt;img src=x" in markdown, "the error is told"
    page.close()


def test_trials_are_sorted_by_a_press_and_read_without_script(chromium: Browser, runs: dict[str, Path]) -> None:
    page, troubles = opened(chromium, runs["choose"], "desk")
    page.get_by_role("button", name="drift").click()
    values = [float(cell or "inf") for cell in page.eval_on_selector_all(
        "table.sortable tbody tr", "rows => rows.map((row) => row.cells[8].dataset.value)")]  # fmt: skip
    assert values == sorted(values)
    assert len(set(values)) > 5
    page.get_by_role("button", name="drift").click()
    first = page.locator("table.sortable tbody tr").first.locator("td").nth(8).get_attribute("data-value")
    assert float(first or 0) == max(values)
    assert troubles == []
    page.close()
    without = chromium.new_context(java_script_enabled=False).new_page()
    without.goto((runs["choose"] / "report" / "report.html").resolve().as_uri())
    assert without.locator("table.sortable tbody tr").count() == len(values)
    assert without.locator("th button").count() == 0
    without.close()


@pytest.mark.parametrize("name", GOLDEN)
def test_it_prints_to_two_pages(chromium: Browser, runs: dict[str, Path], name: str) -> None:
    page, troubles = opened(chromium, runs[name], "desk", "dark")
    printed = page.pdf(prefer_css_page_size=True)
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", printed)) <= 2
    assert troubles == []
    page.emulate_media(media="print")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)", "dark ink on paper is not to be had from a dark theme"
    page.close()


def test_a_thousand_trials_stay_a_page(chromium: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_trials(Surface(), searched=992))
    write_report(run)
    file = run / "report" / "report.html"
    assert file.stat().st_size <= 5 * 2**20
    page, troubles = opened(chromium, run, "phone")
    assert page.locator("table.sortable").is_visible() is False, "a thousand rows are folded"
    assert page.locator("table.sortable tbody tr").count() == 1000
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert troubles == []
    page.close()
