"""Depthwise convolution: one input channel for each output channel."""

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
from zeroskip.methods.depthwise import cuda
from zeroskip.methods.depthwise.cuda import DepthwiseConfig, DepthwisePacked


class Depthwise(LayerMethod[DepthwiseConfig, DepthwisePacked]):
    name: ClassVar[str] = "depthwise"
    cite: ClassVar[str] = "Gale et al., Sparse GPU Kernels for Deep Learning, SC 2020 (its code, sputnik/depthwise)"
    exploits: ClassVar[str] = "weights"
    config_type: ClassVar[type] = DepthwiseConfig

    def supports(self, layer: Layer, device: Device) -> str | None:
        shape = layer.shape
        if device.kind != "cuda":
            return "runs on NVIDIA GPUs only; on the CPU escort covers this"
        if layer.kind != "conv2d":
            return "is for convolutions, the layer is linear"
        if shape.groups != shape.c:
            return f"needs one input channel in a group, the layer has {shape.c // shape.groups} channels"
        if layer.precision == "fp64":
            return "computes in fp32, fp16 and bf16, the layer is fp64"
        if 0 in shape.output_shape:
            return "the batch is empty"
        return None

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[DepthwiseConfig]]:
        if device.kind != "cuda":
            return []
        return [
            replace(self.candidate(segment, config), run_seconds=seconds, build_seconds=0.7)
            for seconds, config in cuda.configs(segment.layer, device)
        ]

    def candidate(self, segment: Segment, config: DepthwiseConfig) -> Candidate[DepthwiseConfig]:
        cuda.check(segment.layer, config)
        rows = Layout("nchw")
        return Candidate(config, (rows,) * len(segment.inputs), (Layout("nchw", writes_halo=True),))

    def pack(self, segment: Segment, parameters: Parameters, config: DepthwiseConfig) -> DepthwisePacked:
        return cuda.pack(segment.layer, parameters["weight"], parameters.get("bias"), config)

    def unpack(self, packed: DepthwisePacked) -> Tensor:
        return cuda.unpack(packed)

    def build(self, packed: DepthwisePacked, device: Device) -> bytes:
        return cuda.build(packed, device)

    def bind(self, segment: Segment, packed: DepthwisePacked, built: bytes | None, device: Device) -> Run:
        return cuda.DepthwiseRun(packed, built or cuda.build(packed, device))


METHOD = Depthwise()
