"""The report's directory: replaced whole or not at all, the same for the same sweep, its page in need of no other."""

import os
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from synthetic import MakeRun

from analysis.pick_beta import write_report
from analysis.report import report


@pytest.mark.parametrize("stage", ["rendering", "writing"])
def test_a_failure_leaves_the_former_report_untouched(
    make_run: MakeRun, trials: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    run = make_run(trials)
    write_report(run)
    files = {path: path.read_bytes() for path in (run / "report").rglob("*") if path.is_file()}

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("disk on fire")

    if stage == "rendering":
        monkeypatch.setattr(report, "decision_json", broken)
    else:
        monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_report(run, reroute_tolerance=0.5)
    assert {path: path.read_bytes() for path in (run / "report").rglob("*") if path.is_file()} == files


def test_the_same_sweep_gives_the_same_report(make_run: MakeRun, trials: pd.DataFrame) -> None:
    run = make_run(trials)
    write_report(run)
    once = {path: path.read_bytes() for path in (run / "report").rglob("*") if path.is_file()}
    write_report(run)
    assert {path: path.read_bytes() for path in (run / "report").rglob("*") if path.is_file()} == once
    names = {str(path.relative_to(run / "report")) for path in once}
    assert names == {"report.html", "report.md", "decision.json"} | {
        f"figures/{name}.{kind}"
        for name in ("evidence", "by_setting", "map", "curves", "layers")
        for kind in ("svg", "png")
    }


class Page(HTMLParser):
    """Collects ids and the addresses that a page points to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.addresses.append(value or "")


def test_the_page_stands_alone_and_escapes_what_it_shows(make_run: MakeRun, trials: pd.DataFrame) -> None:
    run = make_run(trials, config={"model": "<script>alert(1)</script>"}, git_commit="<img>")
    write_report(run)
    html = (run / "report" / "report.html").read_text()
    page = Page(html)
    assert page.tags.count("svg") == 2 * 5, "each figure in two widths"
    assert page.tags.count("script") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "img" not in page.tags
    outside = [address for address in page.addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\"' ]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
