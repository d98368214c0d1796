"""Stretched CSR for a GPU: what one block of output channels needs of one slab of input channels lies together.

As in ``pack/stretched.py`` each nonzero carries the byte offset of the pixels it meets; here it points into the tile
that a block of threads has in shared memory.

Source: X. Chen, Escoin: Efficient Sparse Convolutional Neural Network Inference on GPUs, arXiv 1802.10280, section 3,
for the stretched index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroskip.pack.csr import Csr

_Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Places:
    """How a tile lies in shared memory.

    ``taps`` int32 ``[r, s]``: bytes from what the first tap of a kernel meets to what each tap meets, all different;
    ``channel_bytes`` from one channel to the next, more than any of them; ``slab`` channels of a tile.
    """

    taps: _Words
    channel_bytes: int
    slab: int


@dataclass(frozen=True)
class Deal:
    """To whom output channels go: those of each group of the convolution to ``blocks`` blocks of ``warps`` x ``rows``.

    Number ``i`` of warp ``j`` has position ``i * warps + j`` in its block.
    """

    blocks: int
    warps: int
    rows: int

    @property
    def positions(self) -> int:
        return self.warps * self.rows

    def of(self, lengths: _Ints, groups: int) -> tuple[_Ints, _Ints]:
        """Block (those of one group after the other) and position of each row, given the nonzeros of each.

        Longest first, to the blocks in turns and to the warps of each in turns, back and forth.

        Raises:
            ValueError: more rows than there is room for.
        """
        rows = len(lengths) // groups
        if rows > self.blocks * self.positions:
            raise ValueError(f"{rows} rows do not fit {self.blocks} blocks of {self.positions}")
        group = np.arange(len(lengths)) // max(rows, 1)
        order = np.lexsort((-lengths, group))
        turn, at = np.divmod(np.arange(len(lengths)) - group * rows, self.blocks)
        number, warp = np.divmod(turn, self.warps)
        block, position = np.empty_like(order), np.empty_like(order)
        block[order] = group * self.blocks + _back_and_forth(turn, at, self.blocks)
        position[order] = number * self.warps + _back_and_forth(number, warp, self.warps)
        return block, position


@dataclass(frozen=True)
class StretchedChunks:
    """A weight ``[k, c / groups, r, s]``, its output channels dealt to blocks and its input channels cut into slabs.

    ``heads`` int32 ``[groups * blocks, positions (even), 2]``: of each position of a block, the output channel (-1
    where there is none) and the bits of its float32 bias.

    ``chunks`` int32 ``[groups * blocks, slabs, words]``, all as long as the longest.  A chunk begins with an index,
    padded to 16 bytes.  What follows depends on ``programs``:

    Without, it is pairs of nonzeros in order of position, channel and tap, 8 bytes a nonzero: the float32 weight and
    its place in the tile, in bytes.  The index says where the pairs of each position begin, and where all end.  An odd
    nonzero is paired with a zero weight at the place of channel ``slab``, where the kernel keeps zeros.

    With, it is a program for each warp; the index says where each begins, in records of 8 bytes.  A step loads the
    window of one input channel and kernel column (whose place is that of the first kernel row), adds what a weight in
    kernel row ``i`` gives for the warp's output channel ``g`` from the window loaded last, or ends; the codes are
    ``rows * r``, ``g * r + i`` and ``rows * r + 1``.  A record holds the place or the weight of one step and the code
    of the next, so that the kernel knows the way ahead; the first holds the first code only.

    The kernel may read 16 bytes further than it needs, and they are there.
    """

    weight_shape: tuple[int, int, int, int]
    groups: int
    deal: Deal
    slab: int
    channel_bytes: int
    programs: bool
    heads: Tensor
    chunks: Tensor
    taps: Tensor

    @property
    def slabs(self) -> int:
        return self.chunks.shape[1]

    @property
    def chunk_bytes(self) -> int:
        return self.chunks.shape[2] * 4

    @staticmethod
    def of(
        weight: Tensor, bias: Tensor, groups: int, deal: Deal, places: Places, *, programs: bool = False
    ) -> StretchedChunks:
        """Pack ``weight`` ``[k, c / groups, r, s]`` of any float dtype and ``bias`` ``[k]``, both on the CPU."""
        k, channels, r, s = weight.shape
        csr = Csr.of(weight)
        block, position = deal.of(csr.row_offsets.diff().numpy(), groups)
        heads = np.full((groups * deal.blocks, deal.positions + deal.positions % 2, 2), -1, np.int32)
        heads[block, position, 0] = np.arange(k)
        heads[block, position, 1] = bias.float().numpy().view(np.int32)

        row = csr.row_indices.numpy()
        channel, tap = np.divmod(csr.col_indices.numpy(), r * s)
        slabs = -(-channels // places.slab)
        nonzeros = _Nonzeros(
            block[row] * slabs + channel // places.slab,
            position[row],
            channel % places.slab,
            tap,
            csr.values.float().numpy().view(np.int32),
        )
        encode = _programs if programs else _pairs
        chunks = encode(nonzeros, groups * deal.blocks * slabs, deal, places)
        return StretchedChunks(
            (k, channels, r, s),
            groups,
            deal,
            places.slab,
            places.channel_bytes,
            programs,
            torch.from_numpy(heads),
            torch.from_numpy(chunks.reshape(len(heads), slabs, -1)),
            torch.from_numpy(np.ascontiguousarray(places.taps)),
        )

    def dense(self) -> Tensor:
        """float32 ``[k, c / groups, r, s]``: exactly the weights that are computed with."""
        result = np.zeros((*self.weight_shape[:2], self.taps.numel()), np.float32)
        places = Places(self.taps.cpu().numpy(), self.channel_bytes, self.slab)
        chunks, heads = self.chunks.cpu().numpy(), self.heads.cpu().numpy()
        decode = _of_programs if self.programs else _of_pairs
        for block, slab in np.ndindex(chunks.shape[:2]):
            found = decode(chunks[block, slab], self.deal, places)
            rows, channels = heads[block, found.position, 0], found.channel + slab * self.slab
            result[rows, channels, found.tap] = np.ascontiguousarray(found.weight).view(np.float32)
        return torch.from_numpy(result.reshape(self.weight_shape))


def _back_and_forth(turn: _Ints, at: _Ints, count: int) -> _Ints:
    return np.where(turn % 2 == 0, at, count - 1 - at)


@dataclass(frozen=True)
class _Nonzeros:
    """Of each: the number of its chunk, its position in the block, its channel in the slab, its tap, its bits."""

    chunk: _Ints
    position: _Ints
    channel: _Ints
    tap: _Ints
    weight: _Words


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _starts(lengths: _Ints) -> _Ints:
    """Where each of a row of pieces begins, row by row of ``lengths``."""
    return lengths.cumsum(1) - lengths


def _chunks(index: _Ints, words: int) -> tuple[_Words, int]:
    """Chunks with room for ``words`` behind their ``index``, and where that begins."""
    header = _round_up(index.shape[1], 4)
    chunks = np.zeros((len(index), header + _round_up(words, 4) + 4), np.int32)
    chunks[:, : index.shape[1]] = index
    return chunks, header


# -- pairs ----------------------------------------------------------------------------------------------
def _pairs(nonzeros: _Nonzeros, count: int, deal: Deal, places: Places) -> _Words:
    owner = nonzeros.chunk * deal.positions + nonzeros.position
    order = np.lexsort((nonzeros.tap, nonzeros.channel, owner))
    owner = owner[order]
    counts = np.bincount(owner, minlength=count * deal.positions)
    pairs = -(-counts // 2).reshape(count, deal.positions)
    first = _starts(pairs)
    index = np.column_stack([first, pairs.sum(1)])
    chunks, header = _chunks(index, 4 * int(index[:, -1].max()))
    chunks[:, header + 1 :: 2] = places.slab * places.channel_bytes
    at = header + 2 * (2 * first.reshape(-1)[owner] + np.arange(len(owner)) - (counts.cumsum() - counts)[owner])
    chunks[nonzeros.chunk[order], at] = nonzeros.weight[order]
    taps = places.taps.reshape(-1)
    chunks[nonzeros.chunk[order], at + 1] = (nonzeros.channel * places.channel_bytes + taps[nonzeros.tap])[order]
    return chunks


def _of_pairs(chunk: _Words, deal: Deal, places: Places) -> _Nonzeros:
    index = chunk[: deal.positions + 1].astype(np.int64)
    header = _round_up(len(index), 4)
    weight, place = chunk[header : header + 4 * index[-1]].reshape(-1, 2).T
    position = np.arange(deal.positions).repeat(2 * np.diff(index))
    real = place < places.slab * places.channel_bytes
    channel, within = np.divmod(place[real].astype(np.int64), places.channel_bytes)
    return _Nonzeros(channel * 0, position[real], channel, _found(places.taps.reshape(-1), within), weight[real])


def _found(offsets: _Words, wanted: _Ints) -> _Ints:
    """The index of each of ``wanted`` in ``offsets``."""
    order = np.argsort(offsets)
    return order[np.searchsorted(offsets, wanted, sorter=order)]


# -- programs -------------------------------------------------------------------------------------------
def _programs(nonzeros: _Nonzeros, count: int, deal: Deal, places: Places) -> _Words:
    r, s = places.taps.shape
    load, end = deal.rows * r, deal.rows * r + 1
    number, warp = np.divmod(nonzeros.position, deal.warps)
    kernel_row, kernel_col = np.divmod(nonzeros.tap, s)
    owner = nonzeros.chunk * deal.warps + warp
    order = np.lexsort((number, kernel_row, kernel_col, nonzeros.channel, owner))
    owner, channel, kernel_col = owner[order], nonzeros.channel[order], kernel_col[order]
    window = np.diff((owner * places.slab + channel) * s + kernel_col, prepend=-1) != 0

    # Each program: a record for the first code, then its windows and weights.
    weights, windows = (np.bincount(owner[which], minlength=count * deal.warps) for which in (owner >= 0, window))
    length = 1 + weights + windows
    first = _starts(length.reshape(count, deal.warps))
    chunks, header = _chunks(first, 2 * int(length.reshape(count, deal.warps).sum(1).max()))
    begin = header + 2 * first.reshape(-1)
    before = weights.cumsum() - weights + windows.cumsum() - windows
    record = begin[owner] + 2 * (1 + np.arange(len(owner)) + window.cumsum() - before[owner])
    chunk = nonzeros.chunk[order]
    chunks[chunk, record] = nonzeros.weight[order]
    chunks[chunk[window], record[window] - 2] = (channel * places.channel_bytes + places.taps[0, kernel_col])[window]
    # The code of a step stands in the record before its own.
    chunks[chunk, record - 1] = (number * r + kernel_row)[order]
    chunks[chunk[window], record[window] - 3] = load
    chunks[np.arange(count).repeat(deal.warps), begin + 2 * length - 1] = end
    return chunks


def _of_programs(chunk: _Words, deal: Deal, places: Places) -> _Nonzeros:
    r, s = places.taps.shape
    records = chunk[_round_up(deal.warps, 4) :].reshape(-1, 2)
    parts = []
    for warp, begin in enumerate(chunk[: deal.warps].tolist()):
        steps = int(np.argmax(records[begin:, 1] == deal.rows * r + 1))
        code, payload = records[begin : begin + steps, 1], records[begin + 1 : begin + 1 + steps, 0]
        load = code == deal.rows * r
        channel, within = np.divmod(payload[load].astype(np.int64), places.channel_bytes)
        window = load.cumsum()[~load] - 1
        number, kernel_row = np.divmod(code[~load].astype(np.int64), r)
        tap = kernel_row * s + _found(places.taps[0], within)[window]
        parts.append((number * deal.warps + warp, channel[window], tap, payload[~load]))
    position, channel, tap, weight = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _Nonzeros(channel * 0, position, channel, tap, weight)
