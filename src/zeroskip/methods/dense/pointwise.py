"""Bias, residual and activation in one pass over a dense tensor, in place.  Triton; import it only where that runs.

One program handles ``block`` consecutive numbers.  Bytes moved: each number read and written, the residual read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from zeroskip.core.layer import Activation, ResidualPlace

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def activate(value: tl.tensor, activation: tl.constexpr) -> tl.tensor:
    """As torch does it: NaN is neither below 0 nor above 6, so it stays."""
    if activation != "none":
        value = tl.where(value < 0.0, 0.0, value)
    if activation == "relu6":
        value = tl.where(value > 6.0, 6.0, value)
    return value


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _apply(
    y: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    count: tl.tensor,
    plane: tl.constexpr,
    channels: tl.constexpr,
    biased: tl.constexpr,
    place: tl.constexpr,
    activation: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """``y``, ``residual``: ``count`` numbers in a row, ``plane`` of a channel side by side; arithmetic in float32."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < count
    value = tl.load(y + at, mask=inside).to(tl.float32)
    if biased:
        value += tl.load(bias + (at // plane) % channels, mask=inside).to(tl.float32)
    if place == "before":
        value += tl.load(residual + at, mask=inside).to(tl.float32)
    value = activate(value, activation)
    if place == "after":
        value += tl.load(residual + at, mask=inside).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


def apply(
    y: Tensor, bias: Tensor | None, activation: Activation, place: ResidualPlace, residual: Tensor | None, plane: int
) -> Tensor:
    """``act(y + bias + residual)`` or ``act(y + bias) + residual``, in ``y``.

    Args:
        y: float32, float16 or bfloat16 without gaps; ``plane`` numbers of one channel lie side by side.
        bias: ``[channels]``.
        residual: as ``y``.
    """
    _apply[(triton.cdiv(y.numel(), BLOCK),)](
        y,
        y if bias is None else bias,
        y if residual is None else residual,
        y.numel(),
        plane=plane,
        channels=y.shape[1] if y.dim() == 4 else y.shape[-1],
        biased=bias is not None,
        place="none" if residual is None else place,
        activation=activation,
        block=BLOCK,
        num_warps=4,
    )
    return y
