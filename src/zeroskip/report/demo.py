"""``zeroskip demo``: photographs, noise, and two networks that take it away, the dense and the sparse one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn

from zeroskip.assets import dense_denoiser, sparse_denoiser
from zeroskip.core.device import cpu
from zeroskip.core.errors import Unsupported, ZeroskipError
from zeroskip.core.oracle import TOLERANCE
from zeroskip.cpu.threads import torch_threads
from zeroskip.measure.timer import Measurement, measure, once
from zeroskip.plan.plan import Plan
from zeroskip.plan.planner import Progress, silent
from zeroskip.report.page import write_page
from zeroskip.report.picture import Panel, Row, draw
from zeroskip.report.tables import milliseconds
from zeroskip.run.compile import compile, distance

__all__ = ["DemoResult", "dense_denoiser", "run_demo", "sparse_denoiser"]

SIZE = 256
"""Side of the crops.  One forward pass of the dense network on 512 x 512 takes torch some seconds on one core, and
tuning and confirming take about a hundred of them; at 256 the whole demo is done in a minute or two.  One size for all
photographs, because an engine is tuned for a shape."""
SIGMA = 25 / 255
SEED = 2025
ROUNDS = 5
"""Of the final comparison; each round denoises one photograph with everything."""

CAPTION = (
    "Photographs with noise; without it by the dense network in torch; without it by the network with 90% zeros in "
    "zeroskip. Below each, the framed part magnified."
)


@dataclass(frozen=True)
class Photograph:
    """A function of ``skimage.data`` that needs no download, the centre (y, x) of the crop in pixels, and that of the
    part to magnify in 0..1 of the crop."""

    name: str
    source: str
    centre: tuple[int, int]
    zoom: tuple[float, float] | None = None


PHOTOGRAPHS = (
    Photograph("astronaut", "astronaut", (128, 225), (0.42, 0.5)),
    Photograph("cat", "chelsea", (140, 200), (0.45, 0.42)),
    Photograph("coffee", "coffee", (190, 310)),
    Photograph("rocket", "rocket", (300, 320)),
    Photograph("motorcycle", "stereo_motorcycle", (200, 540)),
)
"""Those with a part to magnify are in the picture."""


@dataclass(frozen=True)
class DemoResult:
    """``table``: rows of text, the first is the header.  ``plan`` is that of the sparse network."""

    table: list[tuple[str, ...]]
    picture: Path
    page: Path
    plan: Plan
    contended: bool
    """The machine did other work meanwhile, so the table shows no ratio."""
    difference: float
    """Largest distance of the engine's output from torch's, same network, over the largest output."""


@dataclass(frozen=True)
class Denoised:
    """One photograph in all its forms, float ``[1, 3, h, w]`` in 0..1."""

    photograph: Photograph
    clean: Tensor
    images: dict[str, Tensor]
    """By column of the table."""

    def psnr(self, column: str) -> float:
        """In dB, clipped to 0..1 as a screen would."""
        error = (self.images[column].clamp(0, 1) - self.clean).square().mean()
        return float(-10 * error.log10())


NOISY, DENSE, SPARSE, ENGINE = "noisy", "dense, torch", "90% zeros, torch", "90% zeros, zeroskip"
Call = Callable[[Tensor], Tensor]


def run_demo(out_dir: Path, threads: int | None = None, progress: Progress = silent) -> DemoResult:
    """Denoise photographs, compare, and write ``denoised.png`` and ``report.html`` into ``out_dir``.

    Args:
        threads: ``torch.get_num_threads()`` by default.
        progress: called as ``progress(done, total, what)``.

    Raises:
        Unsupported: a package of the extra ``demo`` is missing.
        ZeroskipError: the engine and torch disagree.
    """
    _check_extras()
    threads = threads or torch.get_num_threads()
    with torch_threads(threads), torch.no_grad():
        return _run(Path(out_dir), threads, progress)


def _check_extras() -> None:
    """Before a minute of work, not after it."""
    missing = [
        name
        for name, module in (("scikit-image", "skimage"), ("Pillow", "PIL"), ("Plotly", "plotly"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise Unsupported(
            f"the demo needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed: pip install 'zeroskip[demo]'"
        )


def _run(out_dir: Path, threads: int, progress: Progress) -> DemoResult:
    photographs = [_with_noise(photograph, SEED + index) for index, photograph in enumerate(PHOTOGRAPHS)]
    examples = [one.images[NOISY] for one in photographs]
    dense, sparse = dense_denoiser(), sparse_denoiser()

    def compiling(done: int, total: int, what: str) -> None:
        progress(done, total, f"tuning {what}" if what else "running the whole network")

    engine = compile(sparse, examples[0], threads=threads, progress=compiling)
    total = len(photographs) + 2
    calls = _torch_calls(dense, sparse, examples[0], threads) | {ENGINE: engine}
    difference = 0.0
    for done, one in enumerate(photographs):
        progress(done, total, f"denoising {one.photograph.name}")
        one.images.update({name: call(one.images[NOISY]) for name, call in calls.items()})
        difference = max(difference, distance(one.images[ENGINE], one.images[SPARSE]))
    if difference > TOLERANCE["fp32"]:
        raise ZeroskipError(
            f"the engine's outputs differ from torch's by {difference:.2g} of the largest output, at "
            f"most {TOLERANCE['fp32']:.2g} is rounding: please report this, with what `zeroskip doctor` prints"
        )

    progress(total - 2, total, "comparing times")
    measured = measure({name: _over(examples, call) for name, call in calls.items()}, ROUNDS, cpu(threads))
    progress(total - 1, total, "writing picture and page")
    picture, page = out_dir / "denoised.png", out_dir / "report.html"
    out_dir.mkdir(parents=True, exist_ok=True)
    title, subtitle = _headline(measured, engine.plan)
    png = draw(title, subtitle, [_row(one, measured) for one in photographs if one.photograph.zoom])
    picture.write_bytes(png)
    write_page(page, engine.plan, None, "Denoising with 90% zeros", [(CAPTION, png)])
    progress(total, total, "")
    return DemoResult(_table(photographs, measured), picture, page, engine.plan, measured.contended, difference)


def _with_noise(photograph: Photograph, seed: int) -> Denoised:
    from skimage import data

    loaded = getattr(data, photograph.source)()
    image = torch.from_numpy(loaded[0] if isinstance(loaded, tuple) else loaded)  # of a stereo pair, the left one
    top, left = (
        min(max(0, centre - SIZE // 2), length - SIZE)
        for centre, length in zip(photograph.centre, image.shape, strict=False)
    )
    clean = image[None, top : top + SIZE, left : left + SIZE].permute(0, 3, 1, 2).float().contiguous() / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return Denoised(photograph, clean, {NOISY: clean + SIGMA * noise})


def _torch_calls(dense: nn.Module, sparse: nn.Module, example: Tensor, threads: int) -> dict[str, Call]:
    """Both networks in torch, in the memory format in which torch runs them faster here."""
    last = example.contiguous(memory_format=torch.channels_last)
    device = cpu(threads)
    contiguous = once(lambda: dense(example), device)
    for network in (dense, sparse):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if once(lambda: dense(last), device) < contiguous:
        return {
            DENSE: lambda x: dense(x.contiguous(memory_format=torch.channels_last)),
            SPARSE: lambda x: sparse(x.contiguous(memory_format=torch.channels_last)),
        }
    for network in (dense, sparse):
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return {DENSE: dense, SPARSE: sparse}


def _over(examples: Sequence[Tensor], call: Call) -> Callable[[], object]:
    """Every call takes the next photograph."""
    following = cycle(examples)
    return lambda: call(next(following))


def _ms(measured: Measurement, name: str) -> str:
    return f"{measured.times[name].median_us / 1e3:.0f} ms"


def _speedup(measured: Measurement, name: str) -> float:
    return measured.times[DENSE].median_us / measured.times[name].median_us


def _table(photographs: Sequence[Denoised], measured: Measurement) -> list[tuple[str, ...]]:
    columns = (NOISY, DENSE, SPARSE, ENGINE)
    rows: list[tuple[str, ...]] = [("PSNR in dB", *columns)]
    psnr = {one.photograph.name: [one.psnr(column) for column in columns] for one in photographs}
    psnr["mean"] = [sum(values) / len(values) for values in zip(*psnr.values(), strict=True)]
    rows += [(name, *(f"{value:.2f}" for value in values)) for name, values in psnr.items()]
    rows.append(("ms per photograph", "", *(milliseconds(measured.times[name].median_us) for name in columns[1:])))
    ratios = ["busy" if measured.contended else f"{_speedup(measured, name):.2f}×" for name in columns[1:]]
    return [*rows, ("speed-up", "", *ratios)]


def _headline(measured: Measurement, plan: Plan) -> tuple[str, str]:
    threads = plan.device.threads
    where = f"{plan.device.name}, {threads} thread{'s' * (threads != 1)}, {SIZE} x {SIZE} pixels, noise of sigma 25/255"
    if measured.contended:
        return "A denoiser with 90% zeros", f"{where}. The machine was busy: take no ratio from these times"
    return f"A denoiser with 90% zeros, {_speedup(measured, ENGINE):.1f} times as fast as the dense one", where


def _row(one: Denoised, measured: Measurement) -> Row:
    notes: Mapping[str, str] = {
        NOISY: "",
        DENSE: f" · {_ms(measured, DENSE)} in torch",
        ENGINE: f" · {_ms(measured, ENGINE)} in zeroskip",
    }
    names = {NOISY: "noisy", DENSE: "dense", ENGINE: "90% zeros"}
    panels = tuple(
        [
            Panel(
                (one.images[column][0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy(),
                names[column],
                f"{one.psnr(column):.1f} dB{note}",
            )
            for column, note in notes.items()
        ]
    )
    return Row(panels, one.photograph.zoom or (0.5, 0.5))
