"""ASpT: input channels that many rows of a panel need are copied to shared memory, the others read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.graph import Segment
from zeroskip.core.layer import Layer
from zeroskip.core.method import Candidate, LayerMethod, Parameters, Run
from zeroskip.cuda import pixels
from zeroskip.cuda.limits import MOST_BLOCKS
from zeroskip.methods.aspt import cuda
from zeroskip.methods.aspt.cuda import AsptConfig, AsptPacked


class Aspt(LayerMethod[AsptConfig, AsptPacked]):
    name: ClassVar[str] = "aspt"
    cite: ClassVar[str] = "Hong et al., Adaptive Sparse Tiling for Sparse Matrix Multiplication, PPoPP 2019"
    exploits: ClassVar[str] = "weights"
    config_type: ClassVar[type] = AsptConfig

    def supports(self, layer: Layer, device: Device) -> str | None:
        if layer.shape.k > MOST_BLOCKS:
            return f"takes {MOST_BLOCKS} output channels at most, the layer has {layer.shape.k}"
        return pixels.refusal(layer, device)

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[AsptConfig]]:
        return [
            replace(self.candidate(segment, config), run_seconds=seconds, build_seconds=1.0)
            for seconds, config in cuda.configs(segment.layer, device)
        ]

    def candidate(self, segment: Segment, config: AsptConfig) -> Candidate[AsptConfig]:
        cuda.check(segment.layer, config)
        x, y = pixels.layouts(segment.layer, config.vector)
        return Candidate(config, (x,) * len(segment.inputs), (y,))

    def pack(self, segment: Segment, parameters: Parameters, config: AsptConfig) -> AsptPacked:
        return cuda.pack(segment.layer, parameters["weight"], parameters.get("bias"), config)

    def unpack(self, packed: AsptPacked) -> Tensor:
        return cuda.unpack(packed)

    def build(self, packed: AsptPacked, device: Device) -> bytes:
        return cuda.build(packed, device)

    def bind(self, segment: Segment, packed: AsptPacked, built: bytes | None, device: Device) -> Run:
        return cuda.AsptRun(segment.layer, packed, built or cuda.build(packed, device), device)


METHOD = Aspt()
