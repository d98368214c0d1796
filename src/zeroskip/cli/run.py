"""``zeroskip run``: one engine, one input, one time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from zeroskip.cli.options import Json
from zeroskip.cli.show import out, out_json, progress
from zeroskip.core.errors import FileFormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SHOWN = 5
"""Labels, of those that are likeliest."""


def run(
    file: Annotated[Path, typer.Argument(help="An engine: model.zsk.")],
    source: Annotated[Path | None, typer.Option("--input", help="A .npy array or an image; random by default.")] = None,
    to: Annotated[Path | None, typer.Option("--output", help="Write the output here, as .npy.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="How often to time it; the median is shown.")] = 10,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Refuse an engine that was compiled for another device.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run an engine once, then time it, on the kind of device that it was compiled for.

    An image is scaled and cropped around its centre to the engine's input, with values from 0 to 1. Mean and standard
    deviation are not taken out: a network that wants them does that itself, or wants an array. An engine with labels
    shows the five likeliest of each image, with the softmax of its output.
    """
    import numpy
    import torch

    import zeroskip
    from zeroskip.run.graphs import obstacle
    from zeroskip.run.timing import compare

    engine = zeroskip.load(file, device)
    plan, program = engine.plan, engine.variants[0].program
    shapes, machine = plan.input_shapes, plan.device
    given = [torch.rand(shape) for shape in shapes] if source is None else [read_input(source, shapes)]
    dtypes = [getattr(torch, program.graph.values[name].dtype) for name in program.graph.inputs]
    # A file cannot hold every kind of float; what is no float is a mistake, and the engine says so.
    inputs = [
        x.to(engine.device, dtype if x.is_floating_point() else x.dtype) for x, dtype in zip(given, dtypes, strict=True)
    ]
    with progress(f"running {file.name}"), torch.no_grad():
        result = engine(*inputs)
        timed = compare({"engine": engine.work(*inputs)}, repeat, machine, obstacle(program) is None)
    if to is not None:
        if not isinstance(result, torch.Tensor):
            raise ValueError(
                f"--output: the engine returns a {type(result).__name__}, only one tensor can be written: "
                "call the engine from Python"
            )
        numpy.save(to, (result.float() if result.dtype == torch.bfloat16 else result).numpy(force=True))
    times = timed.times["engine"]
    facts = {
        "output": _described(result),
        "median_ms": times.median_us / 1e3,
        "spread": times.spread,
        "repeat": repeat,
        "device": machine.name,
        "precision": plan.precision,
        "threads": machine.threads,
        "contended": timed.contended,
    }
    found = likeliest(result, engine.labels) if source is not None and engine.labels is not None else []
    if found:
        facts["likeliest"] = found
    if as_json:
        out_json(facts)
        return
    for image in found:
        for guess in image:
            out(f"{guess['probability']:6.1%}  {guess['label']}")
        out()
    busy = "  (the machine was busy: do not compare this time)" if timed.contended else ""
    out(
        f"output {facts['output']}\n{times.median_us / 1e3:.3f} ms ±{times.spread / 2:.0%}, median of {repeat}, "
        f"{plan.machine}{busy}"
    )


def likeliest(output: Tensor, labels: Sequence[str]) -> list[list[dict[str, Any]]]:
    """For each image the labels with the largest softmax of ``output`` ``[n, len(labels)]``, and that number."""
    best = output.double().softmax(1).topk(min(SHOWN, len(labels)))
    return [
        [{"label": labels[index], "probability": value} for value, index in zip(*image, strict=True)]
        for image in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def read_input(path: Path, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    """The input of an engine from a file, float32 or as the array has it.

    Raises:
        ValueError: the engine takes something that a file cannot give.
        FileFormatError: the file is neither an array nor an image.
    """
    import numpy
    import torch

    if len(shapes) != 1:
        raise ValueError(f"--input: the engine takes {len(shapes)} inputs, a file holds one: call it from Python")
    if path.suffix != ".npy":
        return _image(path, shapes[0])
    try:
        return torch.from_numpy(numpy.load(path, allow_pickle=False))
    except (ValueError, EOFError, TypeError) as error:
        raise FileFormatError(f"{path}: not an array of numbers ({error}); write one with numpy.save") from error


def _image(path: Path, shape: tuple[int, ...]) -> Tensor:
    """float32 ``shape`` ([1, 1 or 3, h, w]), 0 to 1."""
    import numpy
    import torch

    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError("reading an image needs Pillow: pip install 'zeroskip[demo]'") from error
    if len(shape) != 4 or shape[0] != 1 or shape[1] not in (1, 3):
        raise ValueError(
            f"--input: the engine takes {'x'.join(map(str, shape))}, an image makes 1x3xHxW or 1x1xHxW: "
            "give an .npy array"
        )
    with Image.open(path) as image:
        fitted = ImageOps.fit(image.convert("L" if shape[1] == 1 else "RGB"), (shape[3], shape[2]))
    pixels = torch.from_numpy(numpy.asarray(fitted, dtype=numpy.float32) / 255)
    return pixels.reshape(shape[2], shape[3], shape[1]).movedim(-1, 0)[None].contiguous()


def _described(result: Any) -> str:
    import torch

    if isinstance(result, torch.Tensor):
        return f"{'x'.join(map(str, result.shape))} {str(result.dtype).removeprefix('torch.')}"
    if isinstance(result, dict):
        return f"{{{', '.join(f'{key}: {_described(item)}' for key, item in result.items())}}}"
    if isinstance(result, (list, tuple)):
        return f"[{', '.join(map(_described, result))}]"
    return str(result)
