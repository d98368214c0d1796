"""A method that claims two layers at once, and a clock that says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported
from zeroskip.core.graph import CONV, LINEAR, Graph, Segment
from zeroskip.core.layer import Layer
from zeroskip.core.layout import Layout
from zeroskip.core.method import Candidate, LayerMethod, Method, Parameters, Run, layer_segment
from zeroskip.core.record import Times
from zeroskip.measure.timer import Measurement


@dataclass(frozen=True)
class FakeConfig:
    number: int = 0


@dataclass(frozen=True)
class FakePacked:
    weight: Tensor
    bias: Tensor | None


class FakeRun:
    workspace_bytes = 0
    allocates = True

    def __init__(self, layer: Layer, packed: FakePacked, add: float) -> None:
        self.layer, self.packed, self.add = layer, packed, add

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        shape, weight = self.layer.shape, self.packed.weight
        if self.layer.kind == "linear":
            y = functional.linear(inputs[0], weight, self.packed.bias)
        else:
            y = functional.conv2d(
                inputs[0], weight, self.packed.bias, shape.stride, shape.padding, shape.dilation, shape.groups
            )
        return (y + self.add,)


class Fake(LayerMethod[FakeConfig, FakePacked]):
    """Runs layers without an epilogue; ``add`` makes it wrong, ``fails`` makes its build fail."""

    cite: ClassVar[str] = "these tests"
    exploits: ClassVar[str] = "weights"
    config_type: ClassVar[type] = FakeConfig
    name = "fake"

    def __init__(
        self,
        add: float = 0.0,
        refuses: str | None = None,
        fails: Exception | None = None,
        configs: int = 1,
        run_seconds: float = 0.0,
        build_seconds: float = 0.0,
    ) -> None:
        self.add, self.refuses, self.fails, self.count = add, refuses, fails, configs
        self.run_seconds, self.build_seconds = run_seconds, build_seconds

    def supports(self, layer: Layer, device: Device) -> str | None:
        return self.refuses

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[FakeConfig]]:
        return [self.candidate(segment, FakeConfig(number)) for number in range(self.count)]

    def candidate(self, segment: Segment, config: FakeConfig) -> Candidate[FakeConfig]:
        layouts = (Layout("any"),) * len(segment.inputs), (Layout("any"),)
        return Candidate(config, *layouts, run_seconds=self.run_seconds, build_seconds=self.build_seconds)

    def pack(self, segment: Segment, parameters: Parameters, config: FakeConfig) -> FakePacked:
        return FakePacked(parameters["weight"], parameters.get("bias"))

    def unpack(self, packed: FakePacked) -> Tensor:
        return packed.weight

    def bind(self, segment: Segment, packed: FakePacked, built: bytes | None, device: Device) -> Run:
        if self.fails is not None:
            raise self.fails
        return FakeRun(segment.layer, packed, self.add)


class Pair(Method[FakeConfig, Any]):
    """Claims a convolution and the one that reads it as one segment."""

    name: ClassVar[str] = "pair"
    cite: ClassVar[str] = "these tests"
    exploits: ClassVar[str] = "weights"
    config_type: ClassVar[type] = FakeConfig

    def claim(self, graph: Graph, layers: Mapping[str, Layer], start: str, device: Device) -> Sequence[Segment]:
        following = [graph.node(name) for name in graph.users()[start]]
        if len(following) != 1 or following[0].op not in (CONV, LINEAR):
            raise Unsupported("no convolution reads it")
        first, second = layer_segment(graph, layers[start]), following[0].name
        return (Segment((start, second), first.inputs, (second,), (layers[start], layers[second])),)

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[FakeConfig]]:
        return [self.candidate(segment, FakeConfig())]

    def candidate(self, segment: Segment, config: FakeConfig) -> Candidate[FakeConfig]:
        return Candidate(config, (Layout("any"),), (Layout("any"),))

    def pack(self, segment: Segment, parameters: Parameters, config: FakeConfig) -> Any:
        return FakePacked(torch.zeros(()), None), dict(parameters)

    def unpack(self, packed: Any) -> Tensor:
        raise NotImplementedError

    def bind(self, segment: Segment, packed: Any, built: bytes | None, device: Device) -> Run:
        parameters, names = packed[1], [layer.name for layer in segment.layers]

        class PairRun:
            workspace_bytes = 0
            allocates = True

            def __call__(
                self,
                inputs: Sequence[Tensor],
                outputs: Sequence[Tensor],
                workspace: Tensor | None,
                residual: Tensor | None = None,
            ) -> Sequence[Tensor]:
                y = inputs[0]
                for name, layer in zip(names, segment.layers, strict=True):
                    y = functional.conv2d(
                        y, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"), padding=layer.shape.padding
                    )
                return (y,)

        return PairRun()


def clock(times_us: Mapping[str, float]) -> Callable[..., Measurement]:
    """A timer under which every variant of a method takes ``times_us[method]``, and a later one a little longer."""

    def timer(variants: Mapping[str, Callable[[], object]], rounds: int, device: Device) -> Measurement:
        found = {}
        for key in variants:
            method, _, index = key.partition("/")
            found[key] = Times((times_us[method] + 0.001 * int(index or 0),) * 3, "cpu")
        return Measurement(found, False)

    return timer
