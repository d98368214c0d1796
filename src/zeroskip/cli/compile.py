"""``zeroskip compile``: measure, choose, and write an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zeroskip.cli.options import Dtype, Json, Model, On, Precision, Threads, Weights
from zeroskip.cli.show import out, out_plan, progress


def compile_model(
    model: Model,
    to: Annotated[Path, typer.Option("--out", help="Where the engine goes: model.zsk.")],
    weights: Weights = None,
    shape: Annotated[str, typer.Option(help="Shape of the input.")] = "1,3,224,224",
    device: On = "cpu",
    dtype: Dtype = "float32",
    precision: Precision = None,
    threads: Threads = None,
    labels: Annotated[
        Path | None, typer.Option(help="Names of the classes, one a line, for zeroskip run to tell.")
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="Store float32 weights rounded to float16, in half the bytes.")
    ] = False,
    plan: Annotated[Path | None, typer.Option(help="Write the plan here too, as JSON.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write a report here, as HTML.")] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest way to run each layer.

    Measures every method on this machine, checks the results, and saves an engine.
    """
    import torch

    import zeroskip
    from zeroskip.cli.models import build, place

    for path in (to, plan, page):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {path.absolute().parent} for {path.name}: make it first")
    names = None if labels is None else lines(labels)
    network, example = build(model, weights), torch.rand(sizes(shape))
    network, example = network.to(place(device), getattr(torch, dtype)), example.to(device, getattr(torch, dtype))
    with progress(f"compiling {model}") as bar:
        engine = zeroskip.compile(network, example, precision=precision, threads=threads, labels=names, progress=bar)
    engine.save(to, half=half)
    if plan is not None:
        plan.write_text(engine.plan.to_json())
    if page is not None:
        from zeroskip.report.page import write_page

        write_page(page, engine.plan, None, f"{model}, {shape.replace(',', ' × ')}")
    if as_json:
        out(engine.plan.to_json())
    else:
        out_plan(engine.plan)
        out(f"written to {', '.join(str(path) for path in (to, plan, page) if path)}")


def lines(path: Path) -> list[str]:
    """Of a text file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--labels: got bytes in {path} that are no text, expected the name of a class a line"
        ) from error


def sizes(text: str) -> tuple[int, ...]:
    """``"1,3,224,224"`` as numbers.

    Raises:
        ValueError: something else.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ValueError(f"--shape: got {text!r}, expected positive sizes such as 1,3,224,224")
    return found
