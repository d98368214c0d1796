"""What is right: the convolution with its epilogue in float64, and how far a result may lie from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from zeroskip.core.layer import Activation, Layer, Precision, ResidualPlace

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
"""Half the distance from 1 to the next number of the type."""

UNDERFLOW = {dtype: torch.finfo(dtype).smallest_normal * unit for dtype, unit in UNIT_ROUNDOFF.items()}
"""Half the distance from 0 to the next number of the type: the error of rounding what is too small for a normal one."""

TF32_PRODUCT = 2.0**-9 * (1 + 2.0**-11)
"""Relative error of a product whose two factors were cut to 10 bits behind the point, ``2^-10`` each."""


TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1, "fp64": 1e-4}
"""Largest relative distance at which a dense library or a whole network counts as right: these round as often as they
like, so the elementwise bound is not for them."""


@dataclass(frozen=True)
class Expected:
    """``value`` and the largest permitted distance from it, float64, of the output's shape; what that comes from:
    ``magnitude``, ``|W| * |x| + |bias| + |residual|``, and ``nonzeros`` of each output channel."""

    value: Tensor
    bound: Tensor
    magnitude: Tensor
    nonzeros: Tensor

    def rounded(self, terms: int) -> Tensor:
        """The permitted distance where products are rounded to float16 and up to ``terms`` of them are added in it.

        ``t u / (1 - t u)`` of the magnitude more, and half of the smallest float16 for each product too small for a
        normal one, as long as no sum in float16 exceeds 65504.  Source: as for ``expected``.
        """
        if terms == 0:
            return self.bound
        error = terms * UNIT_ROUNDOFF[torch.float16]
        return self.bound + error / (1 - error) * self.magnitude + UNDERFLOW[torch.float16] * self.nonzeros


def activate(y: Tensor, activation: Activation) -> Tensor:
    """The activation as torch computes it (NaN stays NaN)."""
    if activation == "relu":
        return functional.relu(y)
    return functional.relu6(y) if activation == "relu6" else y


def activate_(y: Tensor, activation: Activation) -> Tensor:
    """The same in place."""
    if activation == "relu":
        return y.relu_()
    return functional.relu6(y, inplace=True) if activation == "relu6" else y


def epilogue(y: Tensor, activation: Activation, place: ResidualPlace, residual: Tensor | None) -> Tensor:
    """``act(y + residual)`` or ``act(y) + residual``."""
    if place == "before" and residual is not None:
        y = y + residual
    y = activate(y, activation)
    return y + residual if place == "after" and residual is not None else y


def expected(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Expected:
    """The float64 result for ``layer`` and its elementwise error bound.

    The bound is ``(n + 4) u (|W| * |x| + |bias| + |residual|) + u |y|`` with ``n`` the nonzeros of the output
    channel and ``u`` the unit roundoff of float32 accumulation: rigorous for any order of summation, so no
    tolerance is tuned.  Where the layer's precision is tf32, ``|W| * |x|`` counts ``2^-9`` more for its rounded
    operands.  All activations here have Lipschitz constant 1.  Underflow adds half of the smallest number of float32
    for each product and of the output's type once.

    Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed. 2002, sections 2.1, 3.1 and 4.2.

    Args:
        x: float ``[n, c, h, w]``, or ``[rows, c]`` for a linear layer.
        weight: ``[k, c / groups, r, s]`` or ``[k, c]``.
        bias: ``[k]`` or None.
        residual: of the output's shape, or None.
    """
    shape, place = layer.shape, layer.epilogue.residual
    x64 = x.double().reshape(shape.input_shape)
    w64 = weight.double().reshape(shape.weight_shape)
    out_shape = shape.output_shape if x.dim() == 4 else (*x.shape[:-1], shape.k)

    def convolve(inputs: Tensor, weights: Tensor, offset: Tensor | None) -> Tensor:
        y = functional.conv2d(inputs, weights, offset, shape.stride, shape.padding, shape.dilation, shape.groups)
        return y.reshape(out_shape)

    r64 = None if residual is None else residual.double()
    value = epilogue(convolve(x64, w64, None if bias is None else bias.double()), layer.epilogue.activation, place, r64)
    magnitude = convolve(x64.abs(), w64.abs(), None if bias is None else bias.double().abs())
    if r64 is not None and place != "none":
        magnitude = magnitude + r64.abs()
    nnz = (w64 != 0).flatten(1).sum(1).double()
    nnz = nnz.reshape(-1, 1, 1) if x.dim() == 4 else nnz
    unit = (nnz + 4) * UNIT_ROUNDOFF[torch.float32] + (TF32_PRODUCT if layer.precision == "tf32" else 0.0)
    underflow = UNDERFLOW[x.dtype] + UNDERFLOW[torch.float32] * nnz
    return Expected(value, unit * magnitude + UNIT_ROUNDOFF[x.dtype] * value.abs() + underflow, magnitude, nnz)
