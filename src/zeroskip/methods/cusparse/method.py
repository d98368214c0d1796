"""cuSPARSE: the vendor's product of a CSR matrix and a dense one, for 1x1 convolutions in NCHW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.graph import Segment
from zeroskip.core.layer import Layer
from zeroskip.core.layout import Layout
from zeroskip.core.method import Candidate, LayerMethod, Parameters, Run
from zeroskip.methods.cusparse.cuda import CusparsePacked, CusparseRun
from zeroskip.pack.csr import Csr


@dataclass(frozen=True)
class CusparseConfig:
    """Nothing to choose."""


class Cusparse(LayerMethod[CusparseConfig, CusparsePacked]):
    name: ClassVar[str] = "cusparse"
    cite: ClassVar[str] = "NVIDIA cuSPARSE through torch: SpMM with a CSR matrix"
    exploits: ClassVar[str] = "weights"
    config_type: ClassVar[type] = CusparseConfig
    reproducible: ClassVar[bool] = False

    def supports(self, layer: Layer, device: Device) -> str | None:
        shape = layer.shape
        if device.kind != "cuda":
            return "runs on NVIDIA GPUs only"
        if layer.kind == "linear":
            return "cuSPARSE's product with rows of features is not reproducible bit for bit"
        if (shape.r, shape.s) != (1, 1):
            return f"multiplies matrices: runs 1x1 convolutions, the kernel is {shape.r}x{shape.s}"
        if shape.stride != (1, 1) or shape.padding != (0, 0) or shape.groups != 1:
            return (
                "multiplies matrices: needs stride 1, padding 0 and one group, got stride "
                f"{shape.stride}, padding {shape.padding}, groups {shape.groups}"
            )
        if layer.precision in ("fp16", "bf16"):
            return f"runs fp32 and tf32 layers: in {layer.precision} cuSPARSE rounds more than once"
        if layer.precision not in ("fp32", "tf32"):
            return f"runs fp32 and tf32 layers, the layer is {layer.precision}"
        if not shape.n:
            return "the batch is empty"
        return None

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[CusparseConfig]]:
        if device.kind != "cuda":
            return []
        return [self.candidate(segment, CusparseConfig())]

    def candidate(self, segment: Segment, config: CusparseConfig) -> Candidate[CusparseConfig]:
        if segment.layer.kind == "linear":
            raise ValueError("cusparse runs convolutions in NCHW, the layer is linear")
        layout = Layout("nchw", (0, 0))
        return Candidate(config, (layout,) * len(segment.inputs), (layout,))

    def pack(self, segment: Segment, parameters: Parameters, config: CusparseConfig) -> CusparsePacked:
        csr = Csr.of(parameters["weight"].reshape(segment.layer.shape.k, -1))
        bias = parameters.get("bias")
        return CusparsePacked(
            csr.row_offsets.to(torch.int32),
            csr.col_indices.to(torch.int32),
            csr.values,
            None if bias is None else bias.detach().clone(),
            segment.layer.shape.c,
        )

    def unpack(self, packed: CusparsePacked) -> Tensor:
        shape = (len(packed.row_offsets) - 1, packed.columns)
        csr = Csr(shape, packed.row_offsets.long(), packed.col_indices.long(), packed.values)
        return csr.dense().reshape(*shape, 1, 1)

    def bind(self, segment: Segment, packed: CusparsePacked, built: bytes | None, device: Device) -> Run:
        return CusparseRun(segment.layer, packed)


METHOD = Cusparse()
