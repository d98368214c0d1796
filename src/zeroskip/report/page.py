"""One HTML page that works from disk, without a network and without anything beside it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from zeroskip._version import __version__
from zeroskip.core.errors import Unsupported
from zeroskip.plan.plan import Plan
from zeroskip.pruning import Trained
from zeroskip.report import sections
from zeroskip.report.accuracy import treatments
from zeroskip.report.html import Html, join, tag
from zeroskip.report.palette import colours
from zeroskip.report.records import RecordFile


def write_page(
    path: Path | str,
    plan: Plan | None,
    records: RecordFile | None,
    title: str,
    images: Sequence[tuple[str, bytes]] = (),
    trained: Sequence[Trained] = (),
) -> None:
    """Write a report; what there is no plan or no record for is left out.

    Args:
        images: captions and PNG files, shown side by side below the headline.
        trained: networks whose accuracy is shown, with the speeds that ``records`` holds of them.

    Raises:
        Unsupported: Plotly is not installed.
    """
    body = join(
        [
            tag("header", tag("p", "zeroskip report", class_="eyebrow"), tag("h1", title)),
            tag("main", *_sections(plan, records, images, trained)),
            tag("footer", f"Made by zeroskip {__version__}."),
        ]
    )
    page = join(
        [
            Html('<!DOCTYPE html>\n<html lang="en">\n'),
            _head(title),
            Html("\n"),
            tag("body", body, *(tag("script", Html(text)) for text in (_plotly(), _text("page.js")))),
            Html("\n</html>\n"),
        ]
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _sections(
    plan: Plan | None, records: RecordFile | None, images: Sequence[tuple[str, bytes]], trained: Sequence[Trained]
) -> list[Html]:
    planned = [step.method for step in plan.steps] if plan else []
    measured = [record.method for record in records.records] if records else []
    known = colours(["dense", *planned, *measured])
    parts = [sections.headline(plan)] if plan else []
    parts += [sections.pictures(images)] if images else []
    if plan:
        parts += [
            sections.layers(plan, known),
            sections.plan_table(plan),
            sections.graph(plan, known),
            sections.roofline(plan, known),
        ]
    parts += [sections.accuracy(treatments(trained, records))] if trained else []
    parts += [sections.measurements(records, known)] if records else []
    return [*parts, sections.raw(plan, records, trained)]


def _head(title: str) -> Html:
    # The empty icon keeps a browser from asking for one.
    start = Html(
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
    )
    return tag("head", start, tag("title", title), tag("style", Html(_text("page.css"))))


def _text(name: str) -> str:
    return (resources.files("zeroskip.report") / name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise Unsupported(
            "the report page needs Plotly, which is not installed: pip install 'zeroskip[report]'"
        ) from error
    return str(get_plotlyjs())
