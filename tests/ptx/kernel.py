"""A kernel in PTX that runs on the CPU, with the face of ``zeroskip.cuda.launch.Kernel``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ptx.machine import Buffer, Machine
from ptx.program import Fault


class Interpreted:
    """Made of PTX text.  Tensors are CPU tensors; an element outside of the views it is given cannot be touched."""

    def __init__(self, text: str, halo: tuple[int, int] = (0, 0)) -> None:
        """The kernel may load from its first and third argument and store to the second; of the first it may load a
        ``halo`` around each plane too."""
        self.text, self.halo = text, halo

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[object],
        *,
        shared_bytes: int = 0,
        cluster: tuple[int, int, int] | None = None,
        dependent: bool = False,
    ) -> None:
        """To its end.  Raises ``Fault``."""
        passed, buffers = [], []
        for index, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                view = _widened(argument, self.halo) if index == 0 else argument
                buffers.append(_buffer(view, reads=index in (0, 2), writes=index == 1))
                passed.append(argument.data_ptr())
            elif argument is None:
                passed.append(0)
            elif isinstance(argument, int) and -(2**31) <= argument < 2**31:
                passed.append(argument % 2**32)
            else:
                raise Fault(f"a kernel cannot take {argument!r}")
        Machine(self.text, grid, block, passed, buffers, shared_bytes, cluster[2] if cluster else 1).run()


def _widened(x: Tensor, halo: tuple[int, int]) -> Tensor:
    if halo == (0, 0):
        return x
    n, c, h, w = x.shape
    first = x.storage_offset() - halo[0] * x.stride(2) - halo[1] * x.stride(3)
    return x.as_strided((n, c, h + 2 * halo[0], w + 2 * halo[1]), x.stride(), first)


def _buffer(view: Tensor, *, reads: bool, writes: bool) -> Buffer:
    """The tensor's whole storage, of which the view may be touched."""
    item = view.element_size()
    storage = view.untyped_storage()
    size = storage.nbytes() // item
    flat = torch.empty(0, dtype=view.dtype).set_(storage, 0, (size,), (1,))
    memory = flat.view(torch.uint8).numpy() if size else np.empty(0, np.uint8)
    there = torch.zeros(size, dtype=torch.bool)
    there.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    mask, nothing = np.repeat(there.numpy(), item), np.zeros(size * item, np.bool_)
    return Buffer(storage.data_ptr(), memory, mask if reads else nothing, mask if writes else nothing)
