"""Stretched CSR: each nonzero carries the byte offset of its input, so the kernel adds one number and loads.

The column index of an ordinary CSR row names a tap (input channel, kernel row, kernel column).  Stretched CSR
replaces it by where that tap's pixels lie relative to the output pixel, so no index arithmetic is left.

Source: X. Chen, Escoin: Efficient Sparse Convolutional Neural Network Inference on GPUs, arXiv 1802.10280,
section 3.  Ours differs in that offsets point into a panel of a few input channels that fits the L1 cache, hence
the order below: output channels in chunks (for threads), inside them blocks of input channels, inside those rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroskip.pack.csr import Csr

FIRST_AND_LAST, FIRST, MIDDLE, LAST = range(4)
"""Where a row's piece stands among the row's pieces: it starts from the bias, or it finishes the output, or both."""

BLOCK_FIELDS = 8
"""Of a row of ``blocks``: channels begin and end, first entry, and five bounds of the four kinds of segments."""


@dataclass(frozen=True)
class Stretched:
    """All tensors int32.

    ``chunks [chunks + 1]`` bounds into ``blocks [blocks, 8]``; ``channels`` the input channels of each block;
    ``segments [segments, 2]`` (output channel, nonzeros); ``entries [nnz, 2]`` (bits of the float32 weight, byte
    offset); ``taps [r, s]`` byte offset of each kernel position; ``channel_bytes`` from one panel channel to the next.
    """

    weight_shape: tuple[int, int, int, int]
    groups: int
    channel_bytes: int
    chunks: Tensor
    blocks: Tensor
    channels: Tensor
    segments: Tensor
    entries: Tensor
    taps: Tensor

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * 4 for part in (self.chunks, self.blocks, self.channels, self.segments, self.entries))


def stretch(
    weight: Tensor, groups: int, taps: npt.NDArray[np.int32], channel_bytes: int, block_channels: int, chunks: int
) -> Stretched:
    """Pack float32 ``weight [k, c / groups, r, s]``.

    Args:
        taps: int32 ``[r, s]``, byte offset of each kernel position inside a panel channel.
        channel_bytes: size of a panel channel.
        block_channels: input channels per panel.
        chunks: pieces of the output channels, of about equal nonzeros, that threads may take separately.
    """
    k, group_channels, r, s = weight.shape
    csr = Csr.of(weight.to(torch.float32))
    rows, columns = csr.row_indices.numpy(), csr.col_indices.numpy()
    channel, tap = np.divmod(columns, r * s)
    channel = channel + rows // (k // groups) * group_channels
    bounds = _balanced(csr.row_offsets.numpy(), chunks)

    entries = np.empty((len(rows), 2), np.int32)
    segments, blocks, channels, chunk_bounds = [], [], [], [0]
    segment = channel_count = 0
    for first, last in pairwise(bounds):
        low, high = int(csr.row_offsets[first]), int(csr.row_offsets[last])
        part = _chunk(rows[low:high], channel[low:high], range(first, last), block_channels)
        order = part.order + low
        entries[low:high, 0] = csr.values.numpy()[order].view(np.int32)
        entries[low:high, 1] = part.position * channel_bytes + taps.reshape(-1)[tap[order]]
        table = part.blocks.copy()
        table[:, 0:2] += channel_count
        table[:, 2] += low
        table[:, 3:8] += segment
        blocks.append(table)
        segments.append(part.segments)
        channels.append(part.channels)
        chunk_bounds.append(chunk_bounds[-1] + len(table))
        segment, channel_count = segment + len(part.segments), channel_count + len(part.channels)

    def tensor(arrays: list[npt.NDArray[np.int32]]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.concatenate(arrays), np.int32))

    return Stretched(
        (k, group_channels, r, s),
        groups,
        channel_bytes,
        torch.tensor(chunk_bounds, dtype=torch.int32),
        tensor(blocks),
        tensor(channels),
        tensor(segments),
        torch.from_numpy(entries),
        torch.from_numpy(np.ascontiguousarray(taps)),
    )


def unstretch(packed: Stretched) -> Tensor:
    """The float32 weight that ``packed`` computes with, ``[k, c / groups, r, s]``."""
    k, group_channels, r, s = packed.weight_shape
    entries, segments, blocks = packed.entries.numpy(), packed.segments.numpy(), packed.blocks.numpy()
    tap_of = {int(offset): index for index, offset in enumerate(packed.taps.numpy().reshape(-1))}
    result = np.zeros((k, group_channels, r * s), np.float32)
    for begin, _, entry, *bounds in blocks.tolist():
        rows, lengths = segments[bounds[0] : bounds[4]].T
        count = int(lengths.sum())
        weights, offsets = entries[entry : entry + count].T
        position, within = np.divmod(offsets, packed.channel_bytes)
        tap = np.array([tap_of[int(offset)] for offset in within], np.int64)
        row = np.repeat(rows, lengths)
        channel = packed.channels.numpy()[begin + position] - row // (k // packed.groups) * group_channels
        result[row, channel, tap] = np.ascontiguousarray(weights).view(np.float32)
    return torch.from_numpy(result.reshape(packed.weight_shape))


@dataclass(frozen=True)
class _Chunk:
    """One chunk with its tables counted from zero."""

    order: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    channels: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]
    blocks: npt.NDArray[np.int32]


def _balanced(row_offsets: npt.NDArray[np.int64], chunks: int) -> list[int]:
    """Row bounds of ``chunks`` ranges with about equal nonzeros (a row counts for at least one)."""
    rows = len(row_offsets) - 1
    work = row_offsets + np.arange(rows + 1)
    inner = np.searchsorted(work, np.arange(1, chunks) * work[-1] / chunks)
    return [0, *sorted(min(int(bound), rows) for bound in inner), rows]


def _chunk(
    rows: npt.NDArray[np.int64], channel: npt.NDArray[np.int64], every_row: range, block_channels: int
) -> _Chunk:
    used = np.zeros(int(channel.max(initial=0)) + 1, np.bool_)
    used[channel] = True
    channels = np.flatnonzero(used)[: len(channel)]
    position = (used.cumsum() - 1)[channel]
    block, local = np.divmod(position, block_channels)
    blocks = max(1, -(-len(channels) // block_channels))

    # CSR order is by row, then by channel, so a row's nonzeros in one block, a segment, already stand together.
    key = rows * blocks + block
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    lengths = np.diff(starts, append=len(key))
    segment_row, segment_block = np.divmod(key[starts], blocks)
    # Rows without nonzeros get an empty segment, so that their bias is written.
    empty = np.setdiff1d(np.arange(every_row.start, every_row.stop), segment_row)
    segment_row = np.concatenate([segment_row, empty])
    segment_block = np.concatenate([segment_block, np.zeros_like(empty)])
    lengths, starts = np.concatenate([lengths, np.zeros_like(empty)]), np.concatenate([starts, np.zeros_like(empty)])

    same_before, same_after = np.diff(segment_row, prepend=-1) == 0, np.diff(segment_row, append=-1) == 0
    kind = np.select([~same_before & ~same_after, ~same_before, ~same_after], [FIRST_AND_LAST, FIRST, LAST], MIDDLE)
    # Equal lengths stand together, so that the branch that ends the loop over nonzeros is predicted.
    ordering = np.lexsort((segment_row, lengths, kind, segment_block))
    segment_row, segment_block, kind = segment_row[ordering], segment_block[ordering], kind[ordering]
    lengths, starts = lengths[ordering], starts[ordering]
    offsets = np.concatenate([[0], lengths.cumsum()])
    order = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])

    bounds = np.searchsorted(segment_block * 4 + kind, np.arange(blocks * 4 + 1))
    first = np.arange(blocks) * block_channels
    table = np.column_stack(
        [
            first,
            np.minimum(first + block_channels, len(channels)),
            offsets[bounds[:-1:4]],
            *(bounds[kind : kind + 4 * blocks : 4] for kind in range(5)),
        ]
    )
    return _Chunk(
        order,
        local[order],
        channels.astype(np.int32),
        np.column_stack([segment_row, lengths]).astype(np.int32),
        table.astype(np.int32),
    )
