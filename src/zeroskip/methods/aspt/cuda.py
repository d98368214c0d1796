"""Configurations, packing and the launch of the kernel of adaptive sparse tiling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported
from zeroskip.core.layer import PRECISION_BYTES, Layer, Precision
from zeroskip.cuda import pixels
from zeroskip.cuda.compile import Instance
from zeroskip.cuda.compile import build as compile_kernel
from zeroskip.cuda.launch import load
from zeroskip.cuda.limits import CLOCK, MOST_BLOCKS, REGISTERS, resident
from zeroskip.cuda.types import TYPES
from zeroskip.pack.adaptive_panels import (
    FEWEST_HEAVY,
    MOST_NONZEROS,
    AdaptivePanels,
    Order,
    Tiling,
    binomial_heavy,
    header_words,
)

KERNEL = Path(__file__).with_name("kernel.cuh")
HEAD_BYTES = 16


@dataclass(frozen=True)
class AsptConfig:
    """Tile of a block and of a thread (see ``kernel.cuh``), and how the matrix is cut (``Tiling``).

    ``lanes`` threads of a subwarp hold ``pieces`` pieces of ``vector`` columns of each of ``rows`` places; ``warps`` of
    a block.  Panels of ``height`` rows; columns with ``threshold`` nonzeros are heavy, ``tile`` of them come at a time;
    rows with more than ``longest`` nonzeros are divided (0: none is).
    """

    vector: int
    lanes: int
    pieces: int
    rows: int
    warps: int
    height: int
    threshold: int
    tile: int
    longest: int = 0
    order: Order = "dealt"

    def __post_init__(self) -> None:
        if self.vector not in (1, 4, 8) or self.lanes not in (8, 16, 32):
            raise ValueError(f"vector must be 1, 4 or 8, lanes 8, 16 or 32, got {self}")
        if min(self.pieces, self.rows, self.warps) < 1 or self.warps > 32:
            raise ValueError(f"sizes must be positive and warps at most 32, got {self}")
        if self.sums > 64 or self.registers * 32 * self.warps > REGISTERS:
            raise ValueError(
                f"{self.warps} warps whose threads hold {self.sums} sums want more registers than there are: {self}"
            )
        _ = self.tiling  # refuses what it cannot cut

    @property
    def sums(self) -> int:
        return self.rows * self.pieces * self.vector

    @property
    def registers(self) -> int:
        """Of a thread, about: sums, what four nonzeros meet (of 4 bytes at most), and the rest."""
        return -(-(40 + self.sums + 4 * self.pieces * min(self.vector, 4)) // 8) * 8

    @property
    def cols(self) -> int:
        """Columns of a block."""
        return self.lanes * self.pieces * self.vector

    @property
    def positions(self) -> int:
        """Places for rows that a block has."""
        return self.warps * 32 // self.lanes * self.rows

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.positions, self.height, self.threshold, self.tile, self.longest, self.order)

    def expression(self, precision: Precision) -> str:
        sizes = ", ".join(map(str, (self.vector, self.lanes, self.pieces, self.rows, self.warps)))
        return f"zeroskip::aspt::spmm<{TYPES[precision]}, {sizes}, {'true' if self.longest else 'false'}>"

    def tiles_at(self, sections: int, chunk_bytes: int) -> int:
        """Bytes of shared memory before the tiles: the head, and chunks of the section that is computed, of the next
        and of the one that is copied."""
        return HEAD_BYTES * self.positions + min(sections, 3) * chunk_bytes

    def shared_bytes(self, sections: int, chunk_bytes: int, width: int, item: int) -> int:
        """Dynamic shared memory of a block."""
        work = self.tiles_at(sections, chunk_bytes) + min(sections, 2) * width * self.cols * item
        exchange = HEAD_BYTES * self.positions + self.positions * self.cols * 4
        return max(work, exchange) if self.longest else work


@dataclass(frozen=True)
class AsptPacked:
    weight: AdaptivePanels
    config: AsptConfig
    precision: Precision
    weight_shape: tuple[int, int, int, int]
    groups: int


# -- configurations -----------------------------------------------------------------------------------


def check(layer: Layer, config: AsptConfig) -> None:
    """Raises ``ValueError`` where ``config`` does not fit the layer."""
    shape = layer.shape
    if config.vector * PRECISION_BYTES[layer.precision] > 16:
        raise ValueError(f"{config.vector} numbers of {layer.precision} are more than 16 bytes: {config}")
    flat = layer.kind == "conv2d" and shape.stride == (1, 1) and shape.p * shape.q % config.vector == 0
    if config.vector > 1 and not flat:
        raise ValueError(f"{config.vector} neighbouring pixels of {shape} do not lie together: {config}")
    if shape.k > MOST_BLOCKS:  # a panel has at least one row
        raise ValueError(f"{shape.k} rows might need more panels than a grid can have ({MOST_BLOCKS}): {config}")


def configs(layer: Layer, device: Device) -> list[tuple[float, AsptConfig]]:
    """Estimated seconds and configuration: the best guess of each width and threshold, then the others.

    The first ones also with the rows as they are given: what clusters there are is not known here.
    """
    found = [(_seconds(layer, config, device), config) for config in dict.fromkeys(_menu(layer, device))]
    found = sorted((pair for pair in found if pair[0] < math.inf), key=lambda pair: pair[0])
    best: dict[tuple[int, int], AsptConfig] = {}
    for _, config in found:
        best.setdefault((config.cols, config.threshold), config)
    found.sort(key=lambda pair: best[pair[1].cols, pair[1].threshold] != pair[1])
    twins = [(seconds, replace(config, order="given")) for seconds, config in found[:TWINS]]
    first = [pair for both in zip(found[:TWINS], twins, strict=True) for pair in both]
    return [*first, *found[TWINS:]][:MOST_CANDIDATES]


TWINS, MOST_CANDIDATES = 4, 128
THRESHOLDS = (1, 2, 4, 8)


def _menu(layer: Layer, device: Device) -> Iterator[AsptConfig]:
    shape, mean = layer.shape, layer.weights.nnz / layer.shape.k
    columns = shape.n * shape.p * shape.q
    vector = _vector(layer)
    pieces = (1, 2) if vector > 1 else (1, 2, 4)
    # Rows are divided where there are few for all SMs, or where some are much longer than others.
    longest = {0} | {math.ceil(mean / parts / 4) * 4 for parts in (0.75, 2, 4) if mean > 8 * parts}
    for lanes, piece, rows, warps in itertools.product((8, 16, 32), pieces, (1, 2, 4), (4, 8, 16)):
        cols = lanes * piece * vector
        if cols >= 2 * max(columns, 8 * vector):
            continue  # half the threads would have no column
        strips = math.ceil(columns / cols)
        for most in sorted(longest):
            places = shape.k * _parts(layer, most)
            positions = warps * 32 // lanes * rows
            heights = {positions}
            for turns in (1, 2, 4):
                # Panels of which every SM gets the same number, if that leaves not many places empty.
                full = turns * device.num_sms // strips
                if full and positions // 2 < math.ceil(places / full) <= positions:
                    heights.add(math.ceil(places / full))
            for height, threshold in itertools.product(sorted(heights), THRESHOLDS):
                heavy, _ = _heavy(layer, shape.k / math.ceil(places / height), threshold)
                for sections in sorted({1, 2, 4, 8, math.ceil(heavy / 128)}) if heavy else (1,):
                    # A sixth of room for panels that have more heavy columns than most.
                    tile = min(shape.c, math.ceil(heavy * 7 / 6 / sections / 8) * 8 + 8)
                    try:
                        config = AsptConfig(vector, lanes, piece, rows, warps, height, threshold, tile, most)
                        check(layer, config)
                    except ValueError:
                        continue
                    yield config


def _vector(layer: Layer) -> int:
    """The widest vector of columns that this layer's pixels allow."""
    shape, image = layer.shape, layer.shape.p * layer.shape.q
    if layer.kind == "linear" or shape.stride != (1, 1) or image % 4:
        return 1
    return 8 if PRECISION_BYTES[layer.precision] == 2 and image % 8 == 0 else 4


