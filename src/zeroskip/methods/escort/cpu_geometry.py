"""Tiles, panels and vectors: the arithmetic of the CPU kernel, without any code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zeroskip.core.device import MOST_THREADS
from zeroskip.core.layer import Activation, ConvShape, Epilogue, ResidualPlace

FLOAT = 4
CACHE_LINE = 64


@dataclass(frozen=True)
class EscortConfig:
    """How the CPU kernel cuts a layer.

    A tile is ``images x rows x cols`` output pixels of one output channel, in vector registers of ``lanes`` floats.
    ``flat`` treats each image as one long row (1x1, stride 1, no padding).  ``block_channels`` input channels share a
    panel, ``chunks`` pieces of the output channels are separate work items, and ``chains`` independent sums hide the
    latency of the multiply-add where a tile has few vectors.  At most ``threads`` threads work on it: waking a second
    one costs more than a small layer.
    """

    rows: int
    cols: int
    images: int
    lanes: int
    block_channels: int
    chunks: int
    chains: int = 1
    flat: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        if min(self.rows, self.cols, self.images, self.block_channels, self.chunks, self.chains, self.threads) < 1:
            raise ValueError(f"every size of an EscortConfig must be positive, got {self}")
        if self.lanes not in (4, 8, 16):
            raise ValueError(f"lanes must be 4, 8 or 16, got {self.lanes}")
        if self.vectors * self.chains > 30:
            raise ValueError(f"a tile of {self.vectors} vectors x {self.chains} chains exceeds every register file")

    @property
    def image_vectors(self) -> int:
        return -(-self.rows * self.cols // self.lanes)

    @property
    def vectors(self) -> int:
        """Vector registers of one tile."""
        return self.images * self.image_vectors


@dataclass(frozen=True)
class Problem:
    """The layer as the kernel sees it: ``n`` images of ``p x q`` outputs.

    ``strided``: neighbouring pixels are not neighbours in memory (a linear layer, whose rows are the pixels of a
    single image).
    """

    n: int
    c: int
    k: int
    p: int
    q: int
    r: int
    s: int
    stride: tuple[int, int]
    dilation: tuple[int, int]
    strided: bool

    @staticmethod
    def of(shape: ConvShape, linear: bool, flat: bool) -> Problem:
        n, p, q = shape.n, shape.p, shape.q
        if linear:
            n, p, q = 1, 1, shape.n
        elif flat:
            if (shape.r, shape.s, shape.stride, shape.padding) != (1, 1, (1, 1), (0, 0)):
                raise ValueError(f"flat needs a 1x1 convolution of stride 1 without padding, got {shape}")
            p, q = 1, p * q
        return Problem(n, shape.c, shape.k, p, q, shape.r, shape.s, shape.stride, shape.dilation, linear)


@dataclass(frozen=True)
class Piece:
    """Lanes ``lane .. lane + width`` of a vector lie at output ``row``, ``col`` of the tile (width a power of 2)."""

    lane: int
    width: int
    row: int
    col: int


@dataclass(frozen=True)
class Geometry:
    """All that the kernel's text depends on.

    The panel holds, per input channel, one copy of the tile's input pixels for each kernel column and each phase of
    the row stride: ``[phase, kernel column, image, row, col]``.  In such a copy every tap of the kernel is a shift by
    whole rows, so all loads of a tile are contiguous (and aligned where ``cols`` is a multiple of ``lanes``).
    """

    problem: Problem
    config: EscortConfig
    activation: Activation
    residual: ResidualPlace

    def __post_init__(self) -> None:
        problem, config = self.problem, self.config
        limits = {
            "rows": problem.p,
            "cols": problem.q + config.lanes,
            "images": max(problem.n, 1),
            "block_channels": problem.c,
            "chunks": problem.k,
            "threads": MOST_THREADS,
        }
        for name, limit in limits.items():
            if getattr(config, name) > limit:
                raise ValueError(
                    f"{name} is {getattr(config, name)}, this layer allows at most {limit}: {config}, {problem}"
                )

    @staticmethod
    def of(shape: ConvShape, linear: bool, epilogue: Epilogue, config: EscortConfig) -> Geometry:
        return Geometry(Problem.of(shape, linear, config.flat), config, epilogue.activation, epilogue.residual)

    @property
    def phases(self) -> list[int]:
        """Input rows of a tile, modulo the stride, that any tap reads."""
        problem = self.problem
        return sorted({(i * problem.dilation[0]) % problem.stride[0] for i in range(problem.r)})

    def reach(self, phase: int) -> int:
        """Rows of that phase that taps read beyond the tile's own."""
        problem = self.problem
        taps = [i * problem.dilation[0] for i in range(problem.r)]
        return max(tap // problem.stride[0] for tap in taps if tap % problem.stride[0] == phase)

    @property
    def image_floats(self) -> int:
        """From one image to the next inside a panel copy."""
        rows = self.config.rows + max(self.reach(phase) for phase in self.phases)
        return _round_up(rows * self.config.cols, self.config.lanes)

    def copy_floats(self, phase_index: int, kernel_col: int) -> int:
        """Where the panel copy of a phase and kernel column starts."""
        return (phase_index * self.problem.s + kernel_col) * self.config.images * self.image_floats

    @property
    def channel_floats(self) -> int:
        return self.copy_floats(len(self.phases), 0)

    @property
    def panel_bytes(self) -> int:
        # One vector of slack: the last vector of a tile may be partly beyond its rows.
        return _round_up((self.config.block_channels * self.channel_floats + self.config.lanes) * FLOAT, CACHE_LINE)

    @property
    def sums_bytes(self) -> int:
        """Partial sums of a tile for every output channel, needed when the channels take several panels."""
        vectors = self.config.vectors * self.config.lanes * FLOAT
        return _round_up(self.problem.k * vectors, CACHE_LINE)

    @property
    def thread_bytes(self) -> int:
        return self.panel_bytes + self.sums_bytes

    @property
    def tap_bytes(self) -> npt.NDArray[np.int32]:
        """int32 ``[r, s]``: byte offset of each kernel position inside a panel channel."""
        problem, result = self.problem, np.zeros((self.problem.r, self.problem.s), np.int32)
        for i in range(problem.r):
            shift, phase = divmod(i * problem.dilation[0], problem.stride[0])
            for j in range(problem.s):
                result[i, j] = FLOAT * (self.copy_floats(self.phases.index(phase), j) + shift * self.config.cols)
        return result

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Work items: chunks of output channels, groups of images, tile rows, tile columns."""
        problem, config = self.problem, self.config
        return (
            config.chunks,
            -(-problem.n // config.images),
            -(-problem.p // config.rows),
            -(-problem.q // config.cols),
        )

    @property
    def items(self) -> int:
        chunks, images, rows, cols = self.grid
        return chunks * images * rows * cols

    @property
    def aligned(self) -> bool:
        """Whether every vector load from the panel is aligned to its size."""
        return self.config.cols % self.config.lanes == 0

    @property
    def useful(self) -> float:
        """Share of the computed vector lanes that are outputs computed once."""
        _, images, rows, cols = self.grid
        lanes = images * rows * cols * self.config.vectors * self.config.lanes
        return self.problem.n * self.problem.p * self.problem.q / lanes if lanes else 1.0

    def pieces(self, vector: int) -> Iterator[Piece]:
        """What an image's ``vector``-th register holds of the output; lanes beyond the image belong to none."""
        config, problem = self.config, self.problem
        columns, lane = min(config.cols, problem.q), 0
        while lane < config.lanes:
            row, col = divmod(vector * config.lanes + lane, config.cols)
            if row >= min(config.rows, problem.p):
                return
            if col >= columns:
                lane += 1
                continue
            run = 1 if problem.strided else min(columns - col, config.lanes - lane)
            for width in powers_of_two(run):
                yield Piece(lane, width, row, col)
                lane, col = lane + width, col + width


def powers_of_two(total: int) -> list[int]:
    """``total`` as a sum of distinct powers of two, largest first."""
    return [1 << bit for bit in reversed(range(total.bit_length())) if total >> bit & 1]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
