"""The NVIDIA side: cuDNN and cuBLAS through torch, and Triton's matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from zeroskip.core.device import Device
from zeroskip.core.layer import Layer
from zeroskip.core.method import Run
from zeroskip.core.precision import held, searching
from zeroskip.methods.dense.blocks import likely
from zeroskip.methods.dense.config import DenseConfig, DensePacked, Order, is_product
from zeroskip.methods.dense.epilogue import finish
from zeroskip.methods.dense.ready import triton_runs

MOST_BLOCKS = 5
"""Of Triton's product, tried in each order: every one takes about a second to compile, and of 38 layers on an H100
(records fig10, fig11, squares) none wanted one beyond the fifth."""


def configs(layer: Layer, device: Device) -> list[DenseConfig]:
    """The best guess of each library first, then more blocks.  A planner that tries only some still meets them all."""
    orders: tuple[Order, ...] = ("nchw", "nhwc")
    if layer.kind == "linear":
        orders = ("nchw",)
    elif layer.precision in ("fp16", "bf16"):
        orders = ("nhwc", "nchw")
    found = [DenseConfig(order, "torch") for order in orders]
    if not is_product(layer):
        return found
    if layer.kind == "conv2d" or _wants_relu(layer):
        found += [DenseConfig(order, "cublas") for order in orders]
    if layer.precision != "fp64" and triton_runs():
        found += _triton(layer, device)
    return found


def _triton(layer: Layer, device: Device) -> list[DenseConfig]:
    """Likeliest blocks first; of convolutions in both orders, NHWC first: float32 goes into tensor cores as it lies."""
    orders: tuple[Order, ...] = ("nchw",) if layer.kind == "linear" else ("nhwc", "nchw")
    ranked = [likely(layer, device, layer.kind == "linear" or order == "nhwc")[:MOST_BLOCKS] for order in orders]
    return [
        DenseConfig(order, "triton", blocks)
        for alike in zip(*ranked, strict=True)
        for order, blocks in zip(orders, alike, strict=True)
    ]


def compile_ahead(packed: DensePacked) -> None:
    """Compile Triton's kernel for tensors as the layer will have them, so that the first call finds it: here several
    threads may compile at once."""
    if not triton_runs():
        return
    layer, dtype = packed.layer, packed.weight.dtype
    order = torch.channels_last if packed.config.order == "nhwc" else torch.contiguous_format
    images = layer.kind == "conv2d"

    def like(shape: tuple[int, ...]) -> Tensor:
        size = shape if images else shape[:2]
        return torch.empty(size, dtype=dtype, device="meta", memory_format=order)

    x, y = like(layer.shape.input_shape), like(layer.shape.output_shape)
    bias = None if packed.bias is None else packed.bias.to("meta")
    run = TritonRun(replace(packed, weight=packed.weight.to("meta"), bias=bias))
    run([x], [y], None, None if layer.epilogue.residual == "none" else y)


def bind(packed: DensePacked) -> Run:
    """Raises ``ValueError`` for a library of the CPU."""
    triton_runs()  # tried here for the first time, not while a graph is captured
    library, layer = packed.config.library, packed.layer
    if library == "onednn":
        raise ValueError("onednn runs on the CPU only, this layer is bound on a GPU")
    if library == "triton":
        return TritonRun(packed)
    if library == "cublas":
        return ProductRun(packed)
    return LinearRun(packed) if layer.kind == "linear" else ConvRun(packed)


class LibraryRun:
    """A call of torch's and the epilogue behind it, with the precision that the layer asks for."""

    workspace_bytes = 0
    allocates = True

    def __init__(self, packed: DensePacked) -> None:
        self.layer = layer = packed.layer
        self.shape, self.epilogue = layer.shape, layer.epilogue
        self.weight, self.bias, self.config = packed.weight, packed.bias, packed.config

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        with held(self.layer.precision):
            return (self.compute(inputs[0], residual),)

    def compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        raise NotImplementedError


class ConvRun(LibraryRun):
    def compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        shape = self.shape
        with searching():
            y = functional.conv2d(x, self.weight, None, shape.stride, shape.padding, shape.dilation, shape.groups)
        return finish(y, self.bias, self.epilogue, residual)


