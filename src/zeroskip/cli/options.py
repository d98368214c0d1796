"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to use; torch's own choice by default.")]
Model = Annotated[str, typer.Argument(help="A network of the zoo, such as resnet18.")]
Weights = Annotated[Path | None, typer.Option(help="Its state dict as safetensors; random weights by default.")]
On = Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Where it is to run.")]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"], typer.Option("--dtype", help="Of the weights and everything computed.")
]
Precision = Annotated[
    Literal["fp32", "tf32"] | None,
    typer.Option("--precision", help="Of float32 on a GPU: strict, or TF32; torch's settings by default."),
]


def thread_count(threads: int | None) -> int:
    """The number asked for, or torch's."""
    import torch

    return threads or torch.get_num_threads()
