from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from zeroskip.core.errors import Unsupported
from zeroskip.plan.plan import Plan
from zeroskip.report import charts
from zeroskip.report.page import write_page
from zeroskip.report.records import RecordFile

pytest.importorskip("plotly", reason="the page needs zeroskip[report]")
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Text(HTMLParser):
    """What a reader sees, and the names of all elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.words.append(data)


def page(path: Path, plan: Plan | None, records: RecordFile | None, **more: object) -> str:
    write_page(path / "page.html", plan, records, "A <title> & more", **more)  # type: ignore[arg-type]
    return (path / "page.html").read_text(encoding="utf-8")


def test_the_page_says_what_was_found_in_order(tmp_path: Path, plan: Plan, records: RecordFile) -> None:
    seen = Text(page(tmp_path, plan, records, images=[("noisy & <dense>", PIXEL)])).text
    parts = [
        "A <title> & more",
        "2.67×",
        "2.21× from skipping zeros",
        "AMD EPYC 7B13",
        "noisy & <dense>",
        "Layers",
        "Plan",
        "90% zeros, but not two of every four",
        "Steps in order",
        "as planned: 8.465 ms",
        "Measurements",
        "4.22× escort",
        "Records as JSON",
    ]
    places = [seen.find(part) for part in parts]
    assert -1 not in places, dict(zip(parts, places, strict=True))
    assert places == sorted(places)


def test_names_are_text_and_never_markup(tmp_path: Path, plan: Plan, records: RecordFile) -> None:
    written = page(tmp_path, plan, records)
    assert '</script><b>"a&b|%{x}$' in Text(written).text
    assert "</script><b>" not in written
    assert Text(written).tags.count("script") == 2 + 1 + len({str(record.case) for record in records.records})


def test_a_busy_machine_gets_no_ratio(tmp_path: Path, plan: Plan) -> None:
    assert plan.confirmation is not None
    seen = Text(page(tmp_path, replace(plan, confirmation=replace(plan.confirmation, contended=True)), None)).text
    assert "No ratio" in seen
    assert "2.67×" not in seen


def test_what_is_absent_leaves_no_section(tmp_path: Path, plan: Plan, records: RecordFile) -> None:
    seen = Text(page(tmp_path, None, records)).text
    assert "Measurements" in seen
    assert "Steps in order" not in seen
    seen = Text(page(tmp_path, replace(plan, confirmation=None), None)).text
    assert "Not confirmed" in seen
    assert "Measurements" not in seen


def test_nothing_is_fetched(tmp_path: Path, plan: Plan, records: RecordFile) -> None:
    written = page(tmp_path, plan, records, images=[("picture", PIXEL)])
    sources = re.findall(r'<(?:script|img|link|iframe)[^>]*?(?:src|href)="([^"]*)"', written)
    assert sources
    assert all(source.startswith("data:") for source in sources)


def test_a_point_above_the_roof_is_called_an_error(plan: Plan) -> None:
    fast, slow = charts.Work("fast", "escort", 10**9, 10**6, 1e3), charts.Work("slow", "escort", 10**6, 10**6, 1e3)
    assert charts.above_roof([fast, slow], 95.0, 17.0) == [fast]
    assert charts.above_roof([fast, slow], 0.0, 0.0) == []
    drawn = charts.roofline([fast, slow], 95.0, 17.0, {"escort": "#0072B2"})["data"]
    assert drawn[-1]["text"] == ["error: fast"]
    assert drawn[0]["x"] == [slow.intensity]


def test_missing_plotly_says_what_to_install(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(Unsupported, match=r"pip install 'zeroskip\[report\]'"):
        page(tmp_path, plan, None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_a_browser_labels_every_bar_and_reports_no_error(tmp_path: Path, plan: Plan, records: RecordFile) -> None:
    page(tmp_path, plan, records, images=[("picture", PIXEL)])
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--v=0",
            "--virtual-time-budget=30000",
            "--window-size=1280,2400",
            "--dump-dom",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    bars = done.stdout.count('<g class="point">')
    sparse = sum(step.method != "dense" for step in plan.steps)
    assert bars == len(plan.steps) + sparse + sum(record.status == "OK" for record in records.records)
    labels = re.findall(r'<g class="textpoint"[^>]*>.*?</g>', done.stdout)
    assert len(labels) == bars
    assert all(re.search(" (ms|µs)", re.sub(r"<[^>]*>", "", label)) for label in labels)
