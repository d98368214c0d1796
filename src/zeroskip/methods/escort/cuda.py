"""The CUDA side of Escort: which tiles to try, packing, the template instance, and the bound call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported
from zeroskip.core.layer import ConvShape, Epilogue, Layer, Precision
from zeroskip.cuda.compile import Instance
from zeroskip.cuda.compile import build as compile_kernel
from zeroskip.cuda.launch import load
from zeroskip.cuda.limits import CLOCK, CLUSTERS, reached, resident
from zeroskip.cuda.types import TYPES
from zeroskip.methods.escort.cuda_geometry import (
    FLOAT,
    LANES,
    MOST_SPLIT,
    WINDOW_ROWS,
    WINDOWS,
    EscortCudaConfig,
    Mode,
    check,
    patch_of,
)
from zeroskip.pack.stretched_chunks import Deal, Places, StretchedChunks

KERNEL = Path(__file__).with_name("kernel.cuh")


@dataclass(frozen=True)
class EscortCudaPacked:
    layer: Layer
    config: EscortCudaConfig
    weight: StretchedChunks


def refusal(layer: Layer) -> str | None:
    """Why the layer cannot be run, or None."""
    if layer.kind == "linear":
        return "is for convolutions on a GPU; sputnik runs linear layers"
    if layer.precision == "fp64":
        return "sums in fp32 on a GPU, the layer is fp64"
    if 0 in layer.shape.output_shape:
        return "the batch is empty"
    return None


# -- configurations -----------------------------------------------------------------------------------
MOST_CANDIDATES = 24
NEXT_OF_KIND = 0.2
"""Of the estimate: how much later each further configuration of a kind is tried.  Kinds differ by more than that in
what the estimate does not know, so the likeliest of every kind come first."""
OF_OTHER_MODE, UNLIKELY = 6, 1.8


def configs(layer: Layer, device: Device) -> list[tuple[float, EscortCudaConfig]]:
    """Estimated seconds and configuration, in the order to try.

    Raises:
        Unsupported: no configuration fits.
    """
    found = sorted(every_config(layer, device), key=lambda pair: pair[0])
    if not found:
        raise Unsupported("what a tile of outputs meets does not fit the shared memory of a block, whatever its size")
    seen: dict[tuple[object, ...], int] = {}
    order = []
    for seconds, config in found:
        lanes = (config.images, config.strips, config.pixels)
        kind = (config.mode, lanes, config.rows * config.warps, config.split)
        seen[kind] = seen.get(kind, -1) + 1
        order.append((seconds * (1 + NEXT_OF_KIND * seen[kind]), seconds, config))
    order.sort(key=lambda one: one[0])
    # A few of the mode that the estimate likes less, unless it likes it much less.
    best, mode = order[0][0], order[0][2].mode
    others = [one for one in order if one[2].mode != mode and one[0] < UNLIKELY * best][:OF_OTHER_MODE]
    likeliest = [one for one in order if one not in others][: MOST_CANDIDATES - len(others)]
    chosen = sorted([*likeliest, *others], key=lambda one: one[0])
    return [(seconds, config) for _, seconds, config in chosen]


def every_config(layer: Layer, device: Device) -> Iterator[tuple[float, EscortCudaConfig]]:
    """Estimated seconds and configuration of all that fit, in no order."""
    for config in dict.fromkeys(_menu(layer.shape, device)):
        seconds = _seconds(layer, config, device)
        if seconds < math.inf:
            yield seconds, config


class _Lanes(NamedTuple):
    images: int
    strips: int
    cols: int
    pixels: int


def _menu(shape: ConvShape, device: Device) -> Iterator[EscortCudaConfig]:
    splits = (1, 2, 4, MOST_SPLIT) if device.generation >= CLUSTERS else (1,)
    channels, rows_in_all = shape.c // shape.groups, shape.k // shape.groups
    across = -(-shape.q // LANES)
    for wide in (4, 2, 1):
        cols = -(-shape.q // (across * wide)) * wide if across > 1 else shape.q
        if shape.w % wide == 0 and (wide == 1 or shape.stride[1] == 1) and cols <= LANES:
            break
    tiles: list[tuple[Mode, _Lanes, int]] = [
        ("taps", lanes, rows) for lanes in _lanes(shape, cols, (1, 2, 4, 7, 8, 14)) for rows in (1, 2, 4, 8)
    ]
    for (rows, pixels), strides in WINDOWS.items():
        if shape.r == WINDOW_ROWS and shape.dilation[0] == 1 and shape.stride[0] in strides:
            tiles += [("windows", lanes, rows) for lanes in _lanes(shape, cols, (pixels,), exact=True)]
    # A dilated kernel may reach so far that few channels fit shared memory.
    reach = max((shape.r - 1) * shape.dilation[0], (shape.s - 1) * shape.dilation[1])
    lengths = (32, 16, 8, 1) if reach <= 8 else (8, 2, 1)
    for (mode, lanes, rows), split in itertools.product(tiles, splits):
        most = -(-channels // split)
        depths = {-(-most // parts) for parts in (1, 2, 4, *(-(-most // length) for length in lengths))}
        for warps, slab in itertools.product((4, 8, 12, 16), sorted(depths)):
            parts = -(-most // slab)
            for stages in {min(2, parts), min(3, parts)}:
                try:
                    config = EscortCudaConfig(mode, *lanes, rows, warps, wide, slab, stages, 1, split)
                except ValueError:
                    continue
                fewest = -(-rows_in_all // config.positions)
                # A block for every SM within reach, if that is not many more than the output channels need.
                full = reached(device.num_sms, split) // (config.count(shape) * split * shape.groups)
                for blocks in {fewest, full} if fewest < full <= 1.5 * fewest else {fewest}:
                    if warps > 4 and 2 * rows_in_all <= blocks * config.positions:
                        continue  # half of the warps would do nothing
                    chosen = replace(config, blocks=blocks)
                    try:
                        check(shape, chosen)
                    except ValueError:
                        continue
                    yield chosen


def _lanes(shape: ConvShape, cols: int, pixels: Sequence[int], exact: bool = False) -> Iterator[_Lanes]:
    """Ways to lay lanes of ``cols`` columns and about (or ``exact``-ly) so many pixels over the images."""
    across, strips = -(-shape.q // cols), LANES // cols
    found = set()
    for tall, strip in itertools.product(pixels, {1, 2, 4, strips}):
        if strip > strips or (strip - 1) * (tall if exact else 1) >= shape.p:
            continue
        down = -(-shape.p // (strip * tall))
        tall = tall if exact else -(-shape.p // (strip * down))
        # Lanes that could do something else are left idle only where there is nothing else.
        most = min(shape.n, strips // strip) if down == across == 1 else 1
        if most * strip * 2 <= strips and shape.p > strip * tall:
            continue
        found |= {_Lanes(images, strip, cols, tall) for images in (most, 1)}
    yield from sorted(found)


LAUNCH, WAVE, SLAB = 2530.0, 1090.0, 1100.0
"""Cycles: of any call; of a wave of blocks; of each slab after the first, which nothing hides.

