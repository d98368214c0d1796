"""``python -m zeroskip``."""

from zeroskip.cli.main import app

app(prog_name="zeroskip")
