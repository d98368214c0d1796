"""``zeroskip demo``: the whole story on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeroskip.cli.options import Threads
from zeroskip.cli.show import out, out_plan, out_table, progress


def demo(
    to: Annotated[Path, typer.Option("--out", help="Folder for the picture and the page.")] = Path("zeroskip-demo"),
    threads: Threads = None,
) -> None:
    """Denoise photographs, dense and sparse.

    Leaves a picture of both beside the noisy one, and a page with every layer's time.
    """
    from zeroskip.report.demo import run_demo

    with progress("denoising") as bar:
        found = run_demo(to, threads, bar)
    out_plan(found.plan)
    head, *rows = found.table
    out_table(head, rows, numbers=range(1, len(head)))
    out(f"picture: {found.picture}\npage: {found.page}")
