"""The call of cuSPARSE, through torch, and the epilogue behind it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from zeroskip.core.layer import Layer


@dataclass(frozen=True)
class CusparsePacked:
    """A CSR matrix ``[k, columns]``: ``row_offsets`` int32 ``[k + 1]``, ``col_indices`` int32 ``[nnz]`` (ascending in a
    row), ``values [nnz]``; ``bias [k]``."""

    row_offsets: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None
    columns: int
    order: Literal["nchw", "nhwc"]


class CusparseRun:
    """``y = W x`` for each image ``x [c, h w]``; or, for channels-last images and rows of features, once for all, both
    dense matrices with the channels contiguous.  No matrix is copied; sums are float32 for every type but float64.

    Bias and a residual before the activation are what the library adds the product to: half precision is rounded once.
    """

    workspace_bytes = 0

    def __init__(self, layer: Layer, packed: CusparsePacked) -> None:
        self.epilogue, self.shape = layer.epilogue, layer.shape
        self.by_rows, self.images = packed.order == "nhwc", layer.kind == "conv2d"
        self.allocates = self.images and self.by_rows
        self.bias = packed.bias
        if packed.bias is not None and self.images:
            self.bias = packed.bias.reshape(-1, 1, 1)
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
        x, shape = inputs[0], self.shape.output_shape
        if self.allocates:
            y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        else:
            y = outputs[0]
        beta = self._start(y, residual if self.epilogue.residual == "before" else None)
        if self.by_rows:
            self._multiply(self._columns(x), self._columns(y), beta)
        else:
            for image, result in zip(x.flatten(2), y.view(*y.shape[:2], -1), strict=True):
                self._multiply(image, result, beta)
        if self.epilogue.activation == "relu":
            y.relu_()
        elif self.epilogue.activation == "relu6":
            functional.relu6(y, inplace=True)
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

    def _multiply(self, x: Tensor, y: Tensor, beta: int) -> None:
        """``y [k, pixels] = beta y + W x``."""
        torch.addmm(y, self.weight, x, beta=beta, out=y)

    def _columns(self, x: Tensor) -> Tensor:
        """``[channels, pixels]``, a view of channels-last images or of rows of features."""
        rows = x.permute(0, 2, 3, 1) if self.images else x
        return rows.view(-1, rows.shape[-1]).t()
