"""Compressed sparse rows: the canonical form of a pruned weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Csr:
    """A weight ``[k, ...]`` as rows of nonzeros, ``-0.0`` counting as zero and NaN as a nonzero.

    ``row_offsets`` int64 ``[k + 1]``, ``col_indices`` int64 ``[nnz]`` (flat index into the row, ascending),
    ``values`` ``[nnz]`` in the weight's dtype, ``shape`` of the weight.
    """

    shape: tuple[int, ...]
    row_offsets: Tensor
    col_indices: Tensor
    values: Tensor

    @staticmethod
    def of(weight: Tensor) -> Csr:
        flat = weight.detach().reshape(weight.shape[0], -1)
        where = flat.reshape(-1).nonzero(as_tuple=True)[0]
        offsets = torch.zeros(flat.shape[0] + 1, dtype=torch.int64, device=weight.device)
        columns = max(flat.shape[1], 1)
        offsets[1:] = torch.bincount(where // columns, minlength=flat.shape[0]).cumsum(0)
        return Csr(tuple(weight.shape), offsets, where % columns, flat.reshape(-1)[where])

    @property
    def row_indices(self) -> Tensor:
        """int64 ``[nnz]``: the row of each nonzero."""
        lengths = self.row_offsets.diff()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def dense(self) -> Tensor:
        """The weight it was made of."""
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        result = torch.zeros(self.shape[0], columns, dtype=self.values.dtype, device=self.values.device)
        result[self.row_indices, self.col_indices] = self.values
        return result.reshape(self.shape)
