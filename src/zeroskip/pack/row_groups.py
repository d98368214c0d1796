"""A sparse matrix in groups of rows that are computed together, each cut into parts of equally many nonzeros."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroskip.pack.csr import Csr

Balance = Literal["ranges", "nonzeros", "columns"]
"""How rows come into groups.

"ranges": neighbouring rows, cut where the running count of nonzeros says.  "nonzeros": the longest first, dealt in
turns, so that all groups have equally many rows and nearly equally many nonzeros.  "columns": rows that share columns
together, so that a group loads less of x.
"""
SLACK = 1.1
"""Of "columns": how much longer than what is left on average a row may be."""
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowGroups:
    """A matrix ``shape`` of rows and columns.

    ``rows`` int32 ``[groups, height]``: the rows of each group by their place, -1 behind the last.  The nonzeros in
    order of group, column and place: ``places`` and ``columns`` int32, ``values`` float32.  ``bounds`` int64
    ``[groups * parts + 1]``: where the parts of each group begin among them; a column may end one part and begin the
    next.
    """

    shape: tuple[int, int]
    parts: int
    rows: Tensor
    bounds: Tensor
    places: Tensor
    columns: Tensor
    values: Tensor

    @staticmethod
    def of(csr: Csr, columns: int, groups: int, height: int, parts: int, balance: Balance) -> RowGroups:
        """Group the rows of ``csr``, whose column indices lie below ``columns``.

        Raises:
            ValueError: more rows than ``groups`` of ``height``.
        """
        count = len(csr.row_offsets) - 1
        if groups * height < count:
            raise ValueError(f"{count} rows do not fit {groups} groups of {height}")
        lengths = csr.row_offsets.diff().numpy()
        if balance == "ranges":
            group = _ranges(lengths, groups, height)
        elif balance == "nonzeros":
            group = _dealt(lengths, groups)
        else:
            group = _alike(csr, columns, groups)
        # Within a group rows keep their order: what it writes then lies closer together.
        order = np.argsort(group, kind="stable")
        sizes = np.bincount(group, minlength=groups)
        place = np.empty(count, np.int64)
        place[order] = np.arange(count) - np.repeat(sizes.cumsum() - sizes, sizes)
        rows = np.full((groups, height), -1, np.int32)
        rows[group, place] = np.arange(count)

        row, column = csr.row_indices.numpy(), csr.col_indices.numpy()
        sequence = np.lexsort((place[row], column, group[row]))
        totals = np.bincount(group[row], minlength=groups)
        starts = (totals.cumsum() - totals)[:, None] + totals[:, None] * np.arange(parts) // parts
        bounds = np.append(starts.reshape(-1), len(row))
        return RowGroups(
            (count, columns),
            parts,
            torch.from_numpy(rows),
            torch.from_numpy(bounds),
            torch.from_numpy(place[row][sequence].astype(np.int32)),
            torch.from_numpy(column[sequence].astype(np.int32)),
            csr.values.float()[torch.from_numpy(sequence)],
        )

    def dense(self) -> Tensor:
        """float32 ``[rows, columns]``: exactly the weights that are computed with."""
        result = torch.zeros(self.shape)
        sizes = self.bounds.cpu()[:: self.parts].diff()
        group = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        row = self.rows.cpu()[group, self.places.cpu().long()].long()
        result[row, self.columns.cpu().long()] = self.values.cpu()
        return result


def _ranges(lengths: _Ints, groups: int, height: int) -> _Ints:
    """The group of each row: each takes rows while the middle of the next one lies below its share."""
    group, first, running = np.empty(len(lengths), np.int64), 0, np.concatenate(([0], lengths.cumsum()))
    middles = (running[:-1] + running[1:]) / 2
    for index in range(groups):
        share = running[-1] * (index + 1) / groups
        last = first + int(np.searchsorted(middles[first:], share))
        fewest = len(lengths) - height * (groups - 1 - index)
        last = max(first, fewest, min(last, first + height))
        last = min(last, len(lengths)) if index < groups - 1 else len(lengths)
        group[first:last] = index
        first = last
    return group


def _dealt(lengths: _Ints, groups: int) -> _Ints:
    """The group of each row: the longest first, to the groups in turns, back and forth."""
    turn, at = np.divmod(np.arange(len(lengths)), groups)
    group = np.empty(len(lengths), np.int64)
    group[np.argsort(-lengths, kind="stable")] = np.where(turn % 2 == 0, at, groups - 1 - at)
    return group


_one_by_one = threading.Lock()
"""A planner packs one layer in many threads, for few numbers of groups; Python lets one of them think at a time."""


def _alike(csr: Csr, columns: int, groups: int) -> _Ints:
    """The group of each row: each begins with the longest row left and takes those that share more of its columns than
    chance would have them share, as long as it does not become longer than the others."""
    with _one_by_one:
        return _greedy(csr.row_offsets.numpy().tobytes(), csr.col_indices.numpy().tobytes(), columns, groups)


@functools.lru_cache(32)
def _greedy(row_offsets: bytes, col_indices: bytes, columns: int, groups: int) -> _Ints:
    offsets = np.frombuffer(row_offsets, np.int64)
    lengths = offsets[1:] - offsets[:-1]
    count = len(lengths)
    there = np.zeros((columns, count), np.float32)
    there[np.frombuffer(col_indices, np.int64), np.repeat(np.arange(count), lengths)] = 1
    free, group = np.ones(count, np.bool_), np.empty(count, np.int64)
    for index in range(groups):
        size = (count * (index + 1)) // groups - (count * index) // groups
        union, shared = np.zeros(columns, np.bool_), np.zeros(count, np.float32)
        budget = lengths[free].sum() / (groups - index)
        for left in range(size, 0, -1):
            short = free & (lengths <= SLACK * budget / left)
            if left == size:
                row = int(np.argmax(np.where(free, lengths, -1)))
            elif short.any():
                gain = shared - lengths * (union.sum() / max(columns, 1))
                row = int(np.argmax(np.where(short, gain, -np.inf)))
            else:
                row = int(np.argmin(np.where(free, lengths, columns + 1)))
            new = (there[:, row] > 0) & ~union
            shared += there[new].sum(0)
            union |= new
            group[row], free[row] = index, False
            budget -= lengths[row]
    group.flags.writeable = False
    return group
