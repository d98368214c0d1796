"""The verbs together, and what they have in common: errors in one red line."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from zeroskip.cli.bench import bench
from zeroskip.cli.compile import compile_model
from zeroskip.cli.demo import demo
from zeroskip.cli.doctor import doctor
from zeroskip.cli.prune import prune
from zeroskip.cli.report import report
from zeroskip.cli.run import run
from zeroskip.core.errors import ZeroskipError


class Verbs(TyperGroup):
    """Shows what is the user's to mend as a message; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ZeroskipError, ValueError, OSError) as error:
            from zeroskip.cli.show import fail

            fail(error)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Verbs,
    help="Pruned convolutional networks that actually run faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(doctor)
app.command()(prune)
app.command("compile")(compile_model)
app.command()(run)
app.command()(bench)
app.command()(report)
app.command()(demo)
