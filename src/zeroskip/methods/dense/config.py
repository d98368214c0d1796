"""What a dense candidate is, and which layers it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from zeroskip.core.layer import Layer

Order = Literal["nchw", "nhwc"]


@dataclass(frozen=True)
class Blocks:
    """How a Triton matrix product is cut: one program computes ``m`` output channels of ``n`` pixels with ``warps``
    warps, ``k`` input channels a step, loads running ``stages`` - 1 steps ahead.

    Raises:
        ValueError: not powers of two in the ranges that tensor cores and Triton take.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("m", self.m, 16, 256),
            ("n", self.n, 16, 256),
            ("k", self.k, 16, 256),
            ("warps", self.warps, 1, 8),
        ):
            if not least <= value <= most or value & (value - 1):
                raise ValueError(f"{name} of a block must be a power of two in {least}..{most}, got {value}")
        if not 1 <= self.stages <= 8:
            raise ValueError(f"stages of a block must be in 1..8, got {self.stages}")

    def shared_bytes(self, item: int) -> int:
        """Shared memory of one program whose operands have ``item`` bytes a number."""
        return self.stages * (self.m + self.n) * self.k * item


@dataclass(frozen=True)
class DenseConfig:
    """Which call computes the layer.

    ``torch`` is the ordinary operator (oneDNN, cuDNN with search, cuBLAS for linear layers).  ``onednn``, on the CPU,
    is the one that torch's own compiler uses for frozen models, with weights reordered beforehand and a residual sum
    fused.  ``cublas`` and ``triton``, on a GPU, compute a 1x1 convolution or a linear layer as a matrix product.
    """

    order: Order
    library: Literal["torch", "onednn", "cublas", "triton"]
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        if (self.library == "triton") != (self.blocks is not None):
            raise ValueError(f"blocks belong to library triton and to no other, got {self}")


@dataclass(frozen=True)
class DensePacked:
    """``weight`` as the library wants it: ``[k, c / groups, r, s]``, for a matrix product ``[k, c]``; ``bias [k]``."""

    weight: Tensor
    bias: Tensor | None
    config: DenseConfig
    layer: Layer


def is_product(layer: Layer) -> bool:
    """Whether the layer is one matrix product per image: linear, or 1x1 with neither stride, padding nor groups."""
    shape = layer.shape
    flat = (shape.r, shape.s, shape.stride, shape.padding, shape.groups) == (1, 1, (1, 1), (0, 0), 1)
    return shape.n > 0 and (flat or layer.kind == "linear")


def check(layer: Layer, config: DenseConfig) -> None:
    """Raises ``ValueError`` where ``config`` does not fit the layer."""
    if layer.kind == "linear" and config.order != "nchw":
        raise ValueError(f"a linear layer has no image order, its configuration says {config.order}")
    if config.library == "onednn" and (layer.kind != "conv2d" or config.order != "nhwc"):
        raise ValueError(f"onednn runs convolutions in nhwc, got {config} for {layer.kind} {layer.shape}")
    if config.library in ("cublas", "triton") and not is_product(layer):
        raise ValueError(f"{config.library} runs linear layers and plain 1x1 convolutions, the layer is {layer.shape}")
    if config.library == "triton" and layer.precision == "fp64":
        raise ValueError("triton computes with float32 accumulators, the layer is fp64")
