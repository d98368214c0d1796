"""What follows a library's convolution: bias, residual and activation, in place on a tensor of our own."""

from __future__ import annotations

import torch
from torch import Tensor

from zeroskip.core.layer import MAX_ELEMENTS, Epilogue
from zeroskip.core.oracle import activate_
from zeroskip.methods.dense.ready import triton_runs


def finish(y: Tensor, bias: Tensor | None, epilogue: Epilogue, residual: Tensor | None) -> Tensor:
    """``act(y + bias + residual)`` or ``act(y + bias) + residual``, as ``epilogue`` says, in ``y``.

    On a GPU with Triton this is one pass over ``y``; torch's own operators make one for each of the three.

    Args:
        y: ``[n, k, p, q]``, or ``[..., k]`` of a linear layer.
        bias: ``[k]``; None where there is none or ``y`` has it already.
        residual: of the shape of ``y``.
    """
    activation, place = epilogue.activation, epilogue.residual
    residual = None if place == "none" else residual
    if bias is None and activation == "none" and residual is None:
        return y
    if y.is_cuda and y.dtype != torch.float64 and triton_runs() and (plane := plane_of(y, residual)):
        from zeroskip.methods.dense import pointwise

        return pointwise.apply(y, bias, activation, place, residual, plane)
    if bias is not None:
        y += bias.reshape(-1, 1, 1) if y.dim() == 4 else bias
    if place == "before" and residual is not None:
        y += residual
    activate_(y, activation)
    return y.add_(residual) if place == "after" and residual is not None else y


def plane_of(y: Tensor, residual: Tensor | None) -> int:
    """How many numbers of one channel lie side by side in ``y``: all of an image's, or one in channels-last order.

    0 where ``y`` is empty, has gaps or is too large for 32-bit indices, or ``residual`` lies otherwise.
    """
    both = (y,) if residual is None else (y, residual)
    if not 0 < y.numel() <= MAX_ELEMENTS - 4096:
        return 0
    if all(tensor.is_contiguous() for tensor in both):
        return y.shape[2] * y.shape[3] if y.dim() == 4 else 1
    last = y.dim() == 4 and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in both)
    return int(last)
