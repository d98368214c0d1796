"""Escort: direct sparse convolution, each nonzero carrying the offset of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.graph import Segment
from zeroskip.core.layer import Layer
from zeroskip.core.layout import Layout
from zeroskip.core.method import Candidate, LayerMethod, Parameters, Run
from zeroskip.methods.escort import cpu
from zeroskip.methods.escort.cpu_geometry import EscortConfig
from zeroskip.pack.stretched import unstretch


class Escort(LayerMethod[EscortConfig, cpu.EscortPacked]):
    name: ClassVar[str] = "escort"
    cite: ClassVar[str] = "Chen, Escoin, arXiv 1802.10280, section 3"
    exploits: ClassVar[str] = "weights"
    config_type: ClassVar[type] = EscortConfig

    def supports(self, layer: Layer, device: Device) -> str | None:
        if device.kind != "cpu":
            return "runs on the CPU only"
        if layer.precision != "fp32":
            return f"computes in fp32 on the CPU, the layer is {layer.precision}"
        if 0 in layer.shape.output_shape:
            return "the batch is empty"
        return None

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[EscortConfig]]:
        return [
            replace(self.candidate(segment, config), run_seconds=seconds, build_seconds=0.1)
            for seconds, config in cpu.configs(segment.layer, device)
        ]

    def candidate(self, segment: Segment, config: EscortConfig) -> Candidate[EscortConfig]:
        cpu.geometry_of(segment.layer, config)
        return Candidate(config, *_edges(segment, config))

    def pack(self, segment: Segment, parameters: Parameters, config: EscortConfig) -> cpu.EscortPacked:
        return cpu.pack(segment.layer, parameters["weight"], parameters.get("bias"), config)

    def unpack(self, packed: cpu.EscortPacked) -> Tensor:
        return unstretch(packed.weight)

    def build(self, packed: cpu.EscortPacked, device: Device) -> bytes:
        return cpu.build(packed)

    def bind(self, segment: Segment, packed: cpu.EscortPacked, built: bytes | None, device: Device) -> Run:
        return cpu.EscortRun(segment.layer, packed, built or cpu.build(packed), device)


def _edges(segment: Segment, config: EscortConfig) -> tuple[tuple[Layout, ...], tuple[Layout, ...]]:
    layer, others = segment.layer, len(segment.inputs) - 1
    if layer.kind == "linear":
        return (Layout("rows"),) * (1 + others), (Layout("rows"),)
    if config.flat:
        return (Layout("nchw", (0, 0)),) * (1 + others), (Layout("nchw", (0, 0)),)
    padding = layer.shape.padding
    x = Layout("nchw", padding if padding != (0, 0) else None)
    return (x, *(Layout("nchw"),) * others), (Layout("nchw", writes_halo=True),)


METHOD = Escort()