def _parts(layer: Layer, longest: int) -> float:
    """Places that a row takes, about."""
    return max(1.0, layer.weights.nnz / layer.shape.k / longest + 0.5) if longest else 1.0


def _heavy(layer: Layer, rows: float, threshold: int) -> tuple[float, float]:
    """Heavy columns of a panel of so many rows, and the share of nonzeros in them, were the mask random."""
    # Rows of other groups have nothing in common.
    rows_of_group = max(1, round(rows / layer.shape.groups))
    share, held = binomial_heavy(rows_of_group, layer.weights.density, threshold)
    heavy = share * layer.shape.c
    return (heavy, held) if heavy >= FEWEST_HEAVY else (0.0, 0.0)


LAUNCH, WAVE, SECTION, LIGHT, HEAVY, ROW, DIVIDED = 2340.0, 600.0, 950.0, 910.0, 405.0, 130.0, 665.0
"""Cycles: of any call; of a wave of blocks; of each section after the first; of four light and of four heavy nonzeros
that a warp takes one after the other; of the beginning of a place's heavy or light nonzeros in a section; of adding up
divided rows.

All but WAVE, and the two below, are fitted to 157 configurations of 10 layers (1x1, batch 1, fp32, 90% zeros) on an
H100: 14% off (root mean square of the logarithm)."""
WAVEFRONT, COPY = 0.79, 27.5
"""Cycles of a multiprocessor: of 128 bytes of shared memory; of what a warp copies of x at once, from L2."""
ISSUE, LOAD = 1 / 4, 14.0
"""Bounds, not fitted: cycles of an instruction (there are four schedulers); of what a warp loads of x at once, the most
that the one configuration with mainly light nonzeros allows."""


