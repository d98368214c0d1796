"""The CPU side: torch's operators and oneDNN's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zeroskip.core.errors import Unsupported
from zeroskip.core.layer import Layer
from zeroskip.core.method import Run
from zeroskip.methods.dense.config import DenseConfig, DensePacked
from zeroskip.methods.dense.epilogue import finish


def configs(layer: Layer) -> list[DenseConfig]:
    """Best guess first."""
    if layer.kind == "linear":
        return [DenseConfig("nchw", "torch")]
    found = [DenseConfig("nchw", "torch"), DenseConfig("nhwc", "torch")]
    if torch._C._has_mkldnn and layer.shape.n > 0 and layer.precision == "fp32":
        found.insert(0, DenseConfig("nhwc", "onednn"))
    return found


def bind(packed: DensePacked) -> Run:
    """Raises ``Unsupported`` for a library that needs a GPU."""
    library = packed.config.library
    if library not in ("torch", "onednn"):
        raise Unsupported(f"{library} runs on NVIDIA GPUs only")
    if packed.layer.kind == "linear":
        return LinearRun(packed)
    return OnednnRun(packed) if library == "onednn" else ConvRun(packed)


class ConvRun:
    """The ordinary operators; kinds differ in ``compute``."""

    workspace_bytes = 0
    allocates = True

    def __init__(self, packed: DensePacked) -> None:
        self.shape, self.epilogue = packed.layer.shape, packed.layer.epilogue
        self.weight, self.bias = packed.weight, packed.bias

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        return (self.compute(inputs[0], residual),)

    def compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        shape = self.shape
        y = functional.conv2d(x, self.weight, self.bias, shape.stride, shape.padding, shape.dilation, shape.groups)
        return finish(y, None, self.epilogue, residual)


class LinearRun(ConvRun):
    def compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return finish(functional.linear(x, self.weight, self.bias), None, self.epilogue, residual)


class OnednnRun(ConvRun):
    """Weights in oneDNN's own order, a residual sum fused.

    The activation is not: oneDNN's ReLU turns NaN into 0, torch's does not.  The operators are torch's own but not
    documented, so their absence or refusal is found at bind, not at run.
    """

    def __init__(self, packed: DensePacked) -> None:
        super().__init__(packed)
        shape = self.shape
        self.geometry: tuple[Any, ...] = (shape.padding, shape.stride, shape.dilation, shape.groups)
        self.after_sum = replace(self.epilogue, residual="none")
        self.reordered = torch.ops.aten.mkldnn_reorder_conv2d_weight(
            packed.weight.to_mkldnn(), *self.geometry, shape.input_shape
        )

    def compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        operator, weights = torch.ops.mkldnn._convolution_pointwise, (self.reordered, self.bias)
        if residual is not None and self.epilogue.residual == "before":
            y = operator.binary(x, residual, *weights, *self.geometry, "add", 1.0, None, [], None)
            return finish(y, None, self.after_sum, None)
        return finish(operator(x, *weights, *self.geometry, "none", [], ""), None, self.epilogue, residual)
