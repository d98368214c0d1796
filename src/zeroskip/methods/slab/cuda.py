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
from zeroskip.core.layer import PRECISION_BYTES, ConvShape, Layer, Precision
from zeroskip.cuda import pixels
from zeroskip.cuda.compile import Instance
from zeroskip.cuda.compile import build as compile_kernel
from zeroskip.cuda.launch import boxes, load
from zeroskip.cuda.limits import CLOCK, CLUSTERS, MOST_BLOCKS, reached, resident
from zeroskip.cuda.types import TYPES
from zeroskip.pack.slabs import Slabs

Mode = Literal["boxes", "runs", "vectors", "gather"]
KERNEL = Path(__file__).with_name("kernel.cuh")
FLOAT = 4
LINE = 128
"""Bytes: what parts of shared memory are multiples of."""
CONTROL = 2 * LINE
"""Bytes of arrivals and counts."""
MOST_CLUSTER = 8
"""Blocks of a cluster that every GPU with clusters can run."""
SPILL_BUDGET = 56
"""Bytes, of some instances."""
MOST_BOX = 256
"""Elements of a box along each dimension."""


@dataclass(frozen=True)
class SlabConfig:
    """Tile of a block and of a thread; see ``kernel.cuh``.

    ``mode`` says how a tile of x is copied.  ``lanes`` threads of a subwarp hold ``pieces`` pieces of ``wide`` columns
    of each of ``rows`` rows; ``warps`` of a block; ``slab`` input channels at a time, ``stages`` of them under way;
    ``blocks`` of rows; ``split`` blocks of a cluster share the input channels, ``mates`` what they copy of x.
    """

    mode: Mode
    wide: int
    lanes: int
    pieces: int
    rows: int
    warps: int
    slab: int
    stages: int
    blocks: int
    split: int = 1
    mates: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("boxes", "runs", "vectors", "gather"):
            raise ValueError(f"mode must be boxes, runs, vectors or gather, got {self}")
        if self.wide != 4 and (self.mode != "runs" or self.wide != 1):
            raise ValueError(f"pieces are 4 columns wide, in runs 1 or 4, got {self}")
        if self.lanes not in (8, 16, 32):
            raise ValueError(f"lanes must be 8, 16 or 32, got {self}")
        if self.stages not in range(1, 9 if self.engine else 5):
            raise ValueError(f"stages must be 1 to 8, or 1 to 4 where threads copy, got {self}")
        if min(self.pieces, self.rows, self.warps, self.slab, self.blocks) < 1 or self.warps > 32:
            raise ValueError(f"sizes must be positive and warps at most 32, got {self}")
        if self.split not in (1, 2, 4, 8) or self.mates not in (1, 2, 4, 8) or self.split * self.mates > MOST_CLUSTER:
            raise ValueError(f"split and mates must be 1, 2, 4 or 8, and at most {MOST_CLUSTER} together, got {self}")
        if self.positions % self.split or self.blocks % self.mates:
            raise ValueError(f"split must divide {self.positions} rows of a block, and mates the blocks, got {self}")
        if self.mates > 1 and (not self.engine or (self.mode == "boxes" and self.slab % self.mates)):
            raise ValueError(f"mates share runs, or boxes whose channels they divide, got {self}")
        if self.mode == "boxes" and max(self.cols, self.slab) > MOST_BOX:
            raise ValueError(f"a box has at most {MOST_BOX} columns and channels, got {self}")
        if self.sums > 128:
            raise ValueError(f"a thread would hold {self.sums} sums in registers, at most 128: {self}")
        threads = 32 * self.warps
        if threads % self.cols:
            raise ValueError(f"{threads} threads do not divide among {self.cols} columns: {self}")

    @property
    def engine(self) -> bool:
        """Whether the copy engine brings x."""
        return self.mode in ("boxes", "runs")

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
        """Of columns: images, strips of each, or strips of pixels of all images."""
        image = shape.p * shape.q
        return shape.n * -(-image // self.cols) if self.engine else -(-shape.n * image // self.cols)

    def pitch(self, shape: ConvShape) -> int:
        """Elements from channel to channel of a tile."""
        return shape.p * shape.q if self.mode == "runs" else self.cols

    def expression(self, precision: Precision) -> str:
        sizes = ", ".join(map(str, (self.wide, self.lanes, self.pieces, self.rows, self.warps)))
        return f"zeroskip::slab::spmm<{TYPES[precision]}, zeroskip::slab::Mode::{self.mode}, {sizes}>"

    def shared_bytes(self, pitch: int, chunk_bytes: int, item: int) -> int:
        """Dynamic shared memory of a block for elements of ``item`` bytes; the last term is what a load behind the last
        pixel may touch."""
        stages = self.stages * (_lines((self.slab + 1) * pitch * item) + _lines(chunk_bytes))
        exchange = self.positions * self.cols * FLOAT
        most = stages + exchange if self.split > 1 else max(stages, exchange)
        return CONTROL + _lines((self.positions + 1) // 2 * 16) + most + self.cols * item


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE


@dataclass(frozen=True)
class SlabPacked:
    weight: Slabs
    config: SlabConfig
    precision: Precision
    weight_shape: tuple[int, int, int, int]
    groups: int


# -- configurations -----------------------------------------------------------------------------------


def check(layer: Layer, config: SlabConfig) -> None:
    """Raises ``ValueError`` where ``config`` does not fit the layer."""
    shape, image, item = layer.shape, layer.shape.p * layer.shape.q, PRECISION_BYTES[layer.precision]
    if config.mode != "gather" and shape.stride != (1, 1):
        raise ValueError(f"a layer of stride {shape.stride} reads no neighbouring pixels: {config}")
    if config.mode == "runs":
        if image > config.cols:
            raise ValueError(f"an image has {image} pixels, more than the {config.cols} of a tile: {config}")
        if config.slab * image * item % 16 or shape.c * image * item % 16:
            raise ValueError(f"runs of {config.slab} or {shape.c} channels of {image} pixels are no 16 bytes: {config}")
    if config.mode == "boxes" and config.slab // config.mates * config.cols * item % LINE:
        raise ValueError(f"the box of each of {config.mates} mates is no multiple of {LINE} bytes: {config}")
    multiple = 1 if config.mode == "gather" or config.wide == 1 else alignment(config, layer.precision)
    if image % multiple:
        raise ValueError(f"an image of {image} pixels is no multiple of {multiple}: {config}")
    if not shape.k <= config.blocks * config.positions or config.blocks > MOST_BLOCKS:
        raise ValueError(f"{shape.k} rows do not fit {config.blocks} blocks of {config.positions}: {config}")
    slabs = math.ceil(shape.c / config.slab)
    if config.mates > 1 and math.ceil(slabs / config.split) > config.stages:
        raise ValueError(f"{slabs} slabs do not fit {config.stages} stages, which mates use once: {config}")
    if config.split > slabs or (config.stages == 1 and math.ceil(slabs / config.split) > 1 and not config.engine):
        raise ValueError(f"{slabs} slabs do not fit {config.split} blocks of {config.stages} stages: {config}")


def alignment(config: SlabConfig, precision: Precision) -> int:
    """Elements that planes are multiples of: vectors of 4, or what the copy engine takes."""
    return 16 // PRECISION_BYTES[precision] if config.mode == "boxes" else 4


NEXT_OF_KIND = 0.06
"""Of the estimate: how much later each further configuration of a kind is tried.  The estimate is right to 20%, kinds
differ by more than that in what it does not know, so the likeliest of every kind come first."""


def configs(layer: Layer, device: Device) -> list[tuple[float, SlabConfig]]:
    """Estimated seconds and configuration, in the order to try."""
    menu = dict.fromkeys(_menu(layer, device))
    found = sorted(((_seconds(layer, config, device), config) for config in menu), key=lambda one: one[0])
    kinds: dict[tuple[object, ...], int] = {}
    order = []
    for seconds, config in found:
        kind = (config.mode, config.wide, config.lanes, config.pieces, config.split, config.mates)
        kinds[kind] = kinds.get(kind, -1) + 1
        order.append((seconds * (1 + NEXT_OF_KIND * kinds[kind]), seconds, config))
    return [(seconds, config) for late, seconds, config in sorted(order, key=lambda one: one[0]) if late < math.inf]


def _menu(layer: Layer, device: Device) -> Iterator[SlabConfig]:
    shape = layer.shape
    image, newer = shape.p * shape.q, device.generation >= CLUSTERS
    tiles: list[tuple[Mode, int, int, int]] = []
    mode: Mode = "vectors" if shape.stride == (1, 1) and image % 4 == 0 else "gather"
    for lanes, pieces in itertools.product((8, 16, 32), (1, 2)):
        tiles += [(mode, 4, lanes, pieces)]
        if newer and mode == "vectors":
            tiles += [("boxes", 4, lanes, pieces)]
    if newer and image <= 64:
        tiles.append(("runs", 1, 32, -(-image // 32)))
    if newer and 64 < image <= 256:
        tiles.append(("runs", 4, 32, -(-image // 128)))
    clusters = [(1, 1)]
    if newer:
        clusters += [(split, 1) for split in (2, 4, 8)]
    if device.arch.endswith("a"):
        clusters += [(1, mates) for mates in (2, 4, 8)]
    for tile, rows, warps, (split, mates) in itertools.product(tiles, (1, 2, 4, 8), (4, 8, 16), clusters):
        if rows > 2 and split * mates > 1:
            continue
        engine = tile[0] in ("boxes", "runs")
        most = math.ceil(shape.c / split)
        for parts in sorted({1, 2, 4, *(math.ceil(most / length) for length in (32, 64, 96, 128))}):
            slab = math.ceil(most / parts / 8) * 8
            for stages in {min(number, parts) for number in ((2, 3, 4, 8) if engine else (2, 3))}:
                try:
                    config = SlabConfig(*tile, rows, warps, slab, stages, mates, split, mates)
                except ValueError:
                    continue
                fewest = -(-shape.k // config.positions)
                # Enough blocks for every SM, if that is not many more than the rows need.
                full = reached(device.num_sms, split * mates) // (config.tiles(shape) * split)
                for blocks in {fewest, full} if fewest < full <= 2 * fewest else {fewest}:
                    crowded = config.tiles(shape) * blocks * split > 2 * device.num_sms
                    if blocks < mates or (crowded and split * mates > 1):
                        continue  # clusters are for layers that do not fill the GPU
                    chosen = replace(config, blocks=math.ceil(blocks / mates) * mates)
                    try:
                        check(layer, chosen)
                    except ValueError:
                        continue
                    yield chosen


@dataclass(frozen=True)
class _Cycles:
    """What things take, fitted to 4,349 timed configurations of 18 layers on an H100 (root mean square error 20%)."""

    wave: float
    """Of blocks, and with it the launch."""
    slab: float
    """Each slab that is not under way from the start."""
    pair: float
    """Of nonzeros, of those that a warp takes one after the other."""
    wavefront: float
    """128 bytes from shared memory."""
    issue: float
    """Of an instruction, of four schedulers."""
    byte: float
    """From L2."""
    exchange: float
    """Of 32 sums with the other blocks of a cluster."""
    gather: float = 0.0
    """A step of the block that copies element by element."""


ENGINE = _Cycles(4558, 451, 40, 0.75, 0.095, 0.0022, 9.8)
THREADS = _Cycles(4576, 1027, 45, 0.72, 0.14, 0.0053, 7.4, 902)


def _seconds(layer: Layer, config: SlabConfig, device: Device) -> float:
    """A rough model in cycles of one SM, good enough to order candidates; infinite where it does not fit."""
    shape, item = layer.shape, PRECISION_BYTES[layer.precision]
    slabs = math.ceil(math.ceil(shape.c / config.slab) / config.split)
    rows = min(shape.k / config.blocks, config.positions)
    nonzeros = rows * shape.c / shape.groups * layer.weights.density / config.split
    chunk = 4 * (config.positions + 4) + 8 * nonzeros / slabs * 1.25 + 64
    shared = config.shared_bytes(config.pitch(shape), int(chunk), item)
    if shared > device.shared_bytes:
        return math.inf
    registers = 64 if config.sums <= 8 else 80 if config.sums <= 16 else 96 if config.sums <= 32 else 128
    together = resident(shared, config.warps, registers)
    if not together:
        return math.inf
    sms = reached(device.num_sms, config.split * config.mates)
    per_sm = math.ceil(config.tiles(shape) * config.blocks * config.split / sms)
    waves = math.ceil(per_sm / together)
    # The subwarps of a warp wait for the longest row among them: of a slab that is a matter of chance.
    subwarps, mean = 32 // config.lanes, nonzeros / rows / slabs
    spread = 0.15 if slabs * config.split == 1 else 0.5 * math.sqrt(mean) / max(mean, 1.0)
    pairs = (nonzeros / 2 + rows * slabs / 4) / subwarps * (1 + spread * math.log2(subwarps))
    tile = shape.c / config.split * config.pitch(shape) * item
    used = min(config.cols, shape.p * shape.q) / config.cols if config.engine else 1.0
    words = config.wide * item / 4 if config.wide == 4 else 1.0
    wavefronts = pairs * (2 * words * config.pieces * used + 1)
    instructions = pairs * (5 + 2 * config.pieces * (1 + config.wide * (2 if item == 2 else 1)))
    cost = ENGINE if config.engine else THREADS
    under_way = config.stages if config.engine else 1
    cycles = waves * (cost.wave + cost.slab * max(0, slabs - under_way) + cost.pair * pairs / config.warps)
    cycles += per_sm * (cost.wavefront * wavefronts + cost.issue * instructions)
    cycles += per_sm * cost.byte * (tile / config.mates + chunk * slabs)
    if config.split > 1:
        cycles += per_sm * cost.exchange * config.positions * config.cols / 32
    if config.mode == "gather":
        cycles += waves * cost.gather * tile / item / (1024 * config.warps)
    return cycles / CLOCK


# -- weights and code ------------------------------------------------------------------------------------
def pack(layer: Layer, weight: Tensor, bias: Tensor | None, config: SlabConfig) -> SlabPacked:
    shape = layer.shape
    bias = torch.zeros(shape.k) if bias is None else bias.detach().float()
    pitch = config.pitch(shape) * PRECISION_BYTES[layer.precision]
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
        SlabConfig("boxes", 4, 8, 1, 1, 8, 128, 1, 1),
        SlabConfig("boxes", 4, 32, 2, 8, 16, 64, 2, 1),
        SlabConfig("runs", 4, 32, 2, 4, 8, 128, 1, 1),
        SlabConfig("runs", 1, 32, 2, 8, 8, 128, 1, 1),
        SlabConfig("runs", 1, 32, 1, 1, 4, 128, 1, 1),
        SlabConfig("vectors", 4, 32, 2, 8, 16, 64, 2, 1),
        SlabConfig("gather", 4, 8, 2, 4, 4, 64, 2, 1),
    ]
    names = [config.expression(precision) for config in chosen for precision in ("fp32", "fp16")]
    # 64 registers are a little few for one row of two pieces, whose addresses then wait on the stack.  With more,
    # half as many warps would hide each other's latency.
    two_pieces = [
        SlabConfig("boxes", 4, 32, 2, 1, 16, 64, 1, 1),
        SlabConfig("boxes", 4, 8, 2, 1, 4, 64, 1, 1),
        SlabConfig("runs", 4, 32, 2, 1, 16, 64, 1, 1),
    ]
    return [
        *(Instance(KERNEL, name) for name in [*names, chosen[0].expression("bf16")]),
        *(Instance(KERNEL, config.expression("fp32"), SPILL_BUDGET) for config in two_pieces),
    ]


class SlabRun:
    workspace_bytes = 0
    allocates = False

    def __init__(self, layer: Layer, packed: SlabPacked, built: bytes, device: Device) -> None:
        self.kernel, self.packed = load(built), packed
        config, shape, weight = packed.config, layer.shape, packed.weight
        item = PRECISION_BYTES[layer.precision]
        self.shared_bytes = config.shared_bytes(config.pitch(shape), weight.chunk_bytes, item)
        if self.shared_bytes > device.shared_bytes:
            raise Unsupported(f"a block would need {self.shared_bytes} bytes of shared memory: {config}")
        self.grid = (config.tiles(shape), config.blocks, config.split)
        self.cluster = (1, config.mates, config.split) if config.split * config.mates > 1 else None
        self.block = (32 * config.warps, 1, 1)
        self.sizes = (shape.c, config.slab, weight.slabs, config.stages, weight.chunk_bytes // 16, config.mates)
        self.pixels = pixels.Pixels(layer)
        self.mode = config.mode
        self.box = (1, config.slab // config.mates, config.cols)

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        x, y = inputs[0], outputs[0]
        if self.mode == "runs" and x.stride(1) != x.shape[2] * x.shape[3]:
            x = x.contiguous()
        how = self.pixels.arguments(x, y, residual)
        source = boxes(x.flatten(2), self.box) if self.mode == "boxes" else x
        self.kernel.launch(
            self.grid,
            self.block,
            (self.packed.weight.heads, self.packed.weight.chunks, source, y, residual, *self.sizes, *how),
            shared_bytes=self.shared_bytes,
            cluster=self.cluster,
            dependent=True,
        )
        return outputs
