"""A sparse tensor as the number of zeros before each nonzero, in 8 or 16 bits, and the nonzeros.

Idea: Han et al. 2016, "Deep Compression" (arXiv 1510.00149), section 2.  Where a gap does not fit they store a zero as
if it were a nonzero; here the largest number is kept for that, which costs no value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from zeroskip.pack.nonzeros import checked_count, nonzeros, scattered, unsigned


@dataclass(frozen=True)
class Gaps:
    """``gaps [symbols]`` uint8 or int16 (read as unsigned), row-major; ``values [nnz]`` in the tensor's dtype.

    With M = 255 or 65535: a gap g < M means g zeros and then the next value; M means M zeros and no value.  After the
    last symbol fewer than M elements are left, which are zeros.
    """

    gaps: Tensor
    values: Tensor

    @staticmethod
    def of(tensor: Tensor, width: Literal[8, 16]) -> Gaps:
        """``width``: bits of a gap."""
        places, values = nonzeros(tensor)
        most = 2**width - 1
        zeros = np.diff(places, prepend=-1, append=tensor.numel()) - 1  # before each nonzero, and behind the last
        ends = np.cumsum(zeros // most + 1)
        gaps = np.full(ends[-1] - 1, most, f"u{width // 8}")
        gaps[ends[:-1] - 1] = zeros[:-1] % most
        return Gaps(torch.from_numpy(gaps).view(torch.uint8 if width == 8 else torch.int16), values)

    def dense(self, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that shape.

        Raises:
            ValueError: the gaps do not lead to its end, or the values are not as many as they announce.
        """
        if self.gaps.dtype not in (torch.uint8, torch.int16):
            raise ValueError(f"gaps have 8 or 16 bits, got {self.gaps.dtype}")
        gaps = unsigned(self.gaps, "gaps")
        most = int(np.iinfo(gaps.dtype).max)
        ends = gaps != most
        nnz = int(np.count_nonzero(ends))
        count = checked_count(shape, self.values, nnz, gaps.nbytes)
        # At most 65535 each: an int64 holds the sum of any file's.
        reached = np.cumsum(gaps, dtype=np.int64)
        if nnz == gaps.size:
            reached += np.arange(1, nnz + 1)
        else:
            reached += np.cumsum(ends)
        covered = int(reached[-1]) if gaps.size else 0
        if not 0 <= count - covered < most:
            raise ValueError(f"the gaps cover {covered} elements, shape {shape} has {count}")
        return scattered((reached if nnz == gaps.size else reached[ends]) - 1, self.values, shape)
