"""Dense convolution by torch and oneDNN: what every other method has to beat, and the fallback for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from zeroskip.core.device import Device
from zeroskip.core.graph import Segment
from zeroskip.core.layer import Layer
from zeroskip.core.layout import Layout
from zeroskip.core.method import Candidate, LayerMethod, Parameters, Run


@dataclass(frozen=True)
class DenseConfig:
    """``torch`` calls the ordinary operator; ``onednn`` the one that torch's own compiler uses for frozen models,
    with weights reordered beforehand and the epilogue fused."""

    order: Literal["nchw", "nhwc"]
    library: Literal["torch", "onednn"]


@dataclass(frozen=True)
class DensePacked:
    weight: Tensor
    bias: Tensor | None
    config: DenseConfig


class Dense(LayerMethod[DenseConfig, DensePacked]):
    name: ClassVar[str] = "dense"
    cite: ClassVar[str] = "oneDNN through torch"
    exploits: ClassVar[str] = "nothing"
    config_type: ClassVar[type] = DenseConfig

    def supports(self, layer: Layer) -> str | None:
        return None

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[DenseConfig]]:
        if segment.layer.kind == "linear":
            return [self.candidate(segment, DenseConfig("nchw", "torch"))]
        configs = [DenseConfig("nchw", "torch"), DenseConfig("nhwc", "torch")]
        if torch._C._has_mkldnn and segment.layer.shape.n > 0 and segment.layer.precision == "fp32":
            configs.insert(0, DenseConfig("nhwc", "onednn"))
        return [self.candidate(segment, config) for config in configs]

    def candidate(self, segment: Segment, config: DenseConfig) -> Candidate[DenseConfig]:
        layout = Layout("any") if segment.layer.kind == "linear" else Layout(config.order)
        return Candidate(config, (layout,) * len(segment.inputs), (layout,))

    def pack(self, segment: Segment, parameters: Parameters, config: DenseConfig) -> DensePacked:
        weight = parameters["weight"].detach()
        if weight.dim() == 4 and config.order == "nhwc":
            weight = weight.contiguous(memory_format=torch.channels_last)
        return DensePacked(weight, parameters.get("bias"), config)

    def unpack(self, packed: DensePacked) -> Tensor:
        weight = packed.weight
        return weight.reshape(*weight.shape, 1, 1) if weight.dim() == 2 else weight

    def bind(self, segment: Segment, packed: DensePacked, built: bytes | None, device: Device) -> Run:
        if segment.layer.kind == "linear":
            return LinearRun(segment.layer, packed)
        if packed.config.library == "onednn":
            return OnednnRun(segment.layer, packed)
        return ConvRun(segment.layer, packed)


class ConvRun:
    """The ordinary operators; kinds differ in ``compute``."""

    workspace_bytes = 0
    allocates = True

    def __init__(self, layer: Layer, packed: DensePacked) -> None:
        self.shape, self.epilogue = layer.shape, layer.epilogue
        self.weight, self.bias = packed.weight, packed.bias

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        return (self.compute(inputs[0], residual),)

    def compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        shape = self.shape
        y = functional.conv2d(x, self.weight, self.bias, shape.stride, shape.padding, shape.dilation, shape.groups)
        return self.finish(y, residual)

    def finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """Epilogue, in place: ``y`` is ours."""
        activation, place = self.epilogue.activation, self.epilogue.residual
        if place == "before" and residual is not None:
            y += residual
        if activation == "relu":
            y.relu_()
        elif activation == "relu6":
            functional.relu6(y, inplace=True)
        return y.add_(residual) if place == "after" and residual is not None else y


class LinearRun(ConvRun):
    def compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self.finish(functional.linear(x, self.weight, self.bias), residual)


class OnednnRun(ConvRun):
    """Weights in oneDNN's own order, a residual sum fused.

    The activation is not: oneDNN's ReLU turns NaN into 0, torch's does not.  The operators are torch's own but not
    documented, so their absence or refusal is found at bind, not at run.
    """

    def __init__(self, layer: Layer, packed: DensePacked) -> None:
        super().__init__(layer, packed)
        shape = self.shape
        self.geometry: tuple[Any, ...] = (shape.padding, shape.stride, shape.dilation, shape.groups)
        self.reordered = torch.ops.aten.mkldnn_reorder_conv2d_weight(
            packed.weight.to_mkldnn(), *self.geometry, shape.input_shape
        )

    def compute(self, x: Tensor, residual: Tensor | None) -> Tensor:
        operator, weights = torch.ops.mkldnn._convolution_pointwise, (self.reordered, self.bias)
        if residual is not None and self.epilogue.residual == "before":
            y = operator.binary(x, residual, *weights, *self.geometry, "add", 1.0, None, [], None)
            return self.finish(y, None)
        return self.finish(operator(x, *weights, *self.geometry, "none", [], ""), residual)


METHOD = Dense()