def _seconds(layer: Layer, config: AsptConfig, device: Device) -> float:
    """A model in cycles of one SM, good enough to order configurations; infinite where it does not fit."""
    shape, item = layer.shape, PRECISION_BYTES[layer.precision]
    mean = layer.weights.nnz / shape.k
    panels = math.ceil(shape.k * _parts(layer, config.longest) / config.height)
    nonzeros = layer.weights.nnz / panels
    heavy, held = _heavy(layer, shape.k / panels, config.threshold)
    sections = max(1, math.ceil(heavy / config.tile), math.ceil(nonzeros / MOST_NONZEROS))
    width = math.ceil(heavy / sections)
    chunk = 4 * header_words(config.positions, width) + 8 * (nonzeros * 1.1 + config.positions) / sections
    shared = config.shared_bytes(sections, int(chunk), width, item)
    if shared > device.shared_bytes:
        return math.inf
    together = resident(shared, config.warps, _registers(layer, config, device))
    if not together:
        return math.inf
    strips = math.ceil(shape.n * shape.p * shape.q / config.cols)
    per_sm = math.ceil(strips * panels / device.num_sms)
    waves = math.ceil(per_sm / together)

    # The longest row of a warp is waited for; a divided one is as long as its parts.
    steps = config.rows * min(mean * (1 + layer.weights.row_nnz_cv), config.longest or math.inf) / 4
    begun = config.rows * sections * (1 + (held < 1))
    chain = LIGHT * steps * (1 - held) + HEAVY * steps * held + ROW * begun
    conflicts = 1.5 if config.vector == 1 and config.lanes < 32 else 1.0
    # Two weights to a broadcast.
    wavefronts = ((nonzeros * conflicts + heavy) * config.cols * item + chunk * sections) / 128 + nonzeros / 2
    conversions = config.vector if item == 2 else 0
    loads = config.lanes * config.pieces / 32  # by a warp, of one row of x
    instructions = nonzeros * config.lanes / 32 * (1 + config.pieces * (config.vector + conversions + 2))
    busy = per_sm * max(WAVEFRONT * wavefronts, ISSUE * instructions, LOAD * loads * nonzeros * (1 - held))
    one_wave = WAVE + SECTION * (sections - 1) + (DIVIDED if config.longest else 0.0)
    return (LAUNCH + waves * one_wave + max(waves * chain, busy) + per_sm * COPY * loads * heavy) / CLOCK


def _registers(layer: Layer, config: AsptConfig, device: Device) -> int:
    """Of a thread, so that none is spilled: as in ``kernel.cuh``."""
    converted = 2 * config.pieces * config.vector if layer.precision == "bf16" else 0
    return config.registers + converted + (32 if device.generation >= 100 else 0)


