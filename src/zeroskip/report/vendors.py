"""The vendor's libraries on one layer: bare, as tables of sparse products quote them, or with bias and ReLU.

A 1x1 convolution is a matrix product (cuBLAS through torch, cublasLt with a search of its algorithms, Triton with a
search of its blocks); any other is cuDNN's.  The opponents may lay out images as they like, outside the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported
from zeroskip.core.graph import Segment
from zeroskip.core.layer import Epilogue, Layer
from zeroskip.core.method import Candidate
from zeroskip.core.precision import held, searching
from zeroskip.methods import registry
from zeroskip.methods.dense.blocks import likely
from zeroskip.methods.dense.config import DenseConfig, Order, is_product
from zeroskip.methods.dense.epilogue import finish
from zeroskip.methods.dense.ready import triton_runs
from zeroskip.report import cublaslt

Call = Callable[[], Tensor]
"""Computes ``[n, k, p, q]``, whatever it lies like."""
Form = Callable[[Tensor], Call]
"""From images ``[n, c, h, w]`` to a call with memory of its own, which is full of NaN where it is not the library's."""

MOST_ALGORITHMS = 64
"""Of cublasLt's, shared by the orders in which a product can be laid out: each is checked and timed, some 10 ms."""
FUSED = Epilogue(True, "relu")
NONE = Epilogue()


@dataclass(frozen=True)
class Column:
    """One opponent of a layer: the ways to call it, of which the fastest counts, and what it computes."""

    forms: Mapping[str, Form]
    epilogue: Epilogue


def column(name: str, layer: Layer, weight: Tensor, bias: Tensor) -> Column:
    """The opponent called ``name``: "cublas", "cublaslt" or "cudnn", or one of these with "_epilogue" behind it.

    Args:
        weight: ``[k, c / groups, r, s]`` on the GPU.
        bias: ``[k]`` on the GPU.

    Raises:
        Unsupported: the layer is no matrix product, has no epilogue to compare with, or the library is not here.
    """
    library, _, kind = name.partition("_")
    epilogue = FUSED if kind else NONE
    if kind and layer.epilogue != FUSED:
        raise Unsupported(f"the case has no epilogue: {library} is the same")
    if library == "cudnn":
        return Column(_convolutions(layer, weight, bias, epilogue), epilogue)
    matrix = _matrix(layer, weight)
    if library == "cublaslt":
        return Column(_searched(layer, matrix, bias, epilogue), epilogue)
    return Column(_with_epilogue(layer, matrix, bias) if kind else _bare(layer, matrix), epilogue)


def triton_candidates(segment: Segment, device: Device) -> list[Candidate[Any]]:
    """Every block of Triton's product in both orders of dimensions, for the method ``dense`` to run; it has the whole
    epilogue inside.

    Raises:
        Unsupported: Triton does not run here, or the layer is no matrix product.
    """
    if not is_product(segment.layer):
        raise Unsupported(_no_product(segment.layer))
    if not triton_runs():
        raise Unsupported("Triton does not run here")
    orders: tuple[Order, ...] = ("nhwc", "nchw")
    ranked = [likely(segment.layer, device, by_rows=order == "nhwc") for order in orders]
    dense = registry()["dense"]
    return [
        dense.candidate(segment, DenseConfig(order, "triton", blocks))
        for alike in zip(*ranked, strict=True)
        for order, blocks in zip(orders, alike, strict=True)
    ]


def _matrix(layer: Layer, weight: Tensor) -> Tensor:
    if not is_product(layer):
        raise Unsupported(_no_product(layer))
    return weight.reshape(layer.shape.k, layer.shape.c).contiguous()


def _no_product(layer: Layer) -> str:
    return f"a plain 1x1 convolution is a matrix product, {layer.shape} is not"


# -- cuBLAS, through torch ----------------------------------------------------------------------------
def _bare(layer: Layer, matrix: Tensor) -> dict[str, Form]:
    shape, precision = layer.shape, layer.precision

    def batched(x: Tensor) -> Call:
        images, weights = x.reshape(shape.n, shape.c, -1), matrix[None].expand(shape.n, -1, -1)
        y = _unwritten(x, shape.n, shape.k, images.shape[2])

        def call() -> Tensor:
            with held(precision):
                return torch.bmm(weights, images, out=y).reshape(shape.output_shape)

        return call

    def one(x: Tensor) -> Call:
        pixels = _side_by_side(x)
        y = _unwritten(x, shape.k, pixels.shape[1])

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
        y = _unwritten(x, shape.n, shape.k, images.shape[2])

        def call() -> Tensor:
            with held(precision):
                return torch.baddbmm(column, weights, images, out=y).relu_().reshape(shape.output_shape)

        return call

    def one(x: Tensor) -> Call:
        pixels = _side_by_side(x)
        y = _unwritten(x, shape.k, pixels.shape[1])

        def call() -> Tensor:
            with held(precision):
                return _apart(torch.addmm(column, matrix, pixels, out=y).relu_(), layer)

        return call

    def fused(x: Tensor) -> Call:
        rows = _by_pixels(x)
        y = _unwritten(x, rows.shape[0], shape.k)

        def call() -> Tensor:
            with held(precision):
                # The library's own epilogue; its ReLU turns NaN into 0, which no input here has.
                torch._addmm_activation(bias, rows, matrix.t(), out=y)
                return _to_images(y, layer)

        return call

    forms: dict[str, Form] = {"one product, then ReLU": one, "channels last, fused epilogue": fused}
    return forms | ({"one product for each image, then ReLU": batched} if shape.n > 1 else {})


