"""The call of cuSPARSELt, through torch, and the activation behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from zeroskip.core.layer import Layer
from zeroskip.core.oracle import activate_

ROWS_AND_DEPTH, COLUMNS = 16, 8
"""What the sizes must be multiples of, in fp16 and bf16.

Source: ``torch.sparse.SparseSemiStructuredTensorCUSPARSELT``, shape constraints, torch 2.11 and 2.13.
"""


@dataclass(frozen=True)
class CusparseltPacked:
    """``weight [k, c]`` with its zeros, at most two nonzeros in every aligned four of a row: the library compresses it
    at bind, on the GPU.  ``bias [k]``."""

    weight: Tensor
    bias: Tensor | None
    order: Literal["nchw", "nhwc"]


class CusparseltRun:
    """``y [k, pixels] = W x + bias`` in one call, by the library's default algorithm; then the activation.

    Channels-last pixels that are no multiple of 8 are copied into a matrix that is.  In fp16 a copy transposes the
    result: where the library does, each call takes 0.2 s of the host and 22 MB (torch 2.11, H200; in bf16 it does not).
    """

    workspace_bytes = 0
    allocates = True

    def __init__(self, layer: Layer, packed: CusparseltPacked) -> None:
        self.layer, self.bias = layer, packed.bias
        self.by_rows, self.images = packed.order == "nhwc", layer.kind == "conv2d"
        self.compressed = torch._cslt_compress(packed.weight)

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        x, shape = inputs[0], self.layer.shape
        if self.by_rows:
            rows = (x.permute(0, 2, 3, 1) if self.images else x).reshape(-1, shape.c)
            missing = -len(rows) % COLUMNS
            padded = functional.pad(rows, (0, 0, 0, missing)) if missing else rows
            y = self._multiply(padded.t())[: len(rows)].contiguous()
            if self.images:
                y = y.view(shape.n, shape.p, shape.q, shape.k).permute(0, 3, 1, 2)
            else:
                y = y.view(*x.shape[:-1], shape.k)
        else:
            y = self._multiply(x[0].flatten(1).contiguous()).view(shape.output_shape)
        return (activate_(y, self.layer.epilogue.activation),)

    def _multiply(self, dense: Tensor) -> Tensor:
        """``[k, pixels]`` of contiguous ``[c, pixels]``; by rows, ``[pixels, k]`` of ``[pixels, c]`` transposed."""
        transpose = self.by_rows and dense.dtype is torch.bfloat16
        y = torch._cslt_sparse_mm(self.compressed, dense, bias=self.bias, transpose_result=transpose)
        return y.t() if self.by_rows and not transpose else y
