"""``zeroskip report``: records, a plan and trained networks as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeroskip.cli.show import out


def report(
    to: Annotated[Path, typer.Option("--out", help="Where the page goes, as HTML.")],
    results: Annotated[list[Path] | None, typer.Argument(help="Results of zeroskip bench.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan of zeroskip compile, as JSON.")] = None,
    trained: Annotated[
        list[Path] | None,
        typer.Option(help="Trained networks and their accuracy, trained.jsonl of tools.train; again for more."),
    ] = None,
    title: Annotated[str, typer.Option(help="The page's heading.")] = "How fast the zeros make it",
) -> None:
    """Write one HTML page that works from disk."""
    from zeroskip.plan.plan import Plan
    from zeroskip.report.accuracy import read_trained
    from zeroskip.report.page import write_page
    from zeroskip.report.records import RecordFile, read

    if not results and plan is None and not trained:
        raise ValueError(
            "nothing to report: give results (RESULTS.jsonl), a plan (--plan plan.json) or trained networks "
            "(--trained trained.jsonl)"
        )
    files = [read(path) for path in results or ()]
    records = (
        RecordFile(
            {name: facts for file in files for name, facts in file.environments.items()},
            tuple(record for file in files for record in file.records),
        )
        if files
        else None
    )
    write_page(to, Plan.read(plan) if plan else None, records, title, trained=read_trained(trained or ()))
    out(f"written to {to}")
