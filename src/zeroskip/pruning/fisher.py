"""Second-order scores: by how much the loss grows without a weight, as its last gradients tell."""

from collections import deque
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

Score = Literal["magnitude", "fisher"]

GRADIENTS, BLOCK = 64, 64
"""How many of the last steps' gradients estimate a Fisher matrix, and of how many weights."""
DAMPING = 1e-2
"""Added to a Fisher matrix's diagonal, as a share of the mean diagonal of its layer."""
BLOCKS_AT_ONCE = 4096
"""Inverted together; 134 MB each for matrices and inverses."""


class Fisher:
    """The last gradients of those weights of a layer that are still there, and the weights' scores.

    The score of a weight w is w^2 / [F^-1] with the diagonal element of the inverse of F, the empirical Fisher matrix
    of `BLOCK` neighbours (row-major, weights that are gone left out), damped. In proportion to it the loss grows, to
    the second order, if w goes and its neighbours make up for it. Gradients are those of whole batches.

    Args:
        mask: bool, of the weight's shape: which weights are there.
        gradients: float [steps, weights that are there], the oldest first, to go on from.

    Source: Singh & Alistarh 2020, "WoodFisher" (arXiv 2004.14340), section 3, without its change of the other weights,
    which training does here.
    """

    def __init__(self, mask: Tensor, gradients: Iterable[Tensor] = ()) -> None:
        self._places = mask.flatten().nonzero().squeeze(1).int()
        self._seen = deque((one.to(mask.device) for one in gradients), maxlen=GRADIENTS)

    def __len__(self) -> int:
        return len(self._seen)

    def __bool__(self) -> bool:
        """Whether some gradient was not 0."""
        return any(bool(one.any()) for one in self._seen)

    @torch.no_grad()
    def see(self, gradient: Tensor, counts: Tensor) -> None:
        """Remember a gradient of the weight's shape, in bfloat16; zeros unless it `counts`, a bool of no dimensions."""
        there = gradient.flatten().index_select(0, self._places).to(torch.bfloat16)
        self._seen.append(torch.where(counts.to(there.device), there, 0))

    def keep(self, mask: Tensor) -> None:
        """Forget the weights that went: `mask` keeps no other weights than the one before."""
        left = mask.flatten()[self._places.long()].nonzero().squeeze(1)
        self._places = self._places[left]
        self._seen = deque((gradient[left] for gradient in self._seen), maxlen=GRADIENTS)

    def forget(self) -> None:
        """All gradients so far."""
        self._seen.clear()

    @torch.no_grad()
    def score(self, weight: Tensor) -> Tensor:
        """float64 of the weight's shape, 0 where weights are gone. At least one gradient must have been seen."""
        scores = torch.zeros(weight.numel(), dtype=torch.float64, device=weight.device)
        count, places = len(self._places), self._places.long()
        if not count:
            return scores.view(weight.shape)
        # Of gradients in units of their root mean square, so that no scale of the loss is too large or too small.
        largest = torch.stack([one.abs().amax() for one in self._seen]).amax().float()
        largest = torch.where(largest > 0, largest, 1)
        unit = largest * torch.stack([(one.float() / largest).square().mean() for one in self._seen]).mean().sqrt()
        diagonals = []
        # What surrounds a step of training may compute in half precision.
        with torch.autocast(weight.device.type, enabled=False):
            for first in range(0, count, BLOCK * BLOCKS_AT_ONCE):
                some = torch.stack([one[first : first + BLOCK * BLOCKS_AT_ONCE] for one in self._seen])
                some = some.float() / torch.where(unit > 0, unit, 1)
                blocks = nn.functional.pad(some, (0, -some.shape[1] % BLOCK)).view(len(some), -1, BLOCK)
                fisher = torch.einsum("gbi,gbj->bij", blocks, blocks).double() / len(blocks)
                fisher.diagonal(dim1=1, dim2=2).add_(DAMPING)
                diagonals.append(torch.linalg.inv(fisher).diagonal(dim1=1, dim2=2).flatten()[: some.shape[1]])
        there = weight.flatten()[places].double() * torch.where(unit > 0, unit.double(), 1e-30)
        scores[places] = there.square() / torch.cat(diagonals)
        return scores.view(weight.shape)

    def gradients(self) -> Tensor:
        """bfloat16 [steps, weights that are there], the oldest first."""
        if not self._seen:
            return torch.empty(0, len(self._places), dtype=torch.bfloat16, device=self._places.device)
        return torch.stack(tuple(self._seen))
