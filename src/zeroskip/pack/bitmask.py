"""A sparse tensor as one bit per element and the nonzeros: the form that weights take in a file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Bitmask:
    """``mask`` uint8 ``[ceil(numel / 8)]``, row-major, lowest bit first; ``values [nnz]`` in the tensor's dtype."""

    mask: Tensor
    values: Tensor

    @staticmethod
    def of(tensor: Tensor) -> Bitmask:
        flat = tensor.detach().cpu().reshape(-1)
        # By bits, so that -0.0 comes back as it was and a file's weights have the hash they were saved with.
        nonzero = flat.contiguous().view(_INTEGERS[flat.element_size()]) != 0
        return Bitmask(torch.from_numpy(np.packbits(nonzero.numpy(), bitorder="little")), flat[nonzero])

    def dense(self, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that shape.

        Raises:
            ValueError: the mask is not of that many elements, or the values are not as many as its bits.
        """
        count = 1
        for size in shape:
            count *= size
        if self.mask.dtype != torch.uint8 or self.mask.dim() != 1 or self.mask.numel() != -(-count // 8):
            raise ValueError(
                f"a mask for shape {shape} has {-(-count // 8)} bytes, got {self.mask.numel()} "
                f"elements of {self.mask.dtype}"
            )
        bits = np.unpackbits(self.mask.numpy(), bitorder="little")
        nonzero = torch.from_numpy(bits[:count].view(np.bool_))
        if self.values.dim() != 1 or self.values.numel() != int(bits.sum()) or bits[count:].any():
            raise ValueError(f"the mask has {int(bits.sum())} bits set, the values are {tuple(self.values.shape)}")
        result = torch.zeros(count, dtype=self.values.dtype)
        result[nonzero] = self.values
        return result.reshape(shape)
