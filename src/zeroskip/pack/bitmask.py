"""A sparse tensor as one bit per element and the nonzeros: the smallest form from about an eighth of nonzeros on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zeroskip.pack.nonzeros import bits, scattered


@dataclass(frozen=True)
class Bitmask:
    """``mask`` uint8 ``[ceil(numel / 8)]``, row-major, lowest bit first; ``values [nnz]`` in the tensor's dtype."""

    mask: Tensor
    values: Tensor

    @staticmethod
    def of(tensor: Tensor) -> Bitmask:
        nonzero = bits(tensor) != 0
        values = tensor.detach().cpu().reshape(-1)[torch.from_numpy(nonzero)]
        return Bitmask(torch.from_numpy(np.packbits(nonzero, bitorder="little")), values)

    def dense(self, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that shape.

        Raises:
            ValueError: the mask is not of that many elements, or the values are not as many as its bits.
        """
        count = math.prod(shape)
        if self.mask.dtype != torch.uint8 or self.mask.dim() != 1 or self.mask.numel() != -(-count // 8):
            raise ValueError(
                f"a mask for shape {shape} has {-(-count // 8)} bytes, got {self.mask.numel()} "
                f"elements of {self.mask.dtype}"
            )
        found = np.unpackbits(self.mask.numpy(), bitorder="little").view(np.bool_)
        nnz = np.count_nonzero(found)
        if self.values.dim() != 1 or self.values.numel() != nnz or found[count:].any():
            raise ValueError(f"the mask has {nnz} bits set, the values are {tuple(self.values.shape)}")
        return scattered(np.flatnonzero(found), self.values, shape)
