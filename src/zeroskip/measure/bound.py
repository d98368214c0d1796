"""A segment made ready to run, and checked: the one function that tuning, benchmark and engine all call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.graph import Segment
from zeroskip.core.layer import PRECISION_DTYPES
from zeroskip.core.layout import CPU, allocate, conform, workspace
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


@dataclass(frozen=True)
class Prepared:
    """What a candidate needs before it meets the device: packed weights on the CPU and machine code."""

    packed: Any
    built: bytes | None
    pack_seconds: float
    build_seconds: float


def prepare(
    method: AnyMethod, segment: Segment, parameters: Mapping[str, Tensor], candidate: Candidate[Any], device: Device
) -> Prepared:
    """Pack and build ``candidate`` for ``device``, which is not touched: several threads may do this at once.

    Args:
        parameters: on the CPU.
    """
    started = time.perf_counter()
    packed = method.pack(segment, parameters, candidate.config)
    packed_at = time.perf_counter()
    built = method.build(packed, device)
    return Prepared(packed, built, packed_at - started, time.perf_counter() - packed_at)


def bind(
    method: AnyMethod,
    segment: Segment,
    parameters: Mapping[str, Tensor],
    candidate: Candidate[Any],
    device: Device,
    prepared: Prepared | None = None,
) -> Bound:
    """Pack, build and bind ``segment``; see ``Method`` for the arguments.

    Packing works on CPU copies of the parameters; what it makes is moved to the device.

    Args:
        prepared: what ``prepare`` made of the same arguments, instead of packing and building here.
    """
    if prepared is None:
        on_cpu = {name: tensor.cpu() for name, tensor in parameters.items()}
        prepared = prepare(method, segment, on_cpu, candidate, device)
    started = time.perf_counter()
    packed = moved(prepared.packed, device.torch)
    moved_at = time.perf_counter()
    run = method.bind(segment, packed, prepared.built, device)
    pack_seconds = prepared.pack_seconds + moved_at - started
    build_seconds = prepared.build_seconds + time.perf_counter() - moved_at
    return Bound(method, segment, candidate, packed, run, pack_seconds, build_seconds)


def packed_bytes(packed: Any) -> int:
    """Bytes of every tensor in a packed record."""
    if isinstance(packed, Tensor):
        return packed.numel() * packed.element_size()
    fields = getattr(packed, "__dataclass_fields__", {})
    return sum(packed_bytes(getattr(packed, name)) for name in fields)


def moved(packed: Any, device: torch.device) -> Any:
    """A packed record with every tensor on ``device``."""
    if isinstance(packed, Tensor):
        return packed.to(device)
    if not dataclasses.is_dataclass(packed) or isinstance(packed, type):
        return packed
    parts = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    there = {name: moved(part, device) for name, part in parts.items()}
    changed = any(there[name] is not part for name, part in parts.items())
    return replace(packed, **there) if changed else packed


@dataclass(frozen=True)
class Case:
    """Random inputs for one layer, normal in the layer's dtype; random, because zeros run faster and hide errors."""

    x: Tensor
    residual: Tensor | None

    @staticmethod
    def random(segment: Segment, seed: int = 0, device: torch.device = CPU) -> Case:
        layer = segment.layer
        generator = torch.Generator(device).manual_seed(seed)
        dtype = PRECISION_DTYPES[layer.precision]
        shape, out = layer.shape.input_shape, layer.shape.output_shape
        x_shape, y_shape = (shape[:2], out[:2]) if layer.kind == "linear" else (shape, out)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        return Case(draw(x_shape), draw(y_shape) if layer.epilogue.residual != "none" else None)

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.x, self.residual) if tensor is not None)


class Stage:
    """Inputs, outputs and workspace laid out as one bound segment wants them; calling it runs the segment once."""

    def __init__(self, bound: Bound, case: Case) -> None:
        self.bound = bound
        layouts = bound.candidate.inputs
        self.inputs = [conform(case.x, (0, 0), layouts[0])]
        self.residual = None if case.residual is None else conform(case.residual, (0, 0), layouts[1])
        layer = bound.segment.layer
        shape = layer.shape.output_shape[: case.x.dim()]
        self.outputs = [] if bound.run.allocates else [allocate(shape, dtype=case.x.dtype, device=case.x.device)]
        self.workspace = workspace(bound.run.workspace_bytes, case.x.device)

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


CHECKED_MACS = {"cpu": 2e9, "cuda": 1e11}
"""A batch whose float64 reference costs more than this is checked on its first and last image only."""


class Oracle:
    """The float64 result for one layer, its weights and one case, computed once for all methods."""

    def __init__(self, segment: Segment, parameters: Mapping[str, Tensor], case: Case) -> None:
        layer = segment.layer
        self.images: list[int] | slice = slice(None)
        if layer.shape.macs > CHECKED_MACS[case.x.device.type] and layer.shape.n > 2:
            self.images = [0, layer.shape.n - 1]
        x = case.x[self.images]
        layer = replace(layer, shape=replace(layer.shape, n=x.shape[0]))
        residual = None if case.residual is None else case.residual[self.images]
        weight, bias = parameters["weight"].to(x.device), parameters.get("bias")
        self.expected = expected(layer, x, weight, None if bias is None else bias.to(x.device), residual)

    def judge(self, y: Tensor, float16_terms: int = 0) -> Verdict:
        """How far ``y`` lies from the truth; an element never written (NaN) is infinitely far."""
        value, bound = self.expected.value, self.expected.rounded(float16_terms)
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
    return oracle.judge(stage()[0], stage.bound.candidate.float16_terms)
