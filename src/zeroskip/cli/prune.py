"""``zeroskip prune``: zero the smallest weights of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from zeroskip.cli.options import Json, Model, Weights
from zeroskip.cli.show import out, out_json, progress


def prune(
    model: Model,
    to: Annotated[Path, typer.Option("--out", help="Where the pruned state dict goes, as safetensors.")],
    weights: Weights = None,
    sparsity: Annotated[float, typer.Option(help="Fraction of the weights to zero.")] = 0.9,
    pattern: Annotated[str, typer.Option(help='"unstructured", or N:M such as "2:4".')] = "unstructured",
    scope: Annotated[Literal["layer", "global"], typer.Option(help="A threshold per layer, or one for all.")] = "layer",
    as_json: Json = False,
) -> None:
    """Set the smallest weights of a network to zero and save it.

    In one shot, which costs accuracy: to keep it, prune while training with zeroskip.pruning.GradualPruner.
    """
    import json

    from safetensors.torch import save_file

    from zeroskip.cli.models import build
    from zeroskip.pruning import prune as zero_smallest

    with progress(f"pruning {model}"):
        network = build(model, weights)
        record = zero_smallest(network, sparsity, pattern=pattern, scope=scope)
        save_file(network.state_dict(), to)
    if as_json:
        out_json(json.loads(record.to_json()) | {"out": str(to)})
    else:
        out(f"{record}\nwritten to {to}")
