"""A sparse matrix in chunks: what one block of rows needs of one slab of columns lies together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroskip.pack.csr import Csr

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Slabs:
    """A weight ``[k, columns]``, its rows dealt to blocks and its columns cut into slabs of ``slab``.

    ``heads`` int32 ``[blocks, positions (even), 2]``: of each row of a block, its number (-1 where there is none) and
    the bits of its float32 bias.  Rows are sorted by nonzeros, so that neighbouring positions take equally long, and
    dealt to the blocks in turns.

    ``chunks`` int32 ``[blocks, slabs, words]``: an index of ``positions + 1`` (where the nonzeros of each position
    begin; padded to 16 bytes; counted in pairs), then the nonzeros in order of position and column, 8 bytes each: the
    float32 weight, and its column within the slab times ``pitch``, in bytes.  A position with an odd number of them
    ends with a zero weight at column ``slab``, where the kernel keeps a row of zeros.  All chunks have the length of
    the longest.
    """

    shape: tuple[int, int]
    positions: int
    slab: int
    pitch: int
    heads: Tensor
    chunks: Tensor

    @property
    def blocks(self) -> int:
        return self.chunks.shape[0]

    @property
    def slabs(self) -> int:
        return self.chunks.shape[1]

    @property
    def chunk_bytes(self) -> int:
        return self.chunks.shape[2] * 4

    @staticmethod
    def of(csr: Csr, columns: int, bias: Tensor, positions: int, blocks: int, slab: int, pitch: int) -> Slabs:
        """Pack ``csr``, whose column indices lie below ``columns``, and ``bias`` float32 ``[k]``.

        Raises:
            ValueError: more rows than ``blocks`` of ``positions``.
        """
        rows = len(csr.row_offsets) - 1
        if blocks * positions < rows:
            raise ValueError(f"{rows} rows do not fit {blocks} blocks of {positions}")
        block, position = _deal(csr.row_offsets.diff().numpy(), blocks)
        heads = np.full((blocks, positions + positions % 2, 2), -1, np.int32)
        heads[block, position, 0] = np.arange(rows)
        heads[block, position, 1] = bias.float().numpy().view(np.int32)

        slabs = max(1, -(-columns // slab))
        row, column = csr.row_indices.numpy(), csr.col_indices.numpy()
        place = (block[row] * slabs + column // slab) * positions + position[row]
        order = np.lexsort((column, place))
        counts = np.bincount(place, minlength=blocks * slabs * positions)
        pairs = -(-counts // 2)
        totals, header = pairs.reshape(-1, positions).sum(1), _header(positions)
        chunks = np.zeros((blocks * slabs, header + 4 * int(totals.max())), np.int32)
        chunks[:, 1 : positions + 1] = pairs.reshape(-1, positions).cumsum(1)
        chunks[:, header + 1 :: 2] = slab * pitch
        first = 2 * (pairs.cumsum() - pairs) - np.repeat(2 * (totals.cumsum() - totals), positions)
        owner = place[order]
        at = header + 2 * (first[owner] + np.arange(len(order)) - (counts.cumsum() - counts)[owner])
        chunks[owner // positions, at] = csr.values.float().numpy().view(np.int32)[order]
        chunks[owner // positions, at + 1] = column[order] % slab * pitch
        shaped = chunks.reshape(blocks, slabs, -1)
        return Slabs((rows, columns), positions, slab, pitch, torch.from_numpy(heads), torch.from_numpy(shaped))

    def dense(self) -> Tensor:
        """float32 ``[k, columns]``: exactly the weights that are computed with."""
        result, header = torch.zeros(self.shape), _header(self.positions)
        chunks, heads = self.chunks.cpu(), self.heads.cpu()
        for block in range(self.blocks):
            for slab in range(self.slabs):
                index = chunks[block, slab, : self.positions + 1].long()
                nonzeros = chunks[block, slab, header : header + 4 * int(index[-1])].reshape(-1, 2)
                rows = heads[block, : self.positions, 0].long().repeat_interleave(2 * index.diff())
                real = nonzeros[:, 1] < self.slab * self.pitch
                columns = nonzeros[real, 1].long() // self.pitch + slab * self.slab
                result[rows[real], columns] = nonzeros[real, 0].contiguous().view(torch.float32)
        return result


def _header(positions: int) -> int:
    """int32 of a chunk's index."""
    return (positions + 1 + 3) // 4 * 4


def _deal(lengths: _Ints, blocks: int) -> tuple[_Ints, _Ints]:
    """The block and position of each row: longest first, to the blocks in turns, back and forth."""
    order = np.argsort(-lengths, kind="stable")
    turn, at = np.divmod(np.arange(len(order)), blocks)
    block, position = np.empty_like(order), np.empty_like(order)
    block[order] = np.where(turn % 2 == 0, at, blocks - 1 - at)
    position[order] = turn
    return block, position
