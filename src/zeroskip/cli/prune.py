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
    scope: Annotated[
        Literal["layer", "global", "erk"], typer.Option(help="How the budget is dealt to layers.")
    ] = "layer",
    permute: Annotated[bool, typer.Option(help="For N:M: reorder channels first, so that less is lost.")] = False,
    shape: Annotated[str, typer.Option(help="Of an input, for --permute.")] = "1,3,224,224",
    as_json: Json = False,
) -> None:
    """Set the smallest weights of a network to zero and save it.

    In one shot, which costs accuracy: to keep it, prune while training with zeroskip.pruning.GradualPruner.
    """
    import json

    import torch
    from safetensors.torch import save

    from zeroskip.cli.compile import sizes
    from zeroskip.cli.models import build
    from zeroskip.core.atomic import replace_file
    from zeroskip.pruning import prune as zero_smallest

    if pattern == "filters":
        raise ValueError(
            f'pattern: got "filters", expected "unstructured" or "N:M", since {model} could not load the smaller '
            "weights; call zeroskip.prune from Python and save the network with zeroskip.compile(...).save"
        )
    with progress(f"pruning {model}"):
        network = build(model, weights)
        example = torch.rand(sizes(shape)) if permute else None
        record = zero_smallest(network, sparsity, pattern=pattern, scope=scope, permute=permute, example=example)
        replace_file(to, save(network.state_dict()))
    if as_json:
        out_json(json.loads(record.to_json()) | {"out": str(to)})
    else:
        out(f"{record}\nwritten to {to}")
