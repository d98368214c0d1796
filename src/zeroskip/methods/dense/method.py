"""Dense layers by the vendor's libraries: what every other method has to beat, and the fallback for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.graph import Segment
from zeroskip.core.layer import Layer
from zeroskip.core.layout import Layout
from zeroskip.core.method import Candidate, LayerMethod, Parameters, Run
from zeroskip.methods.dense import cpu, cuda
from zeroskip.methods.dense.config import DenseConfig, DensePacked, check


class Dense(LayerMethod[DenseConfig, DensePacked]):
    name: ClassVar[str] = "dense"
    cite: ClassVar[str] = "oneDNN, cuDNN and cuBLAS through torch; Triton"
    exploits: ClassVar[str] = "nothing"
    config_type: ClassVar[type] = DenseConfig

    def supports(self, layer: Layer, device: Device) -> str | None:
        return None

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[DenseConfig]]:
        layer = segment.layer
        found = cpu.configs(layer) if device.kind == "cpu" else cuda.configs(layer, device)
        return [self.candidate(segment, config) for config in found]

    def candidate(self, segment: Segment, config: DenseConfig) -> Candidate[DenseConfig]:
        check(segment.layer, config)
        product = config.library in ("cublas", "triton")
        if segment.layer.kind == "linear":
            layout = Layout("rows" if product else "any")
        else:
            layout = Layout(config.order, (0, 0) if product and config.order == "nchw" else None)
        return Candidate(config, (layout,) * len(segment.inputs), (layout,))

    def pack(self, segment: Segment, parameters: Parameters, config: DenseConfig) -> DensePacked:
        weight = parameters["weight"].detach()
        if config.library in ("cublas", "triton"):
            weight = weight.reshape(segment.layer.shape.k, -1)
        elif weight.dim() == 4 and config.order == "nhwc":
            weight = weight.contiguous(memory_format=torch.channels_last)
        return DensePacked(weight, parameters.get("bias"), config, segment.layer)

    def unpack(self, packed: DensePacked) -> Tensor:
        weight = packed.weight
        return weight.reshape(*weight.shape, 1, 1) if weight.dim() == 2 else weight

    def build(self, packed: DensePacked, device: Device) -> None:
        if device.kind == "cuda" and packed.config.library == "triton":
            cuda.compile_ahead(packed)

    def bind(self, segment: Segment, packed: DensePacked, built: bytes | None, device: Device) -> Run:
        return cpu.bind(packed) if device.kind == "cpu" else cuda.bind(packed)


METHOD = Dense()
