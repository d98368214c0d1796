"""Configurations, packing and the launches of Sputnik's kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.layer import PRECISION_BYTES, PRECISION_DTYPES, Layer, Precision
from zeroskip.cuda import pixels
from zeroskip.cuda.compile import Instance
from zeroskip.cuda.compile import build as compile_kernel
from zeroskip.cuda.launch import load
from zeroskip.cuda.limits import CLOCK, MOST_BLOCKS
from zeroskip.cuda.types import TYPES
from zeroskip.pack.csr import Csr

KERNEL = Path(__file__).with_name("kernel.cuh")
TILE = 32
"""Nonzeros that a subwarp copies to shared memory at a time."""


@dataclass(frozen=True)
class SputnikConfig:
    """Tile of a subwarp; see ``kernel.cuh``.

    ``subwarp`` threads own one row and ``pieces`` vectors of ``vector`` columns each (in a linear layer ``pieces``
    rows of x, and ``vector`` is 1).  ``sparse`` nonzeros are loaded at once: above 1 that needs reverse offset
    alignment.  ``rows`` subwarps make a block.  ``swizzle``: rows sorted by length.
    """

    subwarp: int
    vector: int
    pieces: int
    sparse: int
    rows: int
    swizzle: bool = True

    def __post_init__(self) -> None:
        if self.subwarp not in (8, 16, 32) or self.vector not in (1, 2, 4, 8) or self.sparse not in (1, 2, 4):
            raise ValueError(f"subwarp is 8, 16 or 32, vector 1, 2, 4 or 8, sparse 1, 2 or 4, got {self}")
        if not 1 <= self.pieces <= 8 or not 1 <= self.rows <= 32 or self.subwarp * self.rows > 1024:
            raise ValueError(f"pieces must be 1 to 8, rows 1 to 32 and a block at most 1024 threads, got {self}")
        if TILE % (self.subwarp * self.sparse) and self.subwarp * self.sparse > TILE:
            raise ValueError(
                f"{self.subwarp} threads of {self.sparse} nonzeros copy more than a tile of {TILE}: {self}"
            )

    @property
    def cols(self) -> int:
        """Columns of a subwarp."""
        return self.subwarp * self.vector * self.pieces

    def expression(self, precision: Precision, linear: bool) -> str:
        sizes = [self.subwarp, self.vector, self.pieces, self.sparse, self.rows]
        if linear:
            sizes = [self.subwarp, self.pieces, self.rows]
        kernel = "spmv" if linear else "spmm"
        return f"zeroskip::sputnik::{kernel}<{TYPES[precision]}, {', '.join(map(str, sizes))}>"


@dataclass(frozen=True)
class SputnikPacked:
    """CSR over all input channels: ``row_offsets`` int32 ``[k + 1]``, ``columns`` int32 and ``values`` in the layer's
    dtype ``[nnz + sparse]``, ``row_order`` int32 ``[k]``, ``bias`` float32 ``[k]`` (zeros where the layer has
    none)."""

    row_offsets: Tensor
    row_order: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor
    config: SputnikConfig
    precision: Precision
    linear: bool
    weight_shape: tuple[int, int, int, int]
    groups: int


# -- configurations -----------------------------------------------------------------------------------
def check(layer: Layer, config: SputnikConfig) -> None:
    """Raises ``ValueError`` where ``config`` does not fit the layer."""
    if layer.kind == "linear" and config.vector != 1:
        raise ValueError(f"a linear layer is read one element at a time, got {config}")
    if config.vector * PRECISION_BYTES[layer.precision] > 16:
        raise ValueError(f"{config.vector} numbers of {layer.precision} are more than 16 bytes: {config}")
    shape = layer.shape
    if config.vector > 1 and (shape.stride != (1, 1) or shape.p * shape.q % config.vector):
        raise ValueError(f"{config.vector} neighbouring pixels of {shape} do not lie together: {config}")
    pixels_of_all = shape.n * shape.p * shape.q
    strips = math.ceil(shape.n / config.pieces if layer.kind == "linear" else pixels_of_all / config.cols)
    if strips > MOST_BLOCKS:
        raise ValueError(f"{strips} strips of columns are more than a grid can have ({MOST_BLOCKS}): {config}")


def configs(layer: Layer, device: Device) -> list[SputnikConfig]:
    """In the order to try."""
    found = []
    for config in _linear_menu(layer) if layer.kind == "linear" else _menu():
        try:
            check(layer, config)
        except ValueError:
            continue
        # Heavy rows first is for waves that others follow; where one wave is all, neighbours in W share more of x.
        found.append(replace(config, swizzle=layer.kind == "linear" or _waves(layer, config, device) > 1))
    return sorted(found, key=lambda config: _seconds(layer, config, device))


def _menu() -> Iterator[SputnikConfig]:
    """Tiles of which one was the fastest of 63 for each of 19 layers (Figure 10 in float32 and float16, 2048^3; H100),
    and narrow ones for images of a few pixels.  The estimate tells them apart badly, so they are few enough to be tried
    all."""
    for vector, pieces, rows in itertools.product((1, 2, 4, 8), (1, 2), (4, 8)):
        yield SputnikConfig(32, vector, pieces, 1, rows)
    for vector, pieces in itertools.product((2, 4), (2, 4)):
        yield SputnikConfig(16, vector, pieces, 2, 8)
    for subwarp, vector in ((16, 1), (8, 1), (8, 2)):
        yield SputnikConfig(subwarp, vector, 1, TILE // subwarp, 8)


def _linear_menu(layer: Layer) -> Iterator[SputnikConfig]:
    for subwarp, pieces in itertools.product((8, 16, 32), (1, 2, 4, 8)):
        if pieces == 1 or pieces < 2 * layer.shape.n:
            yield SputnikConfig(subwarp, 1, pieces, 1, 128 // subwarp)


LATENCY_CYCLES = 2000.0
RESIDENT = 8
"""Blocks of a multiprocessor at a time, about."""


def _waves(layer: Layer, config: SputnikConfig, device: Device) -> int:
    shape = layer.shape
    blocks = -(-shape.n * shape.p * shape.q // config.cols) * -(-shape.k // config.rows)
    return -(-blocks // (RESIDENT * device.num_sms))


def _seconds(layer: Layer, config: SputnikConfig, device: Device) -> float:
    """A rough model in cycles of one SM, good enough to order candidates."""
    shape, nnz = layer.shape, layer.weights.nnz
    item = PRECISION_BYTES[layer.precision]
    if layer.kind == "linear":
        strips = -(-shape.n // config.pieces)
        steps = strips * sum_steps(nnz, shape.k, config.subwarp)
        return (steps * (2 + config.pieces) / device.num_sms + LATENCY_CYCLES) / CLOCK
    columns = shape.n * shape.p * shape.q
    strips = -(-columns // config.cols)
    share = config.subwarp / 32  # of a warp
    loads = config.pieces * max(1.0, config.vector * item * 32 / 128)
    work = strips * nnz * share * (loads + 2)
    per_block = config.rows * config.subwarp / 32 * nnz / shape.k * (loads + 3)
    waves = _waves(layer, config, device)
    longest = 2.5 * nnz / shape.k * 6  # cycles that one row takes when it has the SM to itself
    return (max(work / device.num_sms, waves * per_block) + longest + LATENCY_CYCLES) / CLOCK


def sum_steps(nnz: int, rows: int, lanes: int) -> float:
    """Warp steps over all nonzeros when ``lanes`` share a row."""
    return rows * (nnz / rows / lanes + 1.5) * lanes / 32


# -- weights and code ------------------------------------------------------------------------------------
def pack(layer: Layer, weight: Tensor, bias: Tensor | None, config: SputnikConfig) -> SputnikPacked:
    shape = layer.shape
    csr = pixels.matrix(weight, shape)
    lengths = csr.row_offsets.diff()
    order = torch.argsort(-lengths, stable=True) if config.swizzle else torch.arange(shape.k)
    spare = csr.col_indices.new_zeros(config.sparse)
    return SputnikPacked(
        csr.row_offsets.int(),
        order.int(),
        torch.cat([csr.col_indices, spare]).int(),
        torch.cat([csr.values, csr.values.new_zeros(config.sparse)]).to(PRECISION_DTYPES[layer.precision]),
        torch.zeros(shape.k) if bias is None else bias.detach().float().contiguous(),
        config,
        layer.precision,
        layer.kind == "linear",
        shape.weight_shape,
        shape.groups,
    )


def unpack(packed: SputnikPacked) -> Tensor:
    nnz, (k, inputs, _, _) = int(packed.row_offsets[-1]), packed.weight_shape
    csr = Csr((k, inputs * packed.groups), packed.row_offsets, packed.columns[:nnz].long(), packed.values[:nnz])
    return pixels.grouped(csr.dense(), packed.weight_shape, packed.groups)


def build(packed: SputnikPacked, device: Device) -> bytes:
    return compile_kernel(KERNEL, packed.config.expression(packed.precision, packed.linear), device.arch)


def instances() -> Sequence[Instance]:
    """The default and the extremes of the configurations, for CI."""
    found = [
        SputnikConfig(8, 4, 1, 4, 4).expression("fp32", False),
        SputnikConfig(32, 4, 4, 1, 1).expression("fp32", False),
        SputnikConfig(32, 1, 1, 1, 8).expression("fp32", False),
        SputnikConfig(8, 8, 2, 4, 8).expression("fp16", False),
        SputnikConfig(16, 2, 4, 2, 4).expression("bf16", False),
        SputnikConfig(32, 1, 8, 1, 4).expression("fp32", True),
        SputnikConfig(8, 1, 1, 1, 16).expression("fp16", True),
    ]
    return [Instance(KERNEL, expression) for expression in found]


class ConvRun:
    workspace_bytes = 0
    allocates = False

    def __init__(self, layer: Layer, packed: SputnikPacked, built: bytes) -> None:
        self.kernel, self.packed = load(built), packed
        config, shape = packed.config, layer.shape
        strips = -(-shape.n * shape.p * shape.q // config.cols)
        self.grid, self.block = (-(-shape.k // config.rows), strips, 1), (config.subwarp, config.rows, 1)
        self.tables = (packed.row_offsets, packed.row_order, packed.columns, packed.values, packed.bias)
        self.rows = shape.k
        self.pixels = pixels.Pixels(layer)

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        x, y = inputs[0], outputs[0]
        arguments = (*self.tables, x, y, residual, self.rows, *self.pixels.arguments(x, y, residual))
        self.kernel.launch(self.grid, self.block, arguments, dependent=True)
        return outputs


class LinearRun:
    workspace_bytes = 0
    allocates = False

    def __init__(self, layer: Layer, packed: SputnikPacked, built: bytes) -> None:
        self.kernel, self.packed = load(built), packed
        config, shape = packed.config, layer.shape
        self.grid = (-(-shape.k // config.rows), -(-shape.n // config.pieces), 1)
        self.block = (config.subwarp, config.rows, 1)
        self.tables = (packed.row_offsets, packed.row_order, packed.columns, packed.values, packed.bias)
        self.sizes = (shape.k, shape.n)
        self.codes = pixels.Pixels(layer).codes

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        x, y = inputs[0], outputs[0]
        pitches = [0 if tensor is None or tensor.dim() < 2 else tensor.stride(-2) for tensor in (x, y, residual)]
        arguments = (*self.tables, x, y, residual, *self.sizes, *pitches, *self.codes)
        self.kernel.launch(self.grid, self.block, arguments, dependent=True)
        return outputs
