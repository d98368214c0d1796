"""Compressed sparse rows in few bytes: the form of CSR that a file holds (``pack.csr`` is the one to compute with)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from zeroskip.pack.nonzeros import checked_count, nonzeros, packed, scattered, unsigned


@dataclass(frozen=True)
class CompactCsr:
    """``counts [rows]``: the nonzeros of each row, whose sums CSR calls row offsets; ``columns [nnz]``, ascending in
    each row; ``values [nnz]`` in the tensor's dtype.

    Counts and columns are uint8, int16, int32 or int64, read as unsigned: whichever is the narrowest.  A tensor
    ``[k, ...]`` has k rows, one of no or one dimension has one.
    """

    counts: Tensor
    columns: Tensor
    values: Tensor

    @staticmethod
    def of(tensor: Tensor) -> CompactCsr:
        places, values = nonzeros(tensor)
        rows, length = _matrix(tuple(tensor.shape))
        counts = np.bincount(places // max(length, 1), minlength=rows)
        return CompactCsr(packed(counts), packed(places % max(length, 1)), values)

    def dense(self, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that shape.

        Raises:
            ValueError: counts, columns and values do not fit each other or the shape.
        """
        counts, columns = unsigned(self.counts, "counts"), unsigned(self.columns, "columns")
        checked_count(shape, self.values, columns.size, counts.nbytes + columns.nbytes)
        rows, length = _matrix(shape)
        # The single counts first: a sum of any 64-bit numbers may come around to the right one.
        if counts.size != rows or int(counts.max(initial=0)) > length or int(counts.sum()) != columns.size:
            raise ValueError(f"the counts of {columns.size} nonzeros do not fit shape {shape}")
        if columns.size and int(columns.max()) >= length:
            raise ValueError(f"column {int(columns.max())} of shape {shape}, whose rows have {length}")
        places = np.repeat(np.arange(rows) * length, counts.astype(np.int64)) + columns.astype(np.int64)
        if (np.diff(places) <= 0).any():
            raise ValueError("the columns of a row are not ascending")
        return scattered(places, self.values, shape)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
