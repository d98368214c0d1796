"""A matrix product with its epilogue on tensor cores, for 1x1 convolutions and linear layers.

Triton; import it only where that runs.

``y[i, k, p] = act(sum over c of w[k, c] x[i, c, p] + bias[k] + residual[i, k, p])`` for image, channel and pixel.
Tensors are addressed by strides: images in NCHW are read and written where they lie, all with the same weights in
memory, and channels-last images or rows of features are one product with other strides.

A program computes ``m`` channels of ``n`` pixels, of one image or, ``folded``, of images laid side by side; programs of
the same pixels are neighbours.  float32 operands are multiplied as three TF32 products ("tf32x3") or one ("tf32"),
others in their own type; sums are float32, rounded once at the end.  Shared memory: ``stages (m + n) k`` numbers.

"tf32x3" splits each operand into its nearest TF32 number and the TF32 number nearest to the rest, and drops the product
of the rests: up to ``2^-21`` of ``|w x|`` is lost (``2^-22`` there, ``2^-23`` with each rest), where float32 loses
``2^-24``.  NaN and infinity come out as from float32.

Source: H. Ootomo, R. Yokota, Recovering single precision accuracy from Tensor Cores while surpassing the FP32
theoretical peak performance, IJHPCA 2022, arXiv 2203.03341, section 3.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from zeroskip.core.errors import Unsupported
from zeroskip.core.layer import MAX_ELEMENTS, Epilogue, Precision
from zeroskip.methods.dense.blocks import folds
from zeroskip.methods.dense.config import Blocks
from zeroskip.methods.dense.pointwise import activate

DOT_PRECISION: dict[Precision, str] = {"fp32": "tf32x3", "tf32": "tf32", "fp16": "ieee", "bf16": "ieee"}


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _multiply(
    w: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    images: tl.tensor,
    channels: tl.tensor,
    depth: tl.tensor,
    pixels: tl.tensor,
    w_channel: tl.tensor,
    x_image: tl.tensor,
    x_channel: tl.tensor,
    x_pixel: tl.tensor,
    r_image: tl.tensor,
    r_channel: tl.tensor,
    r_pixel: tl.tensor,
    y_image: tl.tensor,
    y_channel: tl.tensor,
    y_pixel: tl.tensor,
    folded: tl.constexpr,
    wide: tl.constexpr,
    even: tl.constexpr,
    biased: tl.constexpr,
    place: tl.constexpr,
    activation: tl.constexpr,
    dot_precision: tl.constexpr,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
) -> None:
    """``wide``: some offset needs 64 bits; ``even``: ``depth`` is a multiple of ``k``."""
    tiles = tl.cdiv(channels, m)
    rows = (tl.program_id(0) % tiles) * m + tl.arange(0, m)
    columns = (tl.program_id(0) // tiles) * n + tl.arange(0, n)
    if folded:
        row_inside, inside = rows < channels, columns < images * pixels
        image, pixel = columns // pixels, columns % pixels
    else:
        row_inside, inside = rows < channels, columns < pixels
        image, pixel = tl.program_id(1), columns
    step = tl.arange(0, k)
    deep = step
    advance = k * x_channel
    if wide:
        rows, image, pixel, deep = rows.to(tl.int64), image.to(tl.int64), pixel.to(tl.int64), step.to(tl.int64)
        advance = tl.full((), k, tl.int64) * x_channel

    w_at = w + rows[:, None] * w_channel + step[None, :]
    x_at = x + (image * x_image + pixel * x_pixel)[None, :] + deep[:, None] * x_channel
    total = tl.zeros((m, n), dtype=tl.float32)
    for start in range(0, depth, k):
        if even:
            a = tl.load(w_at, mask=row_inside[:, None], other=0.0)
            b = tl.load(x_at, mask=inside[None, :], other=0.0)
        else:
            left = step < depth - start
            a = tl.load(w_at, mask=row_inside[:, None] & left[None, :], other=0.0)
            b = tl.load(x_at, mask=left[:, None] & inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=dot_precision)
        w_at += k
        x_at += advance

    stored = row_inside[:, None] & inside[None, :]
    if biased:
        total += tl.load(bias + rows, mask=row_inside, other=0.0).to(tl.float32)[:, None]
    if place != "none":
        r_at = residual + (image * r_image + pixel * r_pixel)[None, :] + rows[:, None] * r_channel
        other = tl.load(r_at, mask=stored, other=0.0).to(tl.float32)
    if place == "before":
        total += other
    total = activate(total, activation)
    if place == "after":
        total += other
    y_at = y + (image * y_image + pixel * y_pixel)[None, :] + rows[:, None] * y_channel
    tl.store(y_at, total.to(y.dtype.element_ty), mask=stored)


def multiply(
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    epilogue: Epilogue,
    precision: Precision,
    blocks: Blocks,
) -> None:
    """Write the layer's output into ``y``; of tensors on the meta device, only compile what would do so.

    Raises:
        Unsupported: the blocks need more of a multiprocessor than this GPU has, or do not compile for it.

    Args:
        weight: ``[k, c]``, contiguous.
        x: ``[n, c, pixels]``, any strides.
        bias: ``[k]``.
        residual: as ``y``.
        y: ``[n, k, pixels]``, any strides.
    """
    images, depth, pixels = x.shape
    channels, place = weight.shape[0], epilogue.residual
    if residual is None:
        residual, place = y, "none"
    folded = folds(images, pixels, blocks)
    columns, products = (images * pixels, 1) if folded else (pixels, images)
    grid = (triton.cdiv(channels, blocks.m) * triton.cdiv(columns, blocks.n), products)
    tensors = (weight, x, y if bias is None else bias, residual, y)
    sizes = (images, channels, depth, pixels, weight.stride(0), *x.stride(), *residual.stride(), *y.stride())
    call = functools.partial(_multiply.warmup, grid=grid) if x.is_meta else _multiply[grid]
    try:
        call(
            *((tensor.dtype for tensor in tensors) if x.is_meta else tensors),
            *sizes,
            folded=folded,
            wide=any(_reach(tensor, blocks) > MAX_ELEMENTS for tensor in (weight, x, residual, y)),
            even=depth % blocks.k == 0,
            biased=bias is not None,
            place=place,
            activation=epilogue.activation,
            dot_precision=DOT_PRECISION[precision],
            m=blocks.m,
            n=blocks.n,
            k=blocks.k,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    except TritonError as error:
        raise Unsupported(f"Triton cannot run {blocks} on this GPU: {error}") from error


def _reach(tensor: Tensor, blocks: Blocks) -> int:
    """More than the largest offset that a program forms, its last step and its masked part included."""
    over = max(blocks.m, blocks.n, blocks.k)
    return sum((size + over) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
