"""A sparse matrix in panels of rows, the columns that are heavy in a panel apart from the rest: adaptive sparse tiling.

Source: C. Hong et al., Adaptive Sparse Tiling for Sparse Matrix Multiplication, PPoPP 2019.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zeroskip.pack.csr import Csr

Order = Literal["given", "dealt"]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

FEWEST_HEAVY = 8
"""A panel with fewer heavy columns has no tile: so few are not worth a copy that everybody waits for."""
MOST_NONZEROS = 4096
"""Of a panel in one section, about: kernels keep the chunks of three in shared memory."""
SPARE = 8
"""Nonzeros behind the last one of a chunk that a kernel may read, and ignore."""


@dataclass(frozen=True)
class Tiling:
    """How a matrix is cut.

    A panel has ``positions`` places, of which about ``height`` are taken.  A row of more than ``longest`` nonzeros (0:
    of any number) takes several neighbouring places and is divided evenly among them.  ``order``: panels are
    neighbouring rows as "given"; or rows are "dealt", longest first, each to the panel with the least work.

    A column with at least ``threshold`` nonzeros in a panel is heavy there; a tile has at most ``tile`` of them.
    """

    positions: int
    height: int
    threshold: int
    tile: int
    longest: int = 0
    order: Order = "dealt"

    def __post_init__(self) -> None:
        if not 1 <= self.height <= self.positions:
            raise ValueError(f"height must be between 1 and the {self.positions} places of a panel, got {self}")
        if self.threshold < 1 or self.tile < 1 or self.longest < 0:
            raise ValueError(f"threshold and tile must be positive and longest not negative, got {self}")
        if self.order not in ("given", "dealt"):
            raise ValueError(f"order must be given or dealt, got {self}")


@dataclass(frozen=True)
class AdaptivePanels:
    """A weight ``[k, columns]``.

    ``heads`` int32 ``[panels, positions, 4]``: of each place its row (-1 where there is none or a row goes on), the
    bits of the row's float32 bias, how many places the row takes, and 0.

    ``chunks`` int32 ``[panels, sections, words]``.  The heavy columns of a panel are divided evenly among its sections,
    and so are the nonzeros of the light ones.  A chunk is what a panel needs for one section:

    - an index of ``2 * positions + 1``: where the nonzeros of each place end, first those in light columns, then those
      in heavy ones; each place begins at the next even number;
    - how many heavy columns there are, and which (``width`` at most); padded to 16 bytes;
    - the nonzeros in that order, 8 bytes each: the float32 weight and its column.  A heavy one is counted within the
      section and multiplied with ``pitch``, the bytes of a column's row in the tile.

    All chunks have the length of the longest, and ``SPARE`` nonzeros more.
    """

    shape: tuple[int, int]
    tiling: Tiling
    pitch: int
    width: int
    heads: Tensor
    chunks: Tensor

    @property
    def panels(self) -> int:
        return self.chunks.shape[0]

    @property
    def sections(self) -> int:
        return self.chunks.shape[1]

    @property
    def chunk_bytes(self) -> int:
        return self.chunks.shape[2] * 4

    @staticmethod
    def of(csr: Csr, columns: int, bias: Tensor, tiling: Tiling, pitch: int) -> AdaptivePanels:
        """Pack ``csr``, whose column indices lie below ``columns``, and ``bias`` float32 ``[k]``."""
        lengths = csr.row_offsets.diff().numpy()
        parts, panel, place = deal(lengths, tiling)
        panels, positions, slots = int(panel.max()) + 1, tiling.positions, 2 * tiling.positions
        heads = np.zeros((panels, positions, 4), np.int32)
        heads[..., 0] = -1
        heads[panel, place, 0] = np.arange(len(lengths))
        heads[panel, place, 1] = bias.float().numpy().view(np.int32)
        heads[panel, place, 2] = parts

        row, column = csr.row_indices.numpy(), csr.col_indices.numpy()
        owner = panel[row]
        counts = column_counts(csr, columns, panel)
        heavy = heavy_columns(counts, tiling.threshold)
        sections, section, number, widths = _divide(counts, heavy, tiling.tile)
        chunk = owner * sections + section[owner, column]
        part = _part(chunk * 2 + heavy[owner, column], row, parts)
        slot = chunk * slots + heavy[owner, column] * positions + place[row] + part

        order = np.lexsort((column, slot))
        sizes = np.bincount(slot, minlength=panels * sections * slots)
        begins = ((sizes + sizes % 2).reshape(-1, slots).cumsum(1) - (sizes + sizes % 2).reshape(-1, slots)).ravel()
        ends, width = (begins + sizes).reshape(-1, slots), int(widths.max())
        header, most = header_words(positions, width), int(ends.max())
        chunks = np.zeros((panels * sections, header + 2 * (most + most % 2 + SPARE)), np.int32)
        chunks[:, 1 : slots + 1] = ends
        chunks[:, slots + 1] = widths.ravel()
        of_panel, which = heavy.nonzero()
        listed = of_panel * sections + section[of_panel, which]
        chunks[listed, slots + 2 + number[of_panel, which]] = which
        at = slot[order]
        to = header + 2 * (begins[at] + np.arange(len(at)) - (sizes.cumsum() - sizes)[at])
        chunks[at // slots, to] = csr.values.float().numpy().view(np.int32)[order]
        chunks[at // slots, to + 1] = np.where(heavy[owner, column], number[owner, column] * pitch, column)[order]
        shaped = torch.from_numpy(chunks.reshape(panels, sections, -1))
        return AdaptivePanels((len(lengths), columns), tiling, pitch, width, torch.from_numpy(heads), shaped)

    def dense(self) -> Tensor:
        """float32 ``[k, columns]``: exactly the weights that are computed with."""
        result, slots = torch.zeros(self.shape), 2 * self.tiling.positions
        header = header_words(self.tiling.positions, self.width)
        for head, chunks in zip(self.heads.cpu(), self.chunks.cpu(), strict=True):
            places = torch.arange(self.tiling.positions)
            begun = torch.where(head[:, 0] >= 0, places, 0).cummax(0).values
            rows = head[begun, 0].long().repeat(2)
            for chunk in chunks:
                index, heavy = chunk[: slots + 1].long(), chunk[slots + 2 : header].long()
                begins = index[:-1] + index[:-1] % 2
                owner = torch.arange(slots).repeat_interleave(index[1:] - begins)
                first = (index[1:] - begins).cumsum(0) - (index[1:] - begins)
                at = header + 2 * (begins[owner] + torch.arange(len(owner)) - first[owner])
                columns = chunk[at + 1].long()
                tiled = owner >= self.tiling.positions
                columns[tiled] = heavy[columns[tiled] // self.pitch]
                result[rows[owner], columns] = chunk[at].view(torch.float32)
        return result


def header_words(positions: int, width: int) -> int:
    """int32 of a chunk before its nonzeros."""
    return (2 * positions + 1 + 1 + width + 3) // 4 * 4


# -- rows to panels -------------------------------------------------------------------------------------
def deal(lengths: Ints, tiling: Tiling) -> tuple[Ints, Ints, Ints]:
    """How many places each row takes, its panel, and its first place there.

    Args:
        lengths: nonzeros of each row.
    """
    parts = np.ones_like(lengths)
    if tiling.longest:
        parts = (-(-lengths // tiling.longest)).clip(1, tiling.positions)
    panels = math.ceil(int(parts.sum()) / tiling.height)
    panel = _neighbours(parts, panels, tiling) if tiling.order == "given" else _balanced(lengths, parts, panels, tiling)
    # Rows that take equally long stand together: neighbouring places share a warp.
    order = np.lexsort((-(lengths / parts), panel))
    place = np.empty_like(panel)
    ahead = parts[order].cumsum() - parts[order]
    starts = np.flatnonzero(np.diff(panel[order], prepend=-1))
    place[order] = ahead - np.repeat(ahead[starts], np.diff(starts, append=len(order)))
    return parts, panel, place


def _neighbours(parts: Ints, panels: int, tiling: Tiling) -> Ints:
    share, used, current = math.ceil(int(parts.sum()) / panels), 0, 0
    panel = np.empty_like(parts)
    for row, taken in enumerate(parts.tolist()):
        if used and used + taken > share:
            used, current = 0, current + 1
        panel[row] = current
        used += taken
    return panel


def _balanced(lengths: Ints, parts: Ints, panels: int, tiling: Tiling) -> Ints:
    """Longest row first, each to the panel with the least work that has room; with more panels where some find none."""
    order = np.argsort(-lengths, kind="stable")
    panel = np.empty_like(parts)
    while True:
        work, room, left = np.zeros(panels), np.full(panels, tiling.positions), int(parts.sum())
        for row in order.tolist():
            fits = room >= parts[row]
            if not fits.any():
                break
            chosen = int(np.where(fits, work, np.inf).argmin())
            panel[row] = chosen
            work[chosen] += lengths[row] + 1  # empty rows are written too
            room[chosen] -= parts[row]
            left -= int(parts[row])
        else:
            return panel
        panels += math.ceil(left / tiling.positions)


# -- columns to tiles -----------------------------------------------------------------------------------
def column_counts(csr: Csr, columns: int, panel: Ints) -> Ints:
    """Nonzeros of each column in each panel: ``[panels, columns]``.

    Args:
        panel: of each row.
    """
    panels = int(panel.max()) + 1
    places = panel[csr.row_indices.numpy()] * columns + csr.col_indices.numpy()
    return np.bincount(places, minlength=panels * columns).reshape(panels, columns)


def heavy_columns(counts: Ints, threshold: int) -> Flags:
    """Which columns go to a tile: ``[panels, columns]``."""
    heavy: Flags = counts >= threshold
    enough: Flags = heavy.sum(1, keepdims=True) >= FEWEST_HEAVY
    return heavy & enough


def _divide(counts: Ints, heavy: Flags, tile: int) -> tuple[int, Ints, Ints, Ints]:
    """The number of sections; the section of each column, and a heavy one's number within it, ``[panels, columns]``;
    and how many heavy columns each section has, ``[panels, sections]``."""
    total = heavy.sum(1, keepdims=True)
    sections = max(1, math.ceil(int(total.max()) / tile), math.ceil(int(counts.sum(1).max()) / MOST_NONZEROS))
    bounds = -(-np.arange(sections + 1) * total // sections)
    rank = heavy.cumsum(1) - 1
    of_heavy = rank * sections // total.clip(1)
    number = rank - np.take_along_axis(bounds, of_heavy.clip(0), 1)
    light = np.where(heavy, 0, counts)
    of_light = (light.cumsum(1) - light) * sections // light.sum(1, keepdims=True).clip(1)
    section = np.where(heavy, of_heavy, of_light.clip(0, sections - 1))
    return sections, section, number, np.diff(bounds, axis=1)


def _part(group: Ints, row: Ints, parts: Ints) -> Ints:
    """Which of its row's places each nonzero goes to: each takes an even share of the row's nonzeros in a group."""
    order = np.lexsort((group, row))
    keys = np.stack([row[order], group[order]])
    starts = np.flatnonzero((np.diff(keys, prepend=-1) != 0).any(0))
    sizes = np.diff(starts, append=len(order))
    rank = np.arange(len(order)) - np.repeat(starts, sizes)
    part = np.empty_like(row)
    part[order] = rank * parts[row[order]] // np.repeat(sizes, sizes)
    return part


@functools.lru_cache(4096)
def binomial_heavy(height: int, density: float, threshold: int) -> tuple[float, float]:
    """What to expect of a random mask: the share of columns with at least ``threshold`` nonzeros among ``height``
    rows, and the share of all nonzeros that these hold."""
    columns, held = 1.0, height * density
    for count in range(min(threshold, height + 1)):
        probability = math.comb(height, count) * density**count * (1 - density) ** (height - count)
        columns -= probability
        held -= count * probability
    mean = height * density
    return max(columns, 0.0), max(held / mean, 0.0) if mean else 0.0
