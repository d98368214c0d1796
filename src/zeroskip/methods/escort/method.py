"""Escort: direct sparse convolution, one multiply-add per nonzero weight and output pixel, no im2col."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.graph import Segment
from zeroskip.core.layer import Layer
from zeroskip.core.layout import Layout
from zeroskip.core.method import Candidate, LayerMethod, Parameters, Run
from zeroskip.methods.escort import cpu, cuda
from zeroskip.methods.escort.cpu_geometry import EscortConfig
from zeroskip.methods.escort.cuda_geometry import EscortCudaConfig, check
from zeroskip.pack.stretched import unstretch

Config = EscortConfig | EscortCudaConfig
Packed = cpu.EscortPacked | cuda.EscortCudaPacked


class Escort(LayerMethod[Config, Packed]):
    name: ClassVar[str] = "escort"
    cite: ClassVar[str] = "Chen, Escoin, arXiv 1802.10280, section 3"
    exploits: ClassVar[str] = "weights"
    config_type: ClassVar[Any] = Config

    def supports(self, layer: Layer, device: Device) -> str | None:
        if device.kind == "cuda":
            return cuda.refusal(layer)
        if layer.precision != "fp32":
            return f"computes in fp32 on the CPU, the layer is {layer.precision}"
        if 0 in layer.shape.output_shape:
            return "the batch is empty"
        return None

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[Config]]:
        if device.kind == "cuda":
            return [
                replace(self.candidate(segment, config), run_seconds=seconds, build_seconds=1.0)
                for seconds, config in cuda.configs(segment.layer, device)
            ]
        return [
            replace(self.candidate(segment, config), run_seconds=seconds, build_seconds=0.1)
            for seconds, config in cpu.configs(segment.layer, device)
        ]

    def candidate(self, segment: Segment, config: Config) -> Candidate[Config]:
        if isinstance(config, EscortCudaConfig):
            check(segment.layer.shape, config)
            # Neighbours are read at once where rows, and so planes without gaps, are multiples of them.
            x = Layout("nchw", (0, 0), aligned=config.wide) if config.wide > 1 else Layout("nchw")
            others = (Layout("nchw"),) * (len(segment.inputs) - 1)
            return Candidate(config, (x, *others), (Layout("nchw", writes_halo=True),))
        cpu.geometry_of(segment.layer, config)
        return Candidate(config, *_edges(segment, config))

    def pack(self, segment: Segment, parameters: Parameters, config: Config) -> Packed:
        weight, bias = parameters["weight"], parameters.get("bias")
        if isinstance(config, EscortCudaConfig):
            return cuda.pack(segment.layer, weight, bias, config)
        return cpu.pack(segment.layer, weight, bias, config)

    def unpack(self, packed: Packed) -> Tensor:
        return packed.weight.dense() if isinstance(packed, cuda.EscortCudaPacked) else unstretch(packed.weight)

    def build(self, packed: Packed, device: Device) -> bytes:
        _check_side(packed, device)
        return cuda.build(packed, device) if isinstance(packed, cuda.EscortCudaPacked) else cpu.build(packed)

    def bind(self, segment: Segment, packed: Packed, built: bytes | None, device: Device) -> Run:
        _check_side(packed, device)
        built = built or self.build(packed, device)
        if isinstance(packed, cuda.EscortCudaPacked):
            return cuda.EscortCudaRun(packed, built, device)
        return cpu.EscortRun(segment.layer, packed, built, device)


def _check_side(packed: Packed, device: Device) -> None:
    """A plan may have been made for the other side, whose memory is not ours to touch."""
    kind = "cuda" if isinstance(packed, cuda.EscortCudaPacked) else "cpu"
    if device.kind != kind:
        raise ValueError(
            f"this configuration is for {kind}, {device.name} is {device.kind}: plan again for this device"
        )


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
