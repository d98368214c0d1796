"""Tiles, patches and lanes: the arithmetic of the CUDA kernel, without any code."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from zeroskip.core.layer import ConvShape
from zeroskip.cuda.limits import MOST_BLOCKS, REGISTERS

Mode = Literal["taps", "windows"]
FLOAT = 4
LANES = 32
BANKS = 32
MOST_SPLIT = 8
"""Blocks of a cluster that every GPU with clusters can run."""
WINDOWS = {(8, 14): (1,), (16, 7): (1, 2)}
"""(rows, pixels) of a thread that windows.cuh has code for, and the vertical strides."""
WINDOW_ROWS = 3
"""Of a kernel that windows.cuh has code for."""


@dataclass(frozen=True)
class EscortCudaConfig:
    """How the CUDA kernel cuts a layer; see ``kernel.cuh``.

    A tile is ``images`` x ``strips`` x ``cols`` lanes of a warp, each with ``pixels`` output pixels below each other,
    of each of ``rows`` output channels; ``warps`` of a block.  ``wide`` neighbouring elements of x are copied at a
    time, ``slab`` input channels are computed with at a time, ``stages`` slabs are in shared memory.  The output
    channels of a group are dealt to ``blocks``; ``split`` blocks of a cluster share the input channels.
    """

    mode: Mode
    images: int
    strips: int
    cols: int
    pixels: int
    rows: int
    warps: int
    wide: int
    slab: int
    stages: int
    blocks: int
    split: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("taps", "windows"):
            raise ValueError(f"mode must be taps or windows, got {self}")
        sizes = (self.images, self.strips, self.cols, self.pixels, self.rows, self.warps, self.slab, self.blocks)
        if min(sizes) < 1 or self.images * self.strips * self.cols > LANES:
            raise ValueError(f"sizes must be positive, and images x strips x cols at most {LANES}, got {self}")
        if self.wide not in (1, 2, 4) or self.stages not in (1, 2, 3) or self.split not in (1, 2, 4, MOST_SPLIT):
            raise ValueError(f"wide must be 1, 2 or 4, stages 1 to 3, split 1, 2, 4 or {MOST_SPLIT}, got {self}")
        if self.mode == "windows" and (self.rows, self.pixels) not in WINDOWS:
            raise ValueError(f"rows and pixels of windows must be one of {list(WINDOWS)}, got {self}")
        if self.mode == "taps" and (self.pixels > 16 or self.rows * self.pixels > 64):
            raise ValueError(f"a thread has at most 16 pixels and 64 sums, got {self}")
        if self.positions % self.split:
            raise ValueError(f"split must divide the {self.positions} output channels of a block, got {self}")
        if self.warps > 32 or self.threads * self.registers > REGISTERS:
            raise ValueError(f"{self.warps} warps of {self.registers} registers do not fit a multiprocessor: {self}")

    @property
    def threads(self) -> int:
        return LANES * self.warps

    @property
    def positions(self) -> int:
        """Output channels that a block has room for."""
        return self.warps * self.rows

    @property
    def registers(self) -> int:
        """Of a thread, as in kernel.cuh."""
        if self.mode == "windows":
            return 168
        live = self.rows * self.pixels + 2 * self.pixels
        return 64 if live <= 22 else 80 if live <= 36 else 96 if live <= 52 else 128

    @property
    def down(self) -> int:
        """Rows of output pixels of a tile."""
        return self.strips * self.pixels

    def tiles(self, shape: ConvShape) -> tuple[int, int, int]:
        """Groups of images, and tiles down and across an image."""
        return -(-shape.n // self.images), -(-shape.p // self.down), -(-shape.q // self.cols)

    def count(self, shape: ConvShape) -> int:
        images, down, across = self.tiles(shape)
        return images * down * across

    @property
    def inbox_bytes(self) -> int:
        """Shared memory for the sums that the blocks of a cluster send each other."""
        piece = 4 if self.pixels > 2 else self.pixels
        whole = self.positions * -(-self.pixels // piece) * piece * LANES * FLOAT
        return whole if self.split > 1 else 0

    def shared_bytes(self, tile_bytes: int, chunk_bytes: int) -> int:
        """Dynamic shared memory of a block."""
        heads = (self.positions + 1) // 2 * 16
        return 16 + heads + self.inbox_bytes + self.stages * (tile_bytes + chunk_bytes)


@dataclass(frozen=True)
class Patch:
    """The part of one input channel that a tile meets, in shared memory; every size but ``rows`` in floats.

    ``rows`` rows of ``vectors`` x ``wide`` elements, ``pitch`` apart; ``image`` from one image of the tile to the
    next, ``channel`` from one channel to the next.  The first element of a row stands at ``lead``, the one that the
    first tap of the first lane meets at ``first``.  With a horizontal stride of ``steps``, the elements of a row are
    sorted by their column modulo ``steps``, ``phase`` apart, so that neighbouring outputs meet neighbouring words.

    ``slack``: how far behind the last channel a lane may read.  ``conflict``: lanes that meet in one bank.  ``whole``:
    the rows are rows of the image, without its padding (two rows share the zeros between them); else they begin with
    the padding of a tile.
    """

    whole: bool
    rows: int
    vectors: int
    wide: int
    pitch: int
    image: int
    channel: int
    first: int
    lead: int
    phase: int
    steps: int
    slack: int
    conflict: int

    def floats(self, planes: int) -> int:
        """Of ``planes`` channels, in units of 16 bytes."""
        return -(-(planes * self.channel + self.slack) // 4) * 4

    def taps(self, shape: ConvShape) -> npt.NDArray[np.int32]:
        """int32 ``[r, s]``: bytes from what the first tap meets to what each tap meets."""
        rows, cols = np.arange(shape.r) * shape.dilation[0], np.arange(shape.s) * shape.dilation[1]
        words = rows[:, None] * self.pitch + (cols % self.steps * self.phase + cols // self.steps)
        return (FLOAT * words).astype(np.int32)


def check(shape: ConvShape, config: EscortCudaConfig) -> None:
    """Raises ``ValueError`` where ``config`` does not fit the layer."""
    if config.wide > 1:
        whole = config.cols >= shape.q
        if shape.stride[1] != 1 or shape.w % config.wide or not (whole or config.cols % config.wide == 0):
            raise ValueError(
                f"rows of {shape.w} elements, stride {shape.stride[1]}, are no {config.wide} neighbours: {config}"
            )
    if config.mode == "windows":
        strides = WINDOWS[config.rows, config.pixels]
        if shape.r != WINDOW_ROWS or shape.dilation[0] != 1 or shape.stride[0] not in strides:
            raise ValueError(f"windows are for kernels of {WINDOW_ROWS} rows and strides {strides}: {config}, {shape}")
    rows, channels = shape.k // shape.groups, shape.c // shape.groups
    if rows > config.blocks * config.positions or config.blocks * shape.groups > MOST_BLOCKS:
        raise ValueError(
            f"{shape.groups} times {rows} output channels do not fit {config.blocks} blocks of {config.positions}, "
            f"{MOST_BLOCKS} in all: {config}"
        )
    slabs = -(-channels // config.slab)
    if config.split > slabs or (config.stages == 1 and slabs > config.split):
        raise ValueError(f"{slabs} slabs do not fit {config.split} blocks of {config.stages} stages: {config}")


def patch_of(shape: ConvShape, config: EscortCudaConfig) -> Patch:
    """The patch of a tile with the fewest bank conflicts, and of those the smallest."""
    adjacent = config.mode == "taps"
    strip_rows = (1 if adjacent else config.pixels) * shape.stride[0]
    pixel_rows = (config.strips if adjacent else 1) * shape.stride[0]
    sides = (shape.w, shape.r, shape.s, shape.stride, shape.dilation, shape.padding[1], config.cols >= shape.q)
    lanes = (config.images, config.strips, config.cols, strip_rows, (config.pixels - 1) * pixel_rows)
    return _patch(*sides, config.wide, lanes)


@functools.lru_cache(1024)
def _patch(
    w: int,
    r: int,
    s: int,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: int,
    all_columns: bool,
    wide: int,
    lanes: tuple[int, int, int, int, int],
) -> Patch:
    images, strips, cols, strip_rows, below = lanes
    rows = (strips - 1) * strip_rows + below + (r - 1) * dilation[0] + 1
    steps, reach = stride[1], (s - 1) * dilation[1]
    wanted = (cols - 1) * steps + reach + 1
    phase = -(-wanted // steps)
    whole = all_columns and steps == 1
    if whole:
        # What lies right of a row is the zeros left of the next one.
        vectors, lead = w // wide, _round_up(padding, wide)
        first, narrowest = lead - padding, max(w + padding, reach + 1)
    else:
        first, lead = -padding % wide, 0
        vectors = -(-(first + wanted) // wide)
        narrowest = vectors * wide if steps == 1 else steps * phase
    furthest_col = max(col % steps * phase + col // steps for col in range(0, reach + 1, dilation[1]))

    def made(pitch: int, gap: int) -> Patch:
        tap = (r - 1) * dilation[0] * pitch + furthest_col
        image = rows * pitch + gap
        # No two taps, of one channel or of two, may have the same place.
        channel = _round_up(max(images * image, tap + 1), wide)
        last = (images - 1) * image + ((strips - 1) * strip_rows + below) * pitch + first + cols - 1 + tap
        conflict = _conflict(images, strips, cols, image, strip_rows * pitch)
        slack = max(0, last + 1 - channel)
        return Patch(whole, rows, vectors, wide, pitch, image, channel, first, lead, phase, steps, slack, conflict)

    pitches = range(_round_up(narrowest, wide), _round_up(narrowest, wide) + (BANKS if strips > 1 else 1), wide)
    gaps = range(0, BANKS if images > 1 else 1, wide)
    found = (made(pitch, gap) for pitch in pitches for gap in gaps)
    return min(found, key=lambda patch: (patch.conflict, patch.channel))


def _conflict(images: int, strips: int, cols: int, image: int, strip: int) -> int:
    """The most words that lanes of one load read from one bank."""
    words = {m * image + j * strip + i for m in range(images) for j in range(strips) for i in range(cols)}
    return max(Counter(word % BANKS for word in words).values())


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
