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
"""Inverted together; 134 MB."""


class Fisher:
    """The last gradients of those weights of a layer that are still there, and the weights' scores.

    The score of a weight w is w^2 / [F^-1] with the diagonal element of the inverse of F, the empirical Fisher matrix
    of `BLOCK` neighbours (row-major, weights that are gone left out), damped. Half of it is how much the loss grows,
    to the second order, if w goes and its neighbours make up for it.

    Args:
        mask: bool, of the weight's shape: which weights are there.
        gradients: float [steps, weights that are there], the oldest first, to go on from.

    Source: Singh & Alistarh 2020, "WoodFisher" (arXiv 2004.14340), section 3, without its change of the other weights,
    which training does here.
    """

    def __init__(self, mask: Tensor, gradients: Iterable[Tensor] = ()) -> None:
        self._places = mask.flatten().nonzero().squeeze(1)
        self._seen = deque((one.to(mask.device) for one in gradients), maxlen=GRADIENTS)

    def __len__(self) -> int:
        return len(self._seen)

    @torch.no_grad()
    def see(self, gradient: Tensor) -> None:
        """Remember a gradient of the weight's shape, in bfloat16; what is infinite or NaN there counts as 0.

        A step that overflowed under a gradient scaler has such gradients, and changes no weight.
        """
        there = gradient.flatten()[self._places].to(torch.bfloat16)
        self._seen.append(there.nan_to_num_(0.0, 0.0, 0.0))

    def keep(self, mask: Tensor) -> None:
        """Forget the weights that went: `mask` keeps no other weights than the one before."""
        left = mask.flatten()[self._places]
        self._places = self._places[left]
        self._seen = deque((gradient[left] for gradient in self._seen), maxlen=GRADIENTS)

    @torch.no_grad()
    def score(self, weight: Tensor) -> Tensor:
        """float32 of the weight's shape, 0 where weights are gone. At least one gradient must have been seen."""
        gradients = self.gradients().float()
        count = len(self._places)
        damping = DAMPING * gradients.square().mean().clamp(min=1e-12)
        blocks = nn.functional.pad(gradients, (0, -count % BLOCK)).view(len(gradients), -(-count // BLOCK), BLOCK)
        diagonals = []
        for some in torch.split(blocks, BLOCKS_AT_ONCE, dim=1):
            fisher = torch.einsum("gbi,gbj->bij", some, some).double() / len(gradients)
            fisher.diagonal(dim1=1, dim2=2).add_(damping)
            diagonals.append(torch.linalg.inv(fisher).diagonal(dim1=1, dim2=2).flatten())
        inverse = torch.cat(diagonals)[:count].clamp(min=1e-30)
        scores = torch.zeros(weight.numel(), device=weight.device)
        scores[self._places] = (weight.flatten()[self._places].double().square() / inverse).float()
        return scores.view(weight.shape)

    def gradients(self) -> Tensor:
        """bfloat16 [steps, weights that are there], the oldest first."""
        if not self._seen:
            return torch.empty(0, len(self._places), dtype=torch.bfloat16, device=self._places.device)
        return torch.stack(tuple(self._seen))
