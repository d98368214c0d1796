"""Configurations, packing and the launch of the slab kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported
from zeroskip.core.layer import ConvShape, Layer, Precision
from zeroskip.cuda import pixels
from zeroskip.cuda.compile import Instance
from zeroskip.cuda.compile import build as compile_kernel
from zeroskip.cuda.launch import load
from zeroskip.cuda.types import TYPES
from zeroskip.pack.slabs import Slabs

Mode = Literal["vectors", "runs", "gather"]
KERNEL = Path(__file__).with_name("kernel.cuh")
FLOAT = 4
ARRIVALS = 32
"""Bytes of shared memory."""
MOST_SPLIT = 8
"""Blocks of a cluster that every GPU with clusters can run."""


@dataclass(frozen=True)
class SlabConfig:
    """Tile of a block and of a thread; see ``kernel.cuh``.

    ``mode`` says how a tile of x is copied.  ``lanes`` threads of a subwarp hold ``pieces`` pieces (of 4 columns, of
    one in runs) of each of ``rows`` rows; ``warps`` of a block; ``slab`` input channels at a time, ``stages`` of them
    under way; ``blocks`` of rows; ``split`` blocks of a cluster share the input channels.
    """

    mode: Mode
    lanes: int
    pieces: int
    rows: int
    warps: int
    slab: int
    stages: int
    blocks: int
    split: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("vectors", "runs", "gather"):
            raise ValueError(f"mode must be vectors, runs or gather, got {self}")
        if self.lanes not in (8, 16, 32) or self.stages not in (1, 2, 3, 4):
            raise ValueError(f"lanes must be 8, 16 or 32, stages 1 to 4, got {self}")
        if min(self.pieces, self.rows, self.warps, self.slab, self.blocks) < 1 or self.warps > 32:
            raise ValueError(f"sizes must be positive and warps at most 32, got {self}")
        if self.split not in (1, 2, 4, MOST_SPLIT):
            raise ValueError(f"split must be 1, 2, 4 or {MOST_SPLIT}, got {self}")
        if self.sums > 128:
            raise ValueError(f"a thread would hold {self.sums} sums in registers, at most 128: {self}")
        threads = 32 * self.warps
        if threads % self.cols:
            raise ValueError(f"{threads} threads do not divide among {self.cols} columns: {self}")

    @property
    def wide(self) -> int:
        """Columns of a piece."""
        return 1 if self.mode == "runs" else 4

    @property
    def sums(self) -> int:
        return self.rows * self.pieces * self.wide

    @property
    def cols(self) -> int:
        """Columns that a block has room for."""
        return self.lanes * self.pieces * self.wide

    @property
    def positions(self) -> int:
        """Rows that a block has room for."""
        return self.warps * 32 // self.lanes * self.rows

    def tiles(self, shape: ConvShape) -> int:
        """Of columns: images, or strips of pixels of all images."""
        return shape.n if self.mode == "runs" else -(-shape.n * shape.p * shape.q // self.cols)

    def pitch(self, shape: ConvShape) -> int:
        """Floats from channel to channel of a tile."""
        return shape.p * shape.q if self.mode == "runs" else self.cols

    def expression(self, precision: Precision) -> str:
        sizes = ", ".join(map(str, (self.lanes, self.pieces, self.rows, self.warps)))
        return f"zeroskip::slab::spmm<{TYPES[precision]}, zeroskip::slab::Mode::{self.mode}, {sizes}>"

    def shared_bytes(self, pitch: int, chunk_bytes: int) -> int:
        """Dynamic shared memory of a block; the last term is what a load behind the last pixel may touch."""
        stages = self.stages * (-(-(self.slab + 1) * pitch // 4) * 16 + chunk_bytes)
        exchange = self.positions * self.cols * FLOAT
        return ARRIVALS + (self.positions + 1) // 2 * 16 + max(stages, exchange) + self.cols * FLOAT


@dataclass(frozen=True)
class SlabPacked:
    weight: Slabs
    config: SlabConfig
    precision: Precision
    weight_shape: tuple[int, int, int, int]
    groups: int


# -- configurations -----------------------------------------------------------------------------------
MOST_BLOCKS = 65535
"""Of rows: the second dimension of a grid."""


def check(layer: Layer, config: SlabConfig) -> None:
    """Raises ``ValueError`` where ``config`` does not fit the layer."""
    shape, image = layer.shape, layer.shape.p * layer.shape.q
    if config.mode == "runs" and image > config.cols:
        raise ValueError(f"an image has {image} pixels, more than the {config.cols} of a tile: {config}")
    if config.mode == "runs" and (config.slab * image % 4 or (shape.n > 1 and shape.c * image % 4)):
        raise ValueError(
            f"runs of {config.slab} or {shape.c} channels of {image} pixels are no multiple of 4: {config}"
        )
    if config.mode != "gather" and shape.stride != (1, 1):
        raise ValueError(f"a layer of stride {shape.stride} reads no neighbouring pixels: {config}")
    if config.mode == "vectors" and image % 4:
        raise ValueError(f"an image of {image} pixels is no multiple of 4: {config}")
    if not shape.k <= config.blocks * config.positions or config.blocks > MOST_BLOCKS:
        raise ValueError(f"{shape.k} rows do not fit {config.blocks} blocks of {config.positions}: {config}")
    slabs = math.ceil(shape.c / config.slab)
    if config.split > slabs or (config.stages == 1 and math.ceil(slabs / config.split) > 1):
        raise ValueError(f"{slabs} slabs do not fit {config.split} blocks of {config.stages} stages: {config}")


def configs(layer: Layer, device: Device) -> list[tuple[float, SlabConfig]]:
    """Estimated seconds and configuration, best guess first."""
    found = [(_seconds(layer, config, device), config) for config in dict.fromkeys(_menu(layer, device))]
    return sorted((pair for pair in found if pair[0] < math.inf), key=lambda pair: pair[0])


def _menu(layer: Layer, device: Device) -> Iterator[SlabConfig]:
    shape = layer.shape
    image = shape.p * shape.q
    aligned = shape.stride == (1, 1) and image % 4 == 0
    mode: Mode = "vectors" if aligned else "gather"
    tiles = [(mode, lanes, pieces) for lanes in (8, 16, 32) for pieces in (1, 2)]
    if image <= 64 and shape.stride == (1, 1):
        tiles.append(("runs", 32, -(-image // 32)))
    splits = (1, 2, 4, 8) if device.arch >= "sm_90" else (1,)
    for (mode, lanes, pieces), rows, warps, split in itertools.product(tiles, (1, 2, 4, 8), (4, 8, 16), splits):
        most = math.ceil(shape.c / split)
        for parts in sorted({1, 2, 4, *(math.ceil(most / length) for length in (32, 64, 96, 128))}):
            slab = math.ceil(most / parts / 4) * 4
            for stages in {min(2, parts), min(3, parts)}:
                try:
                    config = SlabConfig(mode, lanes, pieces, rows, warps, slab, stages, 1, split)
                except ValueError:
                    continue
                fewest = -(-shape.k // config.positions)
                # Enough blocks for every SM, if that is not many more than the rows need.
                full = device.num_sms // (config.tiles(shape) * split)
                for blocks in {fewest, full} if fewest < full <= 2 * fewest else {fewest}:
                    chosen = replace(config, blocks=blocks)
                    try:
                        check(layer, chosen)
                    except ValueError:
                        continue
                    yield chosen


SHARED_PER_SM, BLOCKS_PER_SM, WARPS_PER_SM, REGISTERS_PER_SM = 228 * 1024, 32, 64, 65536
CLOCK = 1.7e9
LAUNCH, WAVE, SLAB, PAIR, SPLIT, GATHER = 3100.0, 1500.0, 720.0, 40.0, 1800.0, 600.0
"""Cycles: of any call; of a wave of blocks; of each slab and each pair of nonzeros that a warp takes one after the
other; of meeting in a cluster; of a step of the block that copies element by element.  Fitted to 7,461 timed
configurations of 17 layers on an H100 (root mean square error 16%)."""


def _seconds(layer: Layer, config: SlabConfig, device: Device) -> float:
    """A rough model in cycles of one SM, good enough to order candidates; infinite where it does not fit."""
    shape = layer.shape
    parts = math.ceil(math.ceil(shape.c / config.slab) / config.split)
    rows = min(shape.k / config.blocks, config.positions)
    nonzeros = rows * shape.c / shape.groups * layer.weights.density / config.split
    chunk = 4 * (config.positions + 4) + 8 * nonzeros / parts * 1.25 + 64
    shared = config.shared_bytes(config.pitch(shape), int(chunk))
    if shared > device.shared_bytes:
        return math.inf
    registers = 64 if config.sums <= 8 else 80 if config.sums <= 16 else 96 if config.sums <= 32 else 128
    resident = min(
        SHARED_PER_SM // (shared + 1024),
        WARPS_PER_SM // config.warps,
        BLOCKS_PER_SM,
        REGISTERS_PER_SM // (registers * 32 * config.warps),
    )
    if not resident:
        return math.inf
    per_sm = math.ceil(config.tiles(shape) * config.blocks * config.split / device.num_sms)
    waves = math.ceil(per_sm / resident)
    # The subwarps of a warp wait for the longest row among them: of a slab that is a matter of chance.
    subwarps, mean = 32 // config.lanes, nonzeros / rows / parts
    spread = 0.15 if parts * config.split == 1 else 0.5 * math.sqrt(mean) / max(mean, 1.0)
    pairs = (nonzeros / 2 + rows * parts / 4) / subwarps * (1 + spread * math.log2(subwarps))
    tile = shape.c / config.split * config.pitch(shape)
    one_wave = WAVE + SLAB * parts + PAIR * pairs / config.warps
    if config.mode == "gather":
        one_wave += GATHER * tile / (1024 * config.warps)
    cycles = LAUNCH + waves * one_wave
    cycles += per_sm * (0.85 * pairs * (2 * config.wide * config.pieces + 1) + 0.014 * (FLOAT * tile + chunk * parts))
    if config.split > 1:
        cycles += waves * SPLIT + per_sm * config.positions * config.cols / 4
    return cycles / CLOCK


# -- weights and code ------------------------------------------------------------------------------------
def pack(layer: Layer, weight: Tensor, bias: Tensor | None, config: SlabConfig) -> SlabPacked:
    shape = layer.shape
    bias = torch.zeros(shape.k) if bias is None else bias.detach().float()
    pitch = config.pitch(shape) * FLOAT
    csr = pixels.matrix(weight, shape)
    slabs = Slabs.of(csr, shape.c, bias, config.positions, config.blocks, config.slab, pitch)
    return SlabPacked(slabs, config, layer.precision, shape.weight_shape, shape.groups)


def unpack(packed: SlabPacked) -> Tensor:
    return pixels.grouped(packed.weight.dense(), packed.weight_shape, packed.groups)


def build(packed: SlabPacked, device: Device) -> bytes:
    return compile_kernel(KERNEL, packed.config.expression(packed.precision), device.arch)


def instances() -> Sequence[Instance]:
    """The default and the extremes of the configurations, for CI."""
    chosen = [
        SlabConfig("vectors", 8, 1, 1, 8, 128, 1, 1),
        SlabConfig("gather", 8, 2, 4, 4, 64, 2, 1),
        SlabConfig("vectors", 32, 2, 8, 16, 64, 2, 1),
        SlabConfig("runs", 32, 2, 8, 8, 128, 1, 1),
        SlabConfig("runs", 32, 1, 1, 4, 128, 1, 1),
    ]
    names = [config.expression(precision) for config in chosen for precision in ("fp32", "fp16")]
    return [Instance(KERNEL, name) for name in [*names, chosen[0].expression("bf16")]]


class SlabRun:
    workspace_bytes = 0
    allocates = False

    def __init__(self, layer: Layer, packed: SlabPacked, built: bytes, device: Device) -> None:
        self.kernel, self.packed = load(built), packed
        config, shape, weight = packed.config, layer.shape, packed.weight
        self.shared_bytes = config.shared_bytes(config.pitch(shape), weight.chunk_bytes)
        if self.shared_bytes > device.shared_bytes:
            raise Unsupported(f"a block would need {self.shared_bytes} bytes of shared memory: {config}")
        self.grid = (config.tiles(shape), config.blocks, config.split)
        self.cluster = (1, 1, config.split) if config.split > 1 else None
        self.block = (32 * config.warps, 1, 1)
        self.sizes = (shape.c, config.slab, weight.slabs, config.stages, weight.chunk_bytes // 16)
        self.pixels = pixels.Pixels(layer)
        self.runs = config.mode == "runs"

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        x, y = inputs[0], outputs[0]
        if self.runs and x.stride(1) != x.shape[2] * x.shape[3]:
            x = x.contiguous()
        tables = (self.packed.weight.heads, self.packed.weight.chunks)
        how = self.pixels.arguments(x, y, residual)
        self.kernel.launch(
            self.grid,
            self.block,
            (*tables, x, y, residual, *self.sizes, *how),
            shared_bytes=self.shared_bytes,
            cluster=self.cluster,
            dependent=True,
        )
        return outputs
