"""The host's side of ``pixels.cuh``: a 1x1 convolution as a matrix product over the pixels of all images."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zeroskip.core.device import Device
from zeroskip.core.layer import ConvShape, Layer
from zeroskip.core.layout import Layout
from zeroskip.cuda.types import ACTIVATIONS, PLACES
from zeroskip.pack.csr import Csr


class Pixels:
    """Arguments ``count, per_image, per_row``, the strides of x, y and residual, ``activation, place``."""

    def __init__(self, layer: Layer) -> None:
        shape, epilogue = layer.shape, layer.epilogue
        self.counts = (shape.n * shape.p * shape.q, shape.p * shape.q, shape.q)
        self.stride = shape.stride
        self.codes = (ACTIVATIONS[epilogue.activation], PLACES[epilogue.residual])

    def arguments(self, x: Tensor, y: Tensor, residual: Tensor | None) -> tuple[int, ...]:
        """For ``x [n, c, h, w]``, ``y`` and ``residual [n, k, p, q]`` of any strides with contiguous columns."""
        image, channel, row, column = x.stride()
        x_plane = (image, channel, row * self.stride[0], column * self.stride[1])
        r_plane = (0, 0, 0) if residual is None else residual.stride()[:3]
        return *self.counts, *x_plane, *y.stride()[:3], *r_plane, *self.codes


def layouts(layer: Layer, vector: int) -> tuple[Layout, Layout]:
    """How inputs and output of such a product must lie that reads ``vector`` neighbouring pixels at once: several
    want planes without gaps, one may lie within borders."""
    if layer.kind == "linear":
        return Layout("rows"), Layout("rows")
    if vector > 1:
        return Layout("nchw", (0, 0), aligned=vector), Layout("nchw", (0, 0))
    return Layout("nchw"), Layout("nchw", writes_halo=True)


def refusal(layer: Layer, device: Device) -> str | None:
    """Why the layer is no such product for kernels that sum in float32, or None."""
    shape = layer.shape
    if device.kind != "cuda":
        return "runs on NVIDIA GPUs only"
    if (shape.r, shape.s) != (1, 1) or shape.padding != (0, 0):
        kernel = f"{shape.r}x{shape.s} padded by {shape.padding}"
        return f"is for 1x1 convolutions without padding, the layer is {kernel}"
    if layer.precision == "fp64":
        return "sums in fp32, the layer is fp64"
    if 0 in shape.output_shape:
        return "the batch is empty"
    return None


_matrices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def matrix(weight: Tensor, shape: ConvShape) -> Csr:
    """``[k, c / groups, 1, 1]`` -> a matrix over all input channels.

    Remembered as long as ``weight`` lives and is not written to: a planner packs it once for every configuration.
    """
    if weight.is_inference():  # which does not know when it was written to
        return _matrix(weight, shape)
    if weight in _matrices:
        version, known = _matrices[weight]
        if version == weight._version:
            return cast(Csr, known)
    found = _matrix(weight, shape)
    _matrices[weight] = weight._version, found
    return found


def _matrix(weight: Tensor, shape: ConvShape) -> Csr:
    csr = Csr.of(weight.reshape(shape.k, -1))
    first = torch.arange(shape.k) // (shape.k // shape.groups) * (shape.c // shape.groups)
    return replace(csr, shape=(shape.k, shape.c), col_indices=csr.col_indices + first[csr.row_indices])


def grouped(dense: Tensor, weight_shape: tuple[int, int, int, int], groups: int) -> Tensor:
    """``[k, c]`` over all input channels -> ``[k, c / groups, 1, 1]``."""
    k, inputs, _, _ = weight_shape
    parts = dense.reshape(groups, k // groups, groups, inputs)
    return torch.stack([parts[group, :, group] for group in range(groups)]).reshape(weight_shape)
