"""SparseRT: every weight is an instruction."""

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
from zeroskip.methods.sparsert import cuda
from zeroskip.methods.sparsert.config import SparseRTConfig, SparseRTPacked, check
from zeroskip.methods.sparsert.emit import OLDEST
from zeroskip.methods.sparsert.estimate import estimates, refusal


class SparseRT(LayerMethod[SparseRTConfig, SparseRTPacked]):
    name: ClassVar[str] = "sparsert"
    cite: ClassVar[str] = "Wang, SparseRT: Accelerating Unstructured Sparsity on GPUs for DL Inference, PACT 2020"
    exploits: ClassVar[str] = "weights"
    config_type: ClassVar[type] = SparseRTConfig

    def supports(self, layer: Layer, device: Device) -> str | None:
        if device.kind != "cuda":
            return "runs on NVIDIA GPUs only"
        if device.generation < OLDEST:
            return f"needs a GPU of sm_{OLDEST} or later, this is {device.arch}"
        if layer.kind == "linear":
            return "is for convolutions; sputnik runs linear layers"
        if layer.precision == "fp64":
            return "computes in fp32, fp16 and bf16, the layer is fp64"
        if 0 in layer.shape.output_shape:
            return "the batch is empty"
        return refusal(layer)

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[SparseRTConfig]]:
        if device.kind != "cuda":
            return []
        return [
            replace(self.candidate(segment, one.config), run_seconds=one.seconds, build_seconds=one.build_seconds)
            for one in estimates(segment.layer, device)
        ]

    def candidate(self, segment: Segment, config: SparseRTConfig) -> Candidate[SparseRTConfig]:
        layer = segment.layer
        check(layer, config)
        others = len(segment.inputs) - 1
        planes = Layout("nchw", (0, 0), aligned=config.vector)
        x = Layout("nchw", layer.shape.padding) if config.halo else planes
        if config.slab:
            x = Layout("nchw", (0, 0), aligned=16 // PRECISION_BYTES[layer.precision])
        y = Layout("nchw", writes_halo=True) if config.gaps else Layout("nchw", (0, 0))
        return Candidate(config, (x, *(planes,) * others), (y,), float16_terms=config.terms)

    def pack(self, segment: Segment, parameters: Parameters, config: SparseRTConfig) -> SparseRTPacked:
        return cuda.pack(segment.layer, parameters["weight"], parameters.get("bias"), config)

    def unpack(self, packed: SparseRTPacked) -> Tensor:
        return cuda.unpack(packed)

    def build(self, packed: SparseRTPacked, device: Device) -> bytes:
        return cuda.build(packed, device)

    def bind(self, segment: Segment, packed: SparseRTPacked, built: bytes | None, device: Device) -> Run:
        return cuda.SparseRTRun(packed, built or cuda.build(packed, device), device)


METHOD = SparseRT()
