"""``zeroskip bench``: measure a suite."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from zeroskip.cli.options import Json
from zeroskip.cli.show import Progress, out, out_json, out_table, progress


def bench(
    suite: Annotated[Path, typer.Argument(help="Cases to measure, as TOML.")],
    to: Annotated[Path, typer.Option("--out", help="Append the records here, as JSON lines.")] = Path("results.jsonl"),
    budget: Annotated[float | None, typer.Option(min=0, help="Stop cleanly after this many seconds.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Skip the cases that these results hold.")] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="So many cases of a GPU at once: built side by side, measured in turns.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Measure a suite of cases.

    Every method in turns, each checked before it is timed. Device, precision and threads are the suite's.
    """
    from zeroskip.core.jsonable import to_json
    from zeroskip.report.bench import run_suite
    from zeroskip.report.records import Writer, read
    from zeroskip.report.tables import table

    with progress(f"measuring {suite.name}") as bar, Writer(to) as writer:
        shown = _bar(bar) if sys.stderr.isatty() else _lines(time.perf_counter())
        run_suite(suite, writer, budget_seconds=budget, resume=resume, progress=shown, processes=processes)
    results = read(to)
    if as_json:
        out_json(to_json(results))
        return
    found = table(results.records)
    out_table(found.head, found.rows, found.numbers)
    out(f"written to {to}")


def _bar(bar: Progress) -> Progress:
    """``bar``, and a line that stays for each case that is left out."""
    from zeroskip.report.bench import LEFT_OUT

    def show(done: int, total: int, now: str) -> None:
        if LEFT_OUT in now:
            sys.stderr.write(f"{now}\n")
        bar(done, total, now)

    return show


def _lines(started: float) -> Progress:
    """For a log: what is measured now, and when it was begun."""

    def show(done: int, total: int, now: str) -> None:
        if now:
            sys.stderr.write(f"{time.perf_counter() - started:6.1f} s  {done + 1}/{total}  {now}\n")
            sys.stderr.flush()

    return show
