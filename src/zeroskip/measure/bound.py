"""A segment made ready to run, and checked: the one function that tuning, benchmark and engine all call."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.graph import Segment
from zeroskip.core.layout import allocate, conform, workspace
from zeroskip.core.method import AnyMethod, Candidate, Run
from zeroskip.core.oracle import expected


@dataclass(frozen=True)
class Bound:
    """``run`` of one candidate, with what its preparation cost."""

    method: AnyMethod
    segment: Segment
    candidate: Candidate[Any]
    packed: Any
    run: Run
    pack_seconds: float
    build_seconds: float


def bind(
    method: AnyMethod, segment: Segment, parameters: Mapping[str, Tensor], candidate: Candidate[Any], device: Device
) -> Bound:
    """Pack, build and bind ``segment``; see ``Method`` for the arguments."""
    started = time.perf_counter()
    packed = method.pack(segment, parameters, candidate.config)
    packed_at = time.perf_counter()
    built = method.build(packed)
    run = method.bind(segment, packed, built, device)
    return Bound(method, segment, candidate, packed, run, packed_at - started, time.perf_counter() - packed_at)


def packed_bytes(packed: Any) -> int:
    """Bytes of every tensor in a packed record."""
    if isinstance(packed, Tensor):
        return packed.numel() * packed.element_size()
    fields = getattr(packed, "__dataclass_fields__", {})
    return sum(packed_bytes(getattr(packed, name)) for name in fields)


@dataclass(frozen=True)
class Case:
    """Random inputs for one layer, float32 in the layer's dtype; random, because zeros run faster and hide errors."""

    x: Tensor
    residual: Tensor | None

    @staticmethod
    def random(segment: Segment, seed: int = 0) -> Case:
        layer = segment.layer
        generator = torch.Generator().manual_seed(seed)
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}.get(
            layer.precision, torch.float32
        )
        shape, out = layer.shape.input_shape, layer.shape.output_shape
        x_shape, y_shape = (shape[:2], out[:2]) if layer.kind == "linear" else (shape, out)
        x = torch.randn(x_shape, generator=generator).to(dtype)
        residual = layer.epilogue.residual != "none"
        return Case(x, torch.randn(y_shape, generator=generator).to(dtype) if residual else None)


class Stage:
    """Inputs, outputs and workspace laid out as one bound segment wants them; calling it runs the segment once."""

    def __init__(self, bound: Bound, case: Case) -> None:
        self.bound = bound
        layouts = bound.candidate.inputs
        self.inputs = [conform(case.x, (0, 0), layouts[0])]
        self.residual = None if case.residual is None else conform(case.residual, (0, 0), layouts[1])
        layer = bound.segment.layer
        shape = layer.shape.output_shape[: case.x.dim()]
        self.outputs = [] if bound.run.allocates else [allocate(shape, dtype=case.x.dtype)]
        self.workspace = workspace(bound.run.workspace_bytes)

    def __call__(self) -> Sequence[Tensor]:
        return self.bound.run(self.inputs, self.outputs, self.workspace, self.residual)


@dataclass(frozen=True)
class Verdict:
    """``relative``: Frobenius distance to float64; ``worst``: the largest share of its bound that an element used."""

    relative: float
    worst: float

    @property
    def right(self) -> bool:
        return self.worst <= 1.0


CHECKED_MACS = 2e9
"""A batch whose float64 reference costs more than this is checked on its first and last image only."""


class Oracle:
    """The float64 result for one layer, its weights and one case, computed once for all methods."""

    def __init__(self, segment: Segment, parameters: Mapping[str, Tensor], case: Case) -> None:
        layer = segment.layer
        self.images: list[int] | slice = slice(None)
        if layer.shape.macs > CHECKED_MACS and layer.shape.n > 2:
            self.images = [0, layer.shape.n - 1]
        x = case.x[self.images]
        layer = replace(layer, shape=replace(layer.shape, n=x.shape[0]))
        residual = None if case.residual is None else case.residual[self.images]
        self.expected = expected(layer, x, parameters["weight"], parameters.get("bias"), residual)

    def judge(self, y: Tensor) -> Verdict:
        """How far ``y`` lies from the truth; an element never written (NaN) is infinitely far."""
        value, bound = self.expected.value, self.expected.bound
        error = (y[self.images].double() - value).abs()
        found = y[self.images].double()
        same = (found == value) | (found.isnan() & value.isnan())
        share = torch.where(same, 0.0, error / bound).nan_to_num(nan=torch.inf)
        error, norm = error[~same], float(value.norm())
        return Verdict(
            float(error.norm()) / norm if norm else float(error.norm()), float(share.max()) if share.numel() else 0.0
        )


def check(stage: Stage, oracle: Oracle) -> Verdict:
    """Run once into outputs and workspace full of NaN, and compare."""
    for output in stage.outputs:
        output.fill_(torch.nan)
    if stage.workspace is not None:
        stage.workspace.fill_(255)
    return oracle.judge(stage()[0])
