"""The host's side of ``pixels.cuh``: a 1x1 convolution as a matrix product over the pixels of all images."""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.core.layer import ConvShape, Layer

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
PLACES = {"none": 0, "before": 1, "after": 2}
"""Values of ``Activation`` and ``Residual`` in ``types.cuh``."""
TYPES = {"fp32": "float", "tf32": "float", "fp16": "__half", "bf16": "__nv_bfloat16"}
"""Of the elements in memory, by precision; kernels that sum in float32 need no TF32."""


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


def first_channel(shape: ConvShape) -> Tensor:
    """int64 ``[k]``: the first input channel of each output channel's group."""
    return torch.arange(shape.k) // (shape.k // shape.groups) * (shape.c // shape.groups)


def grouped(dense: Tensor, weight_shape: tuple[int, int, int, int], groups: int) -> Tensor:
    """``[k, c]`` over all input channels -> ``[k, c / groups, 1, 1]``."""
    k, inputs, _, _ = weight_shape
    parts = dense.reshape(groups, k // groups, groups, inputs)
    return torch.stack([parts[group, :, group] for group in range(groups)]).reshape(weight_shape)
