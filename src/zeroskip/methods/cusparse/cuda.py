"""The call of cuSPARSE, through torch, and the epilogue behind it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zeroskip.core.layer import Layer
from zeroskip.core.oracle import activate_


@dataclass(frozen=True)
class CusparsePacked:
    """A CSR matrix ``[k, columns]``: ``row_offsets`` int32 ``[k + 1]``, ``col_indices`` int32 ``[nnz]`` (ascending in a
    row), ``values`` float32 ``[nnz]``; ``bias`` float32 ``[k]``."""

    row_offsets: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None
    columns: int


class CusparseRun:
    """``y = W x`` for each image ``x [c, h w]`` in NCHW, sums in float32; no matrix is copied.

    Bias and a residual before the activation are what the library adds the product to.
    """

    workspace_bytes = 0
    allocates = False

    def __init__(self, layer: Layer, packed: CusparsePacked) -> None:
        self.epilogue = layer.epilogue
        self.bias = None if packed.bias is None else packed.bias.reshape(-1, 1, 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")  # torch 2.11: not so
            self.weight = torch.sparse_csr_tensor(
                packed.row_offsets,
                packed.col_indices,
                packed.values,
                (layer.shape.k, packed.columns),
                check_invariants=True,
            )

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        x, y = inputs[0], outputs[0]
        beta = self._start(y, residual if self.epilogue.residual == "before" else None)
        for image, result in zip(x.flatten(2), y.view(*y.shape[:2], -1), strict=True):
            torch.addmm(result, self.weight, image, beta=beta, out=result)
        activate_(y, self.epilogue.activation)
        if self.epilogue.residual == "after" and residual is not None:
            y += residual
        return (y,)

    def _start(self, y: Tensor, residual: Tensor | None) -> int:
        """Write what the product is added to into ``y``; 0 if there is nothing, and ``y`` is not to be read."""
        if self.bias is not None and residual is not None:
            torch.add(residual, self.bias, out=y)
        elif self.bias is not None:
            y.copy_(self.bias)
        elif residual is not None:
            y.copy_(residual)
        else:
            return 0
        return 1
