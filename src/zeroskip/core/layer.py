"""Facts about one convolution or linear layer: its shape, its zeros, and what is fused behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "tf32", "fp16", "bf16", "fp64"]
Activation = Literal["none", "relu", "relu6"]
ResidualPlace = Literal["none", "before", "after"]
Pattern = Literal["dense", "2:4", "unstructured", "filter"]

PRECISION_BYTES: dict[Precision, int] = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp64": 8}
"""Of one number in memory."""
PRECISION_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
MAX_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class ConvShape:
    """A 2-D convolution in cuDNN's letters.

    Input ``[n, c, h, w]``, weight ``[k, c / groups, r, s]``, output ``[n, k, p, q]``.  A linear layer of
    ``x [rows, c] -> [rows, k]`` is the 1x1 convolution ``n=rows, h=w=1``.

    Raises:
        ValueError: a size is negative, channels do not divide by groups, the output would be empty in space,
            or a tensor has more than 2**31 - 1 elements.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        sizes = (self.c, self.h, self.w, self.k, self.r, self.s, *self.stride, *self.dilation, self.groups)
        if min(sizes) < 1 or self.n < 0 or min(self.padding) < 0:
            raise ValueError(f"sizes of a convolution must be positive (n and padding may be 0), got {self}")
        if self.c % self.groups or self.k % self.groups:
            raise ValueError(f"channels must divide by groups: c={self.c}, k={self.k}, groups={self.groups}")
        if self.p < 1 or self.q < 1:
            raise ValueError(f"the kernel is larger than the padded input: output would be {self.p}x{self.q}, {self}")
        for what, count in (
            ("input", self.n * self.c * self.h * self.w),
            ("output", self.n * self.k * self.p * self.q),
            ("weight", self.k * (self.c // self.groups) * self.r * self.s),
        ):
            if count > MAX_ELEMENTS:
                raise ValueError(
                    f"the {what} would have {count} elements; at most {MAX_ELEMENTS} are supported: "
                    "use a smaller batch or image"
                )

    @property
    def p(self) -> int:
        """Output rows."""
        return (self.h + 2 * self.padding[0] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def q(self) -> int:
        """Output columns."""
        return (self.w + 2 * self.padding[1] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1

    @property
    def macs(self) -> int:
        """Multiply-adds of the dense convolution."""
        return self.n * self.k * self.p * self.q * (self.c // self.groups) * self.r * self.s

    @property
    def gemm(self) -> tuple[int, int, int]:
        """``(m, n, k)`` of the matrix product that the convolution is, per group."""
        return self.k // self.groups, self.n * self.p * self.q, self.c // self.groups * self.r * self.s

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.k, self.p, self.q

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.k, self.c // self.groups, self.r, self.s

    def __str__(self) -> str:
        text = f"{self.c}->{self.k} {self.r}x{self.s}"
        if self.stride != (1, 1):
            text += f"/{self.stride[0]}"
        if self.groups > 1:
            text += f" g{self.groups}"
        return f"{text} @{self.h}x{self.w} n{self.n}"


NEARLY_ALL = 0.99
"""Of a layer's weights: what the zeros among the rest could save is less than times differ by."""


@dataclass(frozen=True)
class Sparsity:
    """What the zeros of a weight look like: a fact found in the tensor, not an intention."""

    nnz: int
    density: float
    pattern: Pattern
    row_nnz_cv: float
    """Coefficient of variation of the nonzeros per output channel."""

    @property
    def skippable(self) -> bool:
        """Whether there are so many zeros that skipping them could be noticed: rounding leaves single ones in networks
        that nobody pruned."""
        return self.density < NEARLY_ALL

    @staticmethod
    def of(weight: Tensor) -> Sparsity:
        """Look at ``weight [k, ...]`` (any float dtype); NaN counts as a nonzero."""
        rows = weight.flatten(1).count_nonzero(1).double()
        nnz, numel = int(rows.sum()), weight.numel()
        density = nnz / max(numel, 1)
        mean = float(rows.mean())
        cv = float(rows.std(correction=0)) / mean if mean else 0.0
        return Sparsity(nnz, density, _pattern(weight, rows, density), cv)


def _pattern(weight: Tensor, rows: Tensor, density: float) -> Pattern:
    if density == 1.0:
        return "dense"
    # The first output channel answers for most weights; only then is the whole looked at.
    if density <= 0.5 and weight.shape[1] % 4 == 0 and _two_in_four(weight[:1]) and _two_in_four(weight):
        return "2:4"
    full = rows.max() == weight[0].numel()
    return "filter" if full and bool(((rows == 0) | (rows == rows.max())).all()) else "unstructured"


def _two_in_four(weight: Tensor) -> bool:
    groups = (weight != 0).movedim(1, -1).reshape(-1, 4)
    return int(groups.sum(-1, dtype=torch.uint8).max()) <= 2


@dataclass(frozen=True)
class Epilogue:
    """What follows the convolution: ``y = act(conv + bias + residual)``, or ``act(conv + bias) + residual``."""

    bias: bool = False
    activation: Activation = "none"
    residual: ResidualPlace = "none"


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer with everything a method needs to know to accept or refuse it."""

    name: str
    kind: Literal["conv2d", "linear"]
    shape: ConvShape
    precision: Precision
    weights: Sparsity
    epilogue: Epilogue = Epilogue()

    @property
    def key(self) -> tuple[object, ...]:
        """What decides its speed: the layer without its name, density to 1%."""
        return (
            self.kind,
            self.shape,
            self.precision,
            round(self.weights.density, 2),
            self.weights.pattern,
            self.epilogue,
        )
