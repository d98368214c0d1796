"""What the forms of a sparse tensor in a file share: which elements count, how numbers are kept, what is refused.

Elements are told apart by their bits: only +0.0 is left out, so that -0.0 and every NaN come back as they were and a
file's weights have the hash they were saved with.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Integers = npt.NDArray[Any]

EXPANSION = 2048
"""Bytes that a byte in a file may stand for: a small file cannot ask for much memory.  8-bit gaps of float64 zeros, 255
elements a byte, are the most that a form must be allowed, because they are the answer where others are refused."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {torch.uint8: np.uint8, torch.int16: np.uint16, torch.int32: np.uint32, torch.int64: np.uint64}
"""How numbers are kept: safetensors for torch has known unsigned ones of more than a byte only since 0.5.3."""


def bits(tensor: Tensor) -> Integers:
    """The elements in row-major order as integers of their size; it shares their memory where they lie so."""
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    array: Integers = flat.view(_INTEGERS[flat.element_size()]).numpy()
    return array


def nonzeros(tensor: Tensor) -> tuple[npt.NDArray[np.int64], Tensor]:
    """Their places in row-major order, ascending, and their values ``[nnz]``."""
    places = np.flatnonzero(bits(tensor))
    return places, tensor.detach().cpu().reshape(-1)[torch.from_numpy(places)]


def packed(numbers: Integers) -> Tensor:
    """Nonnegative integers in the fewest bytes each that hold all of them; ``unsigned`` reads them."""
    largest = int(numbers.max(initial=0))
    dtype = next(dtype for dtype in _UNSIGNED if largest < 256**dtype.itemsize)
    return torch.from_numpy(numbers.astype(_UNSIGNED[dtype])).view(dtype)


def unsigned(tensor: Tensor, what: str) -> Integers:
    """The numbers that ``packed`` wrote; ``ValueError`` where it cannot have been that."""
    if tensor.dim() != 1 or tensor.dtype not in _UNSIGNED:
        raise ValueError(f"{what} are one row of whole numbers, got {tuple(tensor.shape)} of {tensor.dtype}")
    array: Integers = tensor.numpy().view(_UNSIGNED[tensor.dtype])
    return array


def checked_count(shape: tuple[int, ...], values: Tensor, nnz: int, index_bytes: int) -> int:
    """The elements of ``shape``, once it is certain that memory for them may be taken.

    Raises:
        ValueError: the values are not ``nnz`` in a row, the shape is none, or it asks for more than the file pays for.
    """
    if values.dim() != 1 or values.numel() != nnz:
        raise ValueError(f"the places of {nnz} values are given, the values are {tuple(values.shape)}")
    count = math.prod(shape)
    if min(shape, default=0) < 0:
        raise ValueError(f"there is no shape {shape}")
    if not may_expand(count * values.element_size(), values.nbytes + index_bytes):
        raise ValueError(f"{values.nbytes + index_bytes} bytes cannot stand for a tensor of shape {shape}")
    return count


def may_expand(dense_bytes: int, stored_bytes: int) -> bool:
    """Whether so few bytes may stand for so many."""
    return dense_bytes <= EXPANSION * (stored_bytes + 1)


def scattered(places: Integers, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor that holds ``values`` at ``places`` (each in range, none twice: the caller's check), else +0.0."""
    result = torch.zeros(math.prod(shape), dtype=values.dtype)
    bits(result)[places] = bits(values)
    return result.reshape(shape)