# -- weights and code ------------------------------------------------------------------------------------
def pack(layer: Layer, weight: Tensor, bias: Tensor | None, config: AsptConfig) -> AsptPacked:
    shape = layer.shape
    bias = torch.zeros(shape.k) if bias is None else bias.detach().float()
    pitch = config.cols * PRECISION_BYTES[layer.precision]
    panels = AdaptivePanels.of(pixels.matrix(weight, shape), shape.c, bias, config.tiling, pitch)
    return AsptPacked(panels, config, layer.precision, shape.weight_shape, shape.groups)


def unpack(packed: AsptPacked) -> Tensor:
    return pixels.grouped(packed.weight.dense(), packed.weight_shape, packed.groups)


def build(packed: AsptPacked, device: Device) -> bytes:
    return compile_kernel(KERNEL, packed.config.expression(packed.precision), device.arch)


def instances() -> Sequence[Instance]:
    """The default and the extremes of the configurations, for CI."""
    chosen: list[tuple[Precision, AsptConfig]] = [
        ("fp32", AsptConfig(4, 8, 1, 1, 8, 32, 2, 64)),
        ("fp32", AsptConfig(4, 32, 2, 8, 8, 64, 8, 64)),
        ("fp32", AsptConfig(4, 16, 2, 4, 8, 64, 4, 64, longest=64)),
        ("fp32", AsptConfig(1, 32, 2, 1, 8, 8, 2, 64, longest=32)),
        ("fp32", AsptConfig(1, 8, 4, 4, 16, 256, 2, 64)),
        ("fp32", AsptConfig(1, 32, 1, 1, 32, 32, 2, 64)),
        ("fp16", AsptConfig(8, 8, 1, 1, 8, 32, 2, 64)),
        ("fp16", AsptConfig(8, 32, 2, 4, 8, 32, 2, 64, longest=64)),
        ("fp16", AsptConfig(4, 16, 2, 2, 16, 64, 2, 64)),
        ("fp16", AsptConfig(1, 16, 4, 1, 4, 8, 2, 64)),
        ("bf16", AsptConfig(8, 16, 1, 2, 4, 16, 2, 64)),
        ("bf16", AsptConfig(8, 16, 2, 1, 4, 8, 2, 64, longest=64)),
        ("bf16", AsptConfig(4, 16, 2, 1, 16, 32, 2, 64)),
    ]
    return [Instance(KERNEL, config.expression(precision)) for precision, config in chosen]


class AsptRun:
    workspace_bytes = 0
    allocates = False

    def __init__(self, layer: Layer, packed: AsptPacked, built: bytes, device: Device) -> None:
        self.kernel, self.packed = load(built), packed
        config, shape, weight = packed.config, layer.shape, packed.weight
        item = PRECISION_BYTES[packed.precision]
        self.shared_bytes = config.shared_bytes(weight.sections, weight.chunk_bytes, weight.width, item)
        if self.shared_bytes > device.shared_bytes:
            raise Unsupported(f"a block would need {self.shared_bytes} bytes of shared memory: {config}")
        self.grid = (math.ceil(shape.n * shape.p * shape.q / config.cols), weight.panels, 1)
        self.block = (32 * config.warps, 1, 1)
        tiles = config.tiles_at(weight.sections, weight.chunk_bytes) // 16
        self.sizes = (weight.sections, weight.chunk_bytes // 16, tiles, weight.width)
        self.pixels = pixels.Pixels(layer)
        self.linear_rows = shape.n if layer.kind == "linear" else 0

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        x, y = inputs[0], outputs[0]
        how = self._rows(x, y, residual) if self.linear_rows else self.pixels.arguments(x, y, residual)
        tables = (self.packed.weight.heads, self.packed.weight.chunks)
        arguments = (*tables, x, y, residual, *self.sizes, *how)
        self.kernel.launch(self.grid, self.block, arguments, shared_bytes=self.shared_bytes, dependent=True)
        return outputs

    def _rows(self, x: Tensor, y: Tensor, residual: Tensor | None) -> tuple[int, ...]:
        """Rows of features as images of one pixel."""
        pitches = [0 if tensor is None or tensor.dim() < 2 else tensor.stride(-2) for tensor in (x, y, residual)]
        x_plane, y_plane, r_plane = ((pitch, 1, 0) for pitch in pitches)
        return self.linear_rows, 1, 1, *x_plane, 0, *y_plane, *r_plane, *self.pixels.codes
