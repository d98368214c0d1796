"""Slab: x is copied to shared memory once per block of rows, and every row of the block reads it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.graph import Segment
from zeroskip.core.layer import PRECISION_BYTES, Layer
from zeroskip.core.layout import Layout
from zeroskip.core.method import Candidate, LayerMethod, Parameters, Run
from zeroskip.cuda import pixels
from zeroskip.methods.slab import cuda
from zeroskip.methods.slab.cuda import SlabConfig, SlabPacked


class Slab(LayerMethod[SlabConfig, SlabPacked]):
    name: ClassVar[str] = "slab"
    cite: ClassVar[str] = "ours; the unit of work is that of Gale et al., SC 2020, section V"
    exploits: ClassVar[str] = "weights"
    config_type: ClassVar[type] = SlabConfig

    def supports(self, layer: Layer, device: Device) -> str | None:
        if device.kind == "cuda" and layer.kind == "linear":
            return "is for convolutions; sputnik runs linear layers"
        return pixels.refusal(layer, device)

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[SlabConfig]]:
        return [
            replace(self.candidate(segment, config), run_seconds=seconds, build_seconds=1.0)
            for seconds, config in cuda.configs(segment.layer, device)
        ]

    def candidate(self, segment: Segment, config: SlabConfig) -> Candidate[SlabConfig]:
        cuda.check(segment.layer, config)
        others = len(segment.inputs) - 1
        if config.mode == "gather":
            return Candidate(config, (Layout("nchw"),) * (1 + others), (Layout("nchw", writes_halo=True),))
        if config.wide == 1:
            x = Layout("nchw", (0, 0), aligned=16 // PRECISION_BYTES[segment.layer.precision])
            return Candidate(config, (x, *(Layout("nchw"),) * others), (Layout("nchw", writes_halo=True),))
        aligned = Layout("nchw", (0, 0), aligned=cuda.alignment(config, segment.layer.precision))
        return Candidate(config, (aligned,) * (1 + others), (Layout("nchw", (0, 0)),))

    def pack(self, segment: Segment, parameters: Parameters, config: SlabConfig) -> SlabPacked:
        return cuda.pack(segment.layer, parameters["weight"], parameters.get("bias"), config)

    def unpack(self, packed: SlabPacked) -> Tensor:
        return cuda.unpack(packed)

    def build(self, packed: SlabPacked, device: Device) -> bytes:
        return cuda.build(packed, device)

    def bind(self, segment: Segment, packed: SlabPacked, built: bytes | None, device: Device) -> Run:
        return cuda.SlabRun(segment.layer, packed, built or cuda.build(packed, device), device)


METHOD = Slab()
