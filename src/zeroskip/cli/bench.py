"""``zeroskip bench``: measure a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeroskip.cli.options import Json
from zeroskip.cli.show import out, out_json, out_table, progress


def bench(
    suite: Annotated[Path, typer.Argument(help="Cases to measure, as TOML.")],
    to: Annotated[Path, typer.Option("--out", help="Append the records here, as JSON lines.")] = Path("results.jsonl"),
    budget: Annotated[float | None, typer.Option(min=0, help="Stop cleanly after this many seconds.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Skip the cases that these results hold.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a suite of cases.

    Every method in turns, each checked before it is timed. The threads are those of the suite.
    """
    from zeroskip.core.jsonable import to_json
    from zeroskip.report.bench import run_suite
    from zeroskip.report.records import Writer, read
    from zeroskip.report.tables import table

    with progress(f"measuring {suite.name}") as bar, Writer(to) as writer:
        run_suite(suite, writer, budget_seconds=budget, resume=resume, progress=bar)
    results = read(to)
    if as_json:
        out_json(to_json(results))
        return
    found = table(results.records)
    out_table(found.head, found.rows, found.numbers)
    out(f"written to {to}")