# -- cublasLt -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Way:
    """How a product is laid out: images in, memory out, and the result as images."""

    name: str
    product: cublaslt.Product
    turned: bool
    lay: Callable[[Tensor], Tensor]
    out: tuple[int, ...]
    """Of a tensor without gaps that a bias and a ReLU can be applied to."""
    back: Callable[[Tensor], Tensor]
    fuses: bool
    """Output channels are the rows of the library's matrix, so that its epilogue can add the bias."""


def _ways(layer: Layer) -> list[_Way]:
    """Both orders of dimensions, several images side by side or one by one, weights as they lie or turned."""
    shape, found = layer.shape, []
    k, c, pixels = shape.k, shape.c, shape.p * shape.q
    for turned in (False, True):
        suffix = ", weights turned" if turned else ""
        product = cublaslt.by_pixels(k, c, shape.n * pixels, turned)
        out: tuple[int, ...] = (shape.n * pixels, k)
        back = functools.partial(_to_images, layer=layer)
        found.append(_Way(f"channels last{suffix}", product, turned, _by_pixels, out, back, True))

        product = cublaslt.by_planes(k, c, shape.n * pixels, turned)
        out = (1, k, shape.n * shape.p, shape.q)
        back = functools.partial(_apart, layer=layer)
        found.append(_Way(f"one product{suffix}", product, turned, _side_by_side, out, back, False))

        if shape.n > 1:
            product = cublaslt.by_planes(k, c, pixels, turned, shape.n)
            name = f"one product for each image{suffix}"
            found.append(_Way(name, product, turned, torch.Tensor.contiguous, shape.output_shape, _as_it_is, False))
    return found


def _searched(layer: Layer, matrix: Tensor, bias: Tensor, epilogue: Epilogue) -> dict[str, Form]:
    """A form for each proposal of the library in each way.  What its epilogue cannot add is one more pass."""
    if not cublaslt.reachable(matrix):
        raise Unsupported("cublasLt runs on NVIDIA GPUs only")
    ways, forms = _ways(layer), dict[str, Form]()
    for way in ways:
        weights = matrix.t().contiguous() if way.turned else matrix
        inside = bias if way.fuses and epilogue.bias else None
        matmul = cublaslt.Matmul(way.product, weights, layer.precision, inside)
        rest = NONE if way.fuses else epilogue
        for number, algorithm in enumerate(matmul.algorithms(MOST_ALGORITHMS // len(ways)), 1):
            name = f"{way.name}: proposal {number}, {matmul.describe(algorithm)}"
            forms[name] = _proposal(way, matmul, algorithm, bias if rest.bias else None, rest)
    if not forms:
        raise Unsupported("cublasLt proposes no algorithm for this product")
    return forms


def _proposal(
    way: _Way, matmul: cublaslt.Matmul, algorithm: cublaslt.Algorithm, bias: Tensor | None, rest: Epilogue
) -> Form:
    def form(x: Tensor) -> Call:
        laid, y = way.lay(x), _unwritten(x, *way.out)

        def call() -> Tensor:
            matmul(algorithm, laid, y)
            return way.back(finish(y, bias, rest, None))

        return call

    return form


# -- cuDNN --------------------------------------------------------------------------------------------
def _convolutions(layer: Layer, weight: Tensor, bias: Tensor, epilogue: Epilogue) -> dict[str, Form]:
    """cuDNN with search in both orders of dimensions, and with an epilogue its fused operator too."""
    shape, precision = layer.shape, layer.precision
    geometry: tuple[Any, ...] = (shape.stride, shape.padding, shape.dilation, shape.groups)

    def ordinary(images: Tensor, filters: Tensor) -> Tensor:
        y = functional.conv2d(images, filters, None, *geometry)
        return finish(y, bias if epilogue.bias else None, epilogue, None)

    def fused(images: Tensor, filters: Tensor) -> Tensor:
        # It adds zero times what its output held; an output that held NaN would be found wrong.
        return torch.cudnn_convolution_relu(images, filters, bias, *geometry)

    def form(compute: Callable[[Tensor, Tensor], Tensor], order: torch.memory_format) -> Form:
        filters = weight.contiguous(memory_format=order)

        def on(x: Tensor) -> Call:
            images = x.contiguous(memory_format=order)

            def call() -> Tensor:
                with held(precision), searching():
                    return compute(images, filters)

            return call

        return on

    orders = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    forms = {name: form(ordinary, order) for name, order in orders.items()}
    if epilogue.bias and weight.is_cuda:
        forms |= {f"{name}, fused epilogue": form(fused, order) for name, order in orders.items()}
    return forms


# -- how images lie -----------------------------------------------------------------------------------
def _unwritten(x: Tensor, *shape: int) -> Tensor:
    """An output in which whatever is not written will be found."""
    return x.new_full(shape, torch.nan)


def _as_it_is(y: Tensor) -> Tensor:
    return y


def _side_by_side(x: Tensor) -> Tensor:
    """``[c, n h w]``, a copy where there are several images: what a product of one large matrix would be given."""
    return x.transpose(0, 1).reshape(x.shape[1], -1).contiguous()


def _apart(y: Tensor, layer: Layer) -> Tensor:
    """The images of ``[k, n p q]``, a view."""
    shape = layer.shape
    return y.reshape(shape.k, shape.n, shape.p, shape.q).transpose(0, 1)


def _by_pixels(x: Tensor) -> Tensor:
    """``[n h w, c]``, a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _to_images(y: Tensor, layer: Layer) -> Tensor:
    """The images of ``[n p q, k]``, a view."""
    shape = layer.shape
    return y.reshape(shape.n, shape.p, shape.q, shape.k).permute(0, 3, 1, 2)
