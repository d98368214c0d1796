"""Sputnik: sparse rows times dense columns, one row and a strip of columns to a subwarp."""

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
from zeroskip.methods.sputnik import cuda
from zeroskip.methods.sputnik.cuda import SputnikConfig, SputnikPacked


class Sputnik(LayerMethod[SputnikConfig, SputnikPacked]):
    name: ClassVar[str] = "sputnik"
    cite: ClassVar[str] = "Gale et al., Sparse GPU Kernels for Deep Learning, SC 2020, section V"
    exploits: ClassVar[str] = "weights"
    config_type: ClassVar[type] = SputnikConfig

    def supports(self, layer: Layer, device: Device) -> str | None:
        return pixels.refusal(layer, device)

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[SputnikConfig]]:
        # The estimate orders them, but is too far off to leave any out.
        return [replace(self.candidate(segment, one), build_seconds=1.0) for one in cuda.configs(segment.layer, device)]

    def candidate(self, segment: Segment, config: SputnikConfig) -> Candidate[SputnikConfig]:
        cuda.check(segment.layer, config)
        x, y = pixels.layouts(segment.layer, config.vector)
        return Candidate(config, (x,) * len(segment.inputs), (y,))

    def pack(self, segment: Segment, parameters: Parameters, config: SputnikConfig) -> SputnikPacked:
        return cuda.pack(segment.layer, parameters["weight"], parameters.get("bias"), config)

    def unpack(self, packed: SputnikPacked) -> Tensor:
        return cuda.unpack(packed)

    def build(self, packed: SputnikPacked, device: Device) -> bytes:
        return cuda.build(packed, device)

    def bind(self, segment: Segment, packed: SputnikPacked, built: bytes | None, device: Device) -> Run:
        run = cuda.LinearRun if segment.layer.kind == "linear" else cuda.ConvRun
        return run(segment.layer, packed, built or cuda.build(packed, device))


METHOD = Sputnik()
