"""cuSPARSELt: the vendor's 2:4 sparse matrix product on tensor cores, for 1x1 convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.graph import Segment
from zeroskip.core.layer import Layer
from zeroskip.core.layout import Layout
from zeroskip.core.method import Candidate, LayerMethod, Parameters, Run
from zeroskip.methods.cusparselt.cuda import COLUMNS, ROWS_AND_DEPTH, CusparseltPacked, CusparseltRun


@dataclass(frozen=True)
class CusparseltConfig:
    """``nchw``: a batch of one image; ``nhwc``: all pixels.  A linear layer is ``nhwc`` on 1x1 images."""

    order: Literal["nchw", "nhwc"]


class Cusparselt(LayerMethod[CusparseltConfig, CusparseltPacked]):
    name: ClassVar[str] = "cusparselt"
    cite: ClassVar[str] = "NVIDIA cuSPARSELt through torch: 2:4 sparse matrix product"
    exploits: ClassVar[str] = "weights"
    config_type: ClassVar[type] = CusparseltConfig

    def supports(self, layer: Layer, device: Device) -> str | None:
        shape, pattern = layer.shape, layer.weights.pattern
        if device.kind != "cuda":
            return "runs on NVIDIA GPUs only"
        if (shape.r, shape.s) != (1, 1):
            return f"multiplies matrices: runs 1x1 convolutions and linear layers, the kernel is {shape.r}x{shape.s}"
        if shape.stride != (1, 1) or shape.padding != (0, 0) or shape.groups != 1:
            return (
                "multiplies matrices: needs stride 1, padding 0 and one group, got stride "
                f"{shape.stride}, padding {shape.padding}, groups {shape.groups}"
            )
        if layer.precision not in ("fp16", "bf16"):
            return f"computes in fp16 and bf16, the layer is {layer.precision}"
        if pattern != "2:4":
            return f"needs weights with at most two nonzeros in every four input channels (2:4), these are {pattern}"
        if shape.k % ROWS_AND_DEPTH or shape.c % ROWS_AND_DEPTH:
            return f"needs multiples of {ROWS_AND_DEPTH} channels, got {shape.c} -> {shape.k}"
        if layer.epilogue.residual != "none":
            return "would round before the residual is added: runs layers without one"
        if not shape.n:
            return "the batch is empty"
        if not torch.backends.cusparselt.is_available():
            return "this torch was built without cuSPARSELt"
        return None

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[CusparseltConfig]]:
        if device.kind != "cuda":
            return []
        found = [CusparseltConfig("nhwc")]
        if segment.layer.kind == "conv2d" and _takes_planes(segment.layer):
            found.append(CusparseltConfig("nchw"))
        return [self.candidate(segment, config) for config in found]

    def candidate(self, segment: Segment, config: CusparseltConfig) -> Candidate[CusparseltConfig]:
        layer = segment.layer
        if config.order == "nchw" and (layer.kind == "linear" or not _takes_planes(layer)):
            raise ValueError(
                f"nchw needs a convolution of one image with a multiple of {COLUMNS} pixels, got {layer.kind} "
                f"{layer.shape}"
            )
        if layer.kind == "linear":
            layout = Layout("rows")
        else:
            layout = Layout(config.order, (0, 0) if config.order == "nchw" else None)
        return Candidate(config, (layout,) * len(segment.inputs), (layout,))

    def pack(self, segment: Segment, parameters: Parameters, config: CusparseltConfig) -> CusparseltPacked:
        weight, bias = parameters["weight"].detach(), parameters.get("bias")
        return CusparseltPacked(
            weight.reshape(segment.layer.shape.k, -1).clone(),
            None if bias is None else bias.detach().clone(),
            config.order,
        )

    def unpack(self, packed: CusparseltPacked) -> Tensor:
        return packed.weight.reshape(*packed.weight.shape, 1, 1)

    def bind(self, segment: Segment, packed: CusparseltPacked, built: bytes | None, device: Device) -> Run:
        return CusparseltRun(segment.layer, packed)


def _takes_planes(layer: Layer) -> bool:
    """Whether one call can read and write the image in NCHW: the library writes whole matrices of its own."""
    return layer.shape.n == 1 and layer.shape.h * layer.shape.w % COLUMNS == 0


METHOD = Cusparselt()
