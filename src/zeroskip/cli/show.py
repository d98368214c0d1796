"""What the terminal shows.  Results go to stdout; errors and progress to stderr, so that stdout can be piped."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeroskip.plan.plan import Plan

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``"""
FOLDED, GAP = 16, 3
"""Columns of a terminal that a text in a table is folded to at least, and between two columns of a table."""
WIDE = 130
"""Columns a terminal needs for the last column of a plan, the reasons."""


def out(text: str = "") -> None:
    """A line on stdout, as it is: no markup, no wrapping."""
    sys.stdout.write(text + "\n")


def out_json(data: Any) -> None:
    out(json.dumps(data, indent=2, ensure_ascii=False))


def fail(error: Exception) -> None:
    """The message of ``error`` on stderr, in red where the terminal has colours."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), (str(error), "red")))


def out_table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> None:
    """A table on stdout; the columns named in ``numbers`` are set to the right.

    Where the terminal is too narrow for the numbers of a row, each row is a list of its cells instead.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    right, console = set(numbers), Console()
    cells = [[str(cell) for cell in row] for row in rows]
    longest = [max(map(len, texts)) for texts in zip(*cells, strict=True)] or [0] * len(head)
    words = [max(map(len, name.split()), default=0) for name in head]
    least = [
        max(most, word) if column in right else min(max(most, word), FOLDED)
        for column, (most, word) in enumerate(zip(longest, words, strict=True))
    ]
    whole = sum(max(most, len(name)) + GAP for most, name in zip(longest, head, strict=True)) <= console.width
    if whole or sum(least) + GAP * len(least) <= console.width:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column, (name, width) in enumerate(zip(head, least, strict=True)):
            number = column in right
            table.add_column(
                Text(name),
                justify="right" if number else "left",
                width=width if number and not whole else None,
                overflow="fold",
            )
        for row in cells:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    width = max(map(len, head[1:]))
    for first, *others in cells:
        out(first)
        for name, cell in zip(head[1:], others, strict=True):
            out(f"  {name:{width}}  {cell}")


def out_plan(plan: Plan) -> None:
    """The steps, and the verdict below them."""
    from zeroskip.report.tables import milliseconds

    def ms(time_us: float | None) -> str:
        return "-" if time_us is None else milliseconds(time_us)

    rows = [
        (
            step.name,
            step.layer,
            f"{1 - step.density:.0%}",
            step.method,
            ms(step.time_us),
            ms(step.dense_us),
            f"{step.dense_us / step.time_us:.2f}×" if step.dense_us and step.time_us else "-",
            "; ".join(
                [
                    step.why,
                    *(
                        f"{item.method}: {item.reason}"
                        if item.time_us is None
                        else f"{item.method} {ms(item.time_us)} ms"
                        for item in step.rejected
                    ),
                ]
            ),
        )
        for step in plan.steps
    ]
    head = ("layer", "shape", "zeros", "method", "ms", "dense ms", "speed-up", "why, and why not the others")
    columns = len(head)
    if shutil.get_terminal_size().columns < WIDE:
        columns -= 1
        out(f"A terminal of {WIDE} columns, --json or --page show why.")
    out_table(head[:columns], [row[:columns] for row in rows], numbers=(2, 4, 5, 6))
    for line in plan.summary():
        out(line)


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A bar on stderr that is gone when the work is done; where stderr is no terminal there is none."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, now: bar.update(task, completed=done, total=total, description=now)
