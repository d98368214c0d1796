"""How a tensor lies in memory on one edge of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Order of the dimensions, and a border of zeros around each image plane.

    Order "any" takes or makes whatever comes; "rows" is a contiguous tensor, last dimension fastest, for layers that
    work on rows of features.  For "nchw", ``halo = (rows, columns)`` zeros lie before and after each
    plane, so that a padded convolution reads its padding instead of testing for it; a consumer asks for at least
    that much, ``(0, 0)`` asks for planes without gaps, and ``None`` takes any halo as long as columns are contiguous.
    For a producer, ``writes_halo`` says whether it can write into a buffer that has one.

    ``aligned``: a consumer that wants planes without gaps reads this many elements at once: images and channels start
    at multiples of it.
    """

    order: Literal["nchw", "nhwc", "rows", "any"] = "nchw"
    halo: tuple[int, int] | None = None
    writes_halo: bool = False
    aligned: int = 1


CPU = torch.device("cpu")


def allocate(
    shape: tuple[int, ...],
    halo: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Tensor:
    """A view of ``shape`` (``[n, c, h, w]`` where there is a halo) into a new zeroed buffer with that border."""
    rows, columns = halo
    if not rows and not columns:
        return torch.zeros(shape, dtype=dtype, device=device)
    n, c, h, w = shape
    buffer = torch.zeros((n, c, h + 2 * rows, w + 2 * columns), dtype=dtype, device=device)
    return buffer[:, :, rows : rows + h, columns : columns + w]


def conform(x: Tensor, have: tuple[int, int], want: Layout) -> Tensor:
    """``x`` itself if it lies as ``want`` asks, else a copy that does.

    Args:
        x: any strides; ``have`` is the halo of zeros known to surround it.
    """
    if want.order == "any":
        return x
    if want.order == "rows" or x.dim() != 4:
        return x.contiguous()
    if want.order == "nhwc":
        return x.contiguous(memory_format=torch.channels_last)
    if want.halo == (0, 0):
        planes = (x.stride(3) == 1 or x.shape[3] == 1) and (x.stride(2) == x.shape[3] or x.shape[2] == 1)
        if planes and want.aligned > 1:
            starts = (x.data_ptr() // x.element_size(), x.stride(0), x.stride(1))
            planes = all(start % want.aligned == 0 for start in starts)
        return x if planes else x.clone(memory_format=torch.contiguous_format)
    rows_wanted, columns_wanted = want.halo or (0, 0)
    readable = x.stride(3) == 1 and x.stride(2) >= x.shape[3] and x.stride(1) >= x.stride(2)
    if readable and have[0] >= rows_wanted and have[1] >= columns_wanted:
        return x
    copy = allocate(tuple(x.shape), (rows_wanted, columns_wanted), x.dtype, x.device)
    return copy.copy_(x)


def workspace(nbytes: int, device: torch.device = CPU) -> Tensor | None:
    """Uninitialised scratch memory, 64-byte aligned, or None where none is needed."""
    if not nbytes:
        return None
    memory = torch.empty(nbytes + 64, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % 64
    return memory[start : start + nbytes]