These and the ones below are fitted to 304 configurations of 19 layers (1x1 and 3x3, batch 1, fp32, 90% zeros) on an
H100: 12% off (root mean square of the logarithm), 13% for a layer that is left out."""
WAVEFRONT, ISSUE, BYTE, STORED, EXCHANGE = 0.97, 0.35, 0.011, 0.042, 6.0
"""Cycles of a multiprocessor: of 128 bytes of shared memory; of an instruction; of a byte of L2; of a byte of sums that
become outputs; of 32 sums that go to another block."""
PAIR, STEP, ROW = 40.0, 93.0, 139.0
"""Cycles that a warp takes for two nonzeros, a step of a program, and the beginning of an output channel in a slab, if
nothing else hinders it."""
HIDDEN = 0.75
"""Of what happens beside something that takes longer, the share that costs no time."""
CROWD, SPARSE = 0.77, 0.7
"""How many blocks more than its share the busiest multiprocessor gets, where blocks do not come out even and there is
room: beside blocks of the call before, new ones go where they fit.  Calls with fewer blocks than the second number for
each multiprocessor find empty ones."""


def _seconds(layer: Layer, config: EscortCudaConfig, device: Device) -> float:
    """A model in cycles of one SM, good enough to order configurations; infinite where it does not fit."""
    shape, patch, density = layer.shape, patch_of(layer.shape, config), layer.weights.density
    channels = shape.c / shape.groups / config.split
    slabs = math.ceil(channels / config.slab)
    rows = min(shape.k / shape.groups / config.blocks, config.positions)
    nonzeros = rows * channels * shape.r * shape.s * density
    steps = nonzeros
    if config.mode == "taps":
        wavefronts = nonzeros * (config.pixels * patch.conflict + 0.5)
        instructions = nonzeros * (2 * config.pixels + 3)
        # In every slab an output channel has an odd nonzero half of the time.
        chain = PAIR / 2 * (nonzeros / config.warps + config.rows * slabs / 2) + ROW * config.rows * slabs
    else:
        reach = (config.pixels - 1) * shape.stride[0] + shape.r
        windows = config.warps * channels * shape.s * (1 - (1 - density) ** (shape.r * rows / config.warps))
        steps += windows
        wavefronts = nonzeros + windows * (reach * patch.conflict + 1)
        instructions = nonzeros * (config.pixels + 6) + windows * (reach + 7)
        chain = STEP * steps / config.warps
    chunk = 4 * (config.positions + 8) + 8 * steps / slabs * 1.25 + 64
    tile = FLOAT * patch.floats(config.slab + (config.mode == "taps"))
    shared = config.shared_bytes(tile, int(chunk))
    if shared > device.shared_bytes:
        return math.inf
    together = resident(shared, config.warps, config.registers)
    if not together:
        return math.inf
    blocks = config.count(shape) * config.blocks * shape.groups * config.split
    share = blocks / reached(device.num_sms, config.split)
    waves = math.ceil(math.ceil(share) / together)
    crowded = SPARSE < share < math.ceil(share) < together
    per_sm = math.ceil(share) + (CROWD if crowded else 0.0)
    copies = config.images * patch.rows * patch.vectors * channels / LANES  # by a warp
    instructions += copies * 5
    sums = config.positions * config.pixels  # of a lane
    work = _beside(waves * chain, per_sm * max(WAVEFRONT * wavefronts, ISSUE * instructions))
    bytes_read = copies * LANES * patch.wide * FLOAT + chunk * slabs
    moved = BYTE * bytes_read + STORED * sums * LANES * FLOAT / config.split + EXCHANGE * sums * (config.split > 1)
    return (LAUNCH + waves * (WAVE + SLAB * (slabs - 1)) + work + per_sm * moved) / CLOCK


def _beside(one: float, other: float) -> float:
    """Cycles of two things at once."""
    return max(one, other) + (1 - HIDDEN) * min(one, other)


# -- weights and code -----------------------------------------------------------------------------------
def pack(layer: Layer, weight: Tensor, bias: Tensor | None, config: EscortCudaConfig) -> EscortCudaPacked:
    shape, patch = layer.shape, patch_of(layer.shape, config)
    chunks = StretchedChunks.of(
        weight.detach().reshape(shape.weight_shape),
        torch.zeros(shape.k) if bias is None else bias.detach(),
        shape.groups,
        Deal(config.blocks, config.warps, config.rows),
        Places(patch.taps(shape), patch.channel * FLOAT, config.slab),
        programs=config.mode == "windows",
    )
    return EscortCudaPacked(layer, config, chunks)


def expression(shape: ConvShape, config: EscortCudaConfig, precision: Precision, tail: Epilogue) -> str:
    """The template instance; the bias makes no difference to it."""
    patch = patch_of(shape, config)
    _, down, across = config.tiles(shape)
    tile = (config.images, config.strips, config.cols, config.pixels, across, down)
    sizes = (patch.rows, patch.vectors, patch.wide, patch.pitch, patch.image, patch.channel, patch.first, patch.lead)
    place = "no" if tail.residual == "none" else tail.residual
    arguments = (
        TYPES[precision],
        f"zeroskip::escort::Mode::{config.mode}",
        f"zeroskip::escort::Tile<{', '.join(map(str, tile))}>",
        f"zeroskip::escort::Patch<{', '.join(map(str, (*sizes, *shape.stride, patch.phase)))}>",
        f"{config.rows}, {config.warps}, {config.blocks if shape.groups > 1 else 0}, {config.split}",
        f"zeroskip::Activation::{tail.activation}",
        f"zeroskip::Residual::{place}",
    )
    return f"zeroskip::escort::conv<{', '.join(arguments)}>"


def build(packed: EscortCudaPacked, device: Device) -> bytes:
    layer = packed.layer
    text = expression(layer.shape, packed.config, layer.precision, layer.epilogue)
    return compile_kernel(KERNEL, text, device.arch)


def instances() -> Sequence[Instance]:
    """Usual layers and the extremes of the configurations, for CI."""
    small = ConvShape(1, 256, 14, 14, 256, 3, 3, padding=(1, 1))
    large = ConvShape(1, 64, 56, 56, 64, 3, 3, padding=(1, 1))
    tail = Epilogue(True, "relu", "before")
    chosen = [
        (small, EscortCudaConfig("taps", 1, 2, 14, 7, 1, 16, 2, 32, 1, 16, 8)),
        (large, EscortCudaConfig("taps", 1, 1, 28, 14, 1, 8, 4, 16, 2, 8)),
        (replace(large, stride=(2, 2)), EscortCudaConfig("taps", 1, 1, 28, 7, 4, 8, 1, 16, 2, 8)),
        (replace(small, n=8, h=7, w=7), EscortCudaConfig("taps", 4, 1, 7, 7, 8, 8, 1, 16, 3, 8)),
        (replace(small, n=8, h=7, w=7), EscortCudaConfig("taps", 1, 4, 7, 2, 8, 16, 1, 16, 2, 8, 4)),
        (large, EscortCudaConfig("windows", 1, 1, 28, 14, 8, 4, 4, 16, 2, 8)),
        (large, EscortCudaConfig("windows", 1, 1, 28, 14, 8, 12, 4, 16, 2, 8, 8)),
        (small, EscortCudaConfig("windows", 1, 2, 14, 7, 16, 4, 2, 16, 2, 8, 2)),
        (replace(small, stride=(2, 2)), EscortCudaConfig("windows", 1, 2, 7, 7, 16, 8, 1, 16, 2, 8)),
    ]
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    texts = [expression(*one, precision, tail) for one in chosen for precision in precisions]
    texts.append(expression(*chosen[0], "bf16", Epilogue()))
    return [Instance(KERNEL, text) for text in texts]


class EscortCudaRun:
    workspace_bytes = 0
    allocates = False

    def __init__(self, packed: EscortCudaPacked, built: bytes, device: Device) -> None:
        config, shape, weight = packed.config, packed.layer.shape, packed.weight
        patch = patch_of(shape, config)
        tile_bytes = FLOAT * patch.floats(config.slab + (config.mode == "taps"))
        self.shared_bytes = config.shared_bytes(tile_bytes, weight.chunk_bytes)
        if self.shared_bytes > device.shared_bytes:
            raise Unsupported(f"a block would need {self.shared_bytes} bytes of shared memory: {config}")
        if config.split > 1 and device.generation < CLUSTERS:
            raise Unsupported(f"{device.name} has no clusters: {config}")
        self.kernel, self.tables = load(built), (weight.heads, weight.chunks)
        self.grid = (config.count(shape), config.blocks * shape.groups, config.split)
        self.block = (config.threads, 1, 1)
        self.cluster = (1, 1, config.split) if config.split > 1 else None
        self.sizes = (
            *(shape.c // shape.groups, config.slab, weight.slabs, config.stages),
            *(tile_bytes // 16, weight.chunk_bytes // 16),
            *(shape.n, shape.h, shape.w, shape.p, shape.q),
            *(-shape.padding[0], 0 if patch.whole else -shape.padding[1] - patch.first),
        )

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        x, y = inputs[0], outputs[0]
        more = (0, 0, 0) if residual is None else residual.stride()[:3]
        self.kernel.launch(
            self.grid,
            self.block,
            (*self.tables, x, y, residual, *self.sizes, *x.stride()[:3], *y.stride()[:3], *more),
            shared_bytes=self.shared_bytes,
            cluster=self.cluster,
            dependent=True,
        )
        return outputs
