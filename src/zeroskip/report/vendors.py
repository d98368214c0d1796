"""cuBLAS on a 1x1 convolution as a matrix product: bare, as tables of sparse products quote it, or with an epilogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zeroskip.core.errors import Unsupported
from zeroskip.core.layer import Epilogue, Layer
from zeroskip.core.precision import held

Call = Callable[[], Tensor]
"""Computes ``[n, k, p, q]``, whatever it lies like."""
Form = Callable[[Tensor], Call]
"""From images ``[n, c, h, w]`` to a call with memory of its own."""


@dataclass(frozen=True)
class Column:
    """One opponent of a layer: the ways to call it, of which the fastest counts, and what it computes."""

    forms: Mapping[str, Form]
    epilogue: Epilogue


def column(name: str, layer: Layer, weight: Tensor, bias: Tensor) -> Column:
    """The opponent called ``name`` ("cublas", "cublas_epilogue").

    Args:
        weight: ``[k, c, 1, 1]`` on the GPU.
        bias: ``[k]`` on the GPU.

    Raises:
        Unsupported: the layer is no matrix product, or has no epilogue to compare with.
    """
    shape = layer.shape
    if (shape.r, shape.s, *shape.stride, *shape.padding, shape.groups) != (1, 1, 1, 1, 0, 0, 1):
        raise Unsupported(f"a plain 1x1 convolution is a matrix product, {shape} is not")
    matrix = weight.reshape(shape.k, shape.c).contiguous()
    if name == "cublas":
        return Column(_bare(layer, matrix), Epilogue())
    if layer.epilogue != Epilogue(True, "relu"):
        raise Unsupported("the case has no epilogue: cublas is the same")
    return Column(_with_epilogue(layer, matrix, bias), layer.epilogue)


def _bare(layer: Layer, matrix: Tensor) -> dict[str, Form]:
    shape, precision = layer.shape, layer.precision

    def batched(x: Tensor) -> Call:
        images, weights = x.reshape(shape.n, shape.c, -1), matrix[None].expand(shape.n, -1, -1)
        y = x.new_empty(shape.n, shape.k, images.shape[2])

        def call() -> Tensor:
            with held(precision):
                return torch.bmm(weights, images, out=y).reshape(shape.output_shape)

        return call

    def one(x: Tensor) -> Call:
        pixels = _side_by_side(x)
        y = x.new_empty(shape.k, pixels.shape[1])

        def call() -> Tensor:
            with held(precision):
                return _apart(torch.mm(matrix, pixels, out=y), layer)

        return call

    forms: dict[str, Form] = {"one product": one}
    return forms | ({"one product for each image": batched} if shape.n > 1 else {})


def _with_epilogue(layer: Layer, matrix: Tensor, bias: Tensor) -> dict[str, Form]:
    shape, precision = layer.shape, layer.precision
    column = bias[:, None]

    def batched(x: Tensor) -> Call:
        images, weights = x.reshape(shape.n, shape.c, -1), matrix[None].expand(shape.n, -1, -1)
        y = x.new_empty(shape.n, shape.k, images.shape[2])

        def call() -> Tensor:
            with held(precision):
                return torch.baddbmm(column, weights, images, out=y).relu_().reshape(shape.output_shape)

        return call

    def one(x: Tensor) -> Call:
        pixels = _side_by_side(x)
        y = x.new_empty(shape.k, pixels.shape[1])

        def call() -> Tensor:
            with held(precision):
                return _apart(torch.addmm(column, matrix, pixels, out=y).relu_(), layer)

        return call

    def fused(x: Tensor) -> Call:
        rows = x.permute(0, 2, 3, 1).reshape(-1, shape.c).contiguous()
        y = x.new_empty(rows.shape[0], shape.k)

        def call() -> Tensor:
            with held(precision):
                # The library's own epilogue; its ReLU turns NaN into 0, which no input here has.
                torch._addmm_activation(bias, rows, matrix.t(), out=y)
                return y.reshape(shape.n, shape.p, shape.q, shape.k).permute(0, 3, 1, 2)

        return call

    forms: dict[str, Form] = {"one product, then ReLU": one, "channels last, fused epilogue": fused}
    return forms | ({"one product for each image, then ReLU": batched} if shape.n > 1 else {})


def _side_by_side(x: Tensor) -> Tensor:
    """``[c, n h w]``, a copy where there are several images: what a product of one large matrix would be given."""
    return x.transpose(0, 1).reshape(x.shape[1], -1).contiguous()


def _apart(y: Tensor, layer: Layer) -> Tensor:
    shape = layer.shape
    return y.reshape(shape.k, shape.n, shape.p, shape.q).transpose(0, 1)