class LinearRun(LibraryRun):
    def compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return finish(functional.linear(x, self.weight, self.bias), None, self.epilogue, residual)


class ProductRun(LibraryRun):
    """cuBLAS on the images where they lie.

    NCHW: one product per image in a single batched call, the weights not repeated in memory.  Channels last and linear
    layers: one product of all pixels, with the bias and, where that keeps NaN, the ReLU in the library's epilogue.
    """

    def __init__(self, packed: DensePacked) -> None:
        super().__init__(packed)
        layer = packed.layer
        self.images = layer.kind == "conv2d"
        self.by_rows = not self.images or packed.config.order == "nhwc"
        self.fuses_relu = self.by_rows and _wants_relu(layer) and keeps_nan(packed)
        self.rest = replace(layer.epilogue, activation="none") if self.fuses_relu else layer.epilogue

    def compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if not self.by_rows:
            return finish(self._planes(x), self.bias, self.epilogue, residual)
        if not self.images:
            return finish(self._rows(x.flatten(0, -2)).view(*x.shape[:-1], -1), None, self.rest, residual)
        n, k, p, q = self.shape.output_shape
        y = self._rows(x.permute(0, 2, 3, 1).flatten(0, 2)).view(n, p, q, k)
        return finish(y.permute(0, 3, 1, 2), None, self.rest, residual)

    def _planes(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2)
        if len(x) == 1:
            return torch.mm(self.weight, pixels[0]).view(self.shape.output_shape)
        return torch.bmm(self.weight.expand(len(x), -1, -1), pixels).view(self.shape.output_shape)

    def _rows(self, rows: Tensor) -> Tensor:
        """``[rows, k]`` with the bias."""
        if self.bias is None:
            return torch.mm(rows, self.weight.t())
        if self.fuses_relu:
            return torch._addmm_activation(self.bias, rows, self.weight.t())
        return torch.addmm(self.bias, rows, self.weight.t())


class TritonRun:
    """Our own product; writes where it is told, channels-last images excepted, for which nobody lays out memory."""

    workspace_bytes = 0

    def __init__(self, packed: DensePacked) -> None:
        assert packed.config.blocks is not None
        self.layer, self.packed, self.blocks = packed.layer, packed, packed.config.blocks
        images = self.layer.kind == "conv2d"
        self.view = _planes if images and packed.config.order == "nchw" else _pixels if images else _rows
        self.allocates = self.view is _pixels

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        from zeroskip.methods.dense.matmul import multiply

        x, layer = inputs[0], self.layer
        if self.allocates:
            shape = layer.shape.output_shape
            y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        else:
            y = outputs[0]
        view = self.view
        multiply(
            self.packed.weight,
            view(x),
            self.packed.bias,
            None if residual is None else view(residual),
            view(y),
            layer.epilogue,
            layer.precision,
            self.blocks,
        )
        return (y,)


def _planes(x: Tensor) -> Tensor:
    """``[images, channels, pixels]``, a view of images in NCHW without gaps in a plane."""
    return x.view(*x.shape[:2], -1)


def _rows(x: Tensor) -> Tensor:
    """``[1, channels, rows]``, a view of rows of features."""
    return x.view(-1, x.shape[-1]).t()[None]


def _pixels(x: Tensor) -> Tensor:
    """``[1, channels, pixels]``, a view of channels-last images."""
    return _rows(x.permute(0, 2, 3, 1))


def _wants_relu(layer: Layer) -> bool:
    """Whether a bias and a ReLU follow the product, and nothing between them."""
    epilogue = layer.epilogue
    return epilogue.bias and epilogue.activation == "relu" and epilogue.residual != "before"


def keeps_nan(packed: DensePacked) -> bool:
    """Whether the library's fused ReLU is there and leaves NaN as it is, as torch's does, for products of this size."""
    fused = getattr(torch, "_addmm_activation", None)
    if fused is None or packed.bias is None:
        return False
    weight, layer = packed.weight, packed.layer
    shape = layer.shape
    rows = torch.full((shape.n * shape.p * shape.q, shape.c), torch.nan, dtype=weight.dtype, device=weight.device)
    with held(layer.precision):
        return bool(fused(packed.bias, rows, weight.t()).isnan().all())
