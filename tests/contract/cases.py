"""Layers, plans and engines made by hand, for every test that needs one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from zeroskip.core.device import Device, cpu, cuda
from zeroskip.core.errors import Unsupported
from zeroskip.core.graph import CONV, LINEAR, ConvAttributes, Graph, Node, Ref, Segment, Value
from zeroskip.core.jsonable import to_json
from zeroskip.core.layer import (
    PRECISION_DTYPES,
    Activation,
    ConvShape,
    Epilogue,
    Layer,
    Precision,
    ResidualPlace,
    Sparsity,
)
from zeroskip.core.method import AnyMethod, Candidate, layer_parameters, layer_segment
from zeroskip.core.oracle import UNIT_ROUNDOFF
from zeroskip.measure.bound import Bound, Case, Oracle, Stage, Verdict, bind, check
from zeroskip.methods import registry
from zeroskip.model.passes import simplify
from zeroskip.model.program import Program
from zeroskip.model.trace import trace
from zeroskip.plan.plan import Plan, Step, weights_hash
from zeroskip.plan.planner import versions
from zeroskip.run.engine import Engine, Variant

METHODS = tuple(registry())
OURS = tuple(name for name, method in registry().items() if method.exploits != "nothing")


_ANY = Layer("any", "conv2d", ConvShape(1, 4, 4, 4, 4, 1, 1), "fp32", Sparsity.of(torch.ones(4, 4, 1, 1)), Epilogue())
GPU_ONLY = {
    name for name in METHODS if (registry()[name].supports(_ANY, cpu(1)) or "").startswith("runs on NVIDIA GPUs")
}

_kind = "cpu"


def here() -> Device:
    """The device that the running test is about."""
    return cpu(1) if _kind == "cpu" else cuda()


@contextmanager
def on(kind: str) -> Iterator[None]:
    """Tests inside are about the CPU (also outside of this) or the GPU."""
    global _kind
    before, _kind = _kind, kind
    try:
        yield
    finally:
        _kind = before


def stable(examples: int) -> settings:
    """Hypothesis settings: the same examples in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,  # methods refuse what is not theirs
            HealthCheck.function_scoped_fixture,
        ],
    )


def sparse_weight(shape: Sequence[int], density: float, seed: int = 0) -> Tensor:
    """Normal numbers of which about ``density`` are not zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(tuple(shape), generator=generator)
    return torch.where(torch.rand(tuple(shape), generator=generator) < density, weight, 0.0)


@dataclass(frozen=True)
class Work:
    """One layer as a program of its own: inputs ``x`` and, with a residual, ``r``; the layer is called ``layer``."""

    program: Program

    def segment(self, method: AnyMethod, device: Device | None = None) -> Segment:
        """The method's segment for the layer; the test is skipped where the method refuses it."""
        try:
            return method.claim(self.program.graph, self.program.layers(), "layer", device or here())[0]
        except Unsupported as reason:
            pytest.skip(f"{method.name} refuses: {reason}")

    def case(self, seed: int = 0) -> Case:
        """Random inputs on the device of the test."""
        return Case.random(layer_segment(self.program.graph, self.program.layers()["layer"]), seed, here().torch)

    @property
    def parameters(self) -> dict[str, Tensor]:
        layer = self.program.layers()["layer"]
        return layer_parameters(self.program.graph, Segment(("layer",), (), ("layer",), (layer,)), self.program.tensors)


def work(
    shape: ConvShape,
    *,
    linear: bool = False,
    weight: Tensor | None = None,
    density: float = 0.3,
    bias: bool = True,
    activation: Activation = "none",
    residual: ResidualPlace = "none",
    precision: Precision = "fp32",
    seed: int = 0,
) -> Work:
    """A layer of ``shape`` with random weights, or ``weight``, on the CPU."""
    x_shape, y_shape, w_shape = shape.input_shape, shape.output_shape, shape.weight_shape
    if linear:
        x_shape, y_shape, w_shape = x_shape[:2], y_shape[:2], w_shape[:2]  # type: ignore[assignment]
    tensors = {"weight": sparse_weight(w_shape, density, seed) if weight is None else weight.reshape(w_shape)}
    if bias:
        tensors["bias"] = torch.randn(shape.k, generator=torch.Generator().manual_seed(seed + 1))
    tensors = {name: tensor.to(PRECISION_DTYPES[precision]) for name, tensor in tensors.items()}
    dtype = str(PRECISION_DTYPES[precision]).removeprefix("torch.")
    tf32 = precision == "tf32"
    conv = ConvAttributes(shape.stride, shape.padding, shape.dilation, shape.groups, activation, residual, tf32)
    node = Node(
        "layer",
        LINEAR if linear else CONV,
        (Ref("x"), Ref("weight"), Ref("bias") if bias else None, None if residual == "none" else Ref("r")),
        conv=conv,
    )
    inputs = ("x",) if residual == "none" else ("x", "r")
    values = {"x": Value(x_shape, dtype), "layer": Value(y_shape, dtype)}
    if residual != "none":
        values["r"] = Value(y_shape, dtype)
    parameters = {name: Value(tuple(tensor.shape), dtype) for name, tensor in tensors.items()}
    return Work(Program(Graph(inputs, Ref("layer"), (node,), values, parameters), tensors))


def candidates(method: AnyMethod, segment: Segment, device: Device | None = None) -> list[Candidate[Any]]:
    """Every candidate; the test is skipped where there is none."""
    try:
        found = list(method.configs(segment, device or here()))
    except Unsupported as reason:
        pytest.skip(f"{method.name}: {reason}")
    if not found:
        pytest.skip(f"{method.name} has no configuration for {segment.layer.shape}")
    return found


def some(found: Sequence[Candidate[Any]], count: int, seed: int = 0) -> list[Candidate[Any]]:
    """The first candidate, and others at random up to ``count``."""
    others = list(found[1:])
    random.Random(seed).shuffle(others)
    return [*found[:1], *others[: count - 1]]


def bound(name: str, job: Work, pick: int = 0, device: Device | None = None) -> Bound:
    """Candidate number ``pick`` (modulo how many there are) of a method, ready to run."""
    method, device = registry()[name], device or here()
    segment = job.segment(method, device)
    found = candidates(method, segment, device)
    return bind(method, segment, job.parameters, found[pick % len(found)], device)


def assert_right(name: str, job: Work, *, count: int | None = 2, device: Device | None = None, seed: int = 0) -> None:
    """The method's first candidate and others (all of them for ``count=None``) are within the oracle's bound."""
    method, device = registry()[name], device or here()
    segment = job.segment(method, device)
    found = candidates(method, segment, device)
    case = job.case(seed)
    oracle = Oracle(segment, job.parameters, case)
    for candidate in found if count is None else some(found, count, seed):
        stage = Stage(bind(method, segment, job.parameters, candidate, device), case)
        verdict = check(stage, oracle)
        assert verdict.right or (method.exploits == "nothing" and rounded_often(verdict, case)), (
            f"{name} is {verdict.worst:.3g} times its bound away with {candidate.config} on {segment.layer}"
        )


def bits(ready: Bound, case: Case) -> Tensor:
    """The output of a float32 layer as integers, after a run on a workspace full of ones."""
    stage = Stage(ready, case)
    if stage.workspace is not None:
        stage.workspace.fill_(255)
    return stage()[0].clone().view(torch.int32)


def rounded_often(verdict: Verdict, case: Case) -> bool:
    """In half precision a dense library rounds more than once, to define what a model computes; then only the whole
    result must be close."""
    return case.x.dtype in (torch.float16, torch.bfloat16) and verdict.relative < 4 * UNIT_ROUNDOFF[case.x.dtype]


# -- whole models -------------------------------------------------------------------------------------
class Net(nn.Module):
    """A model written as one function of the module and its inputs, with submodules as keywords."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def thin(model: nn.Module, density: float = 0.1, seed: int = 0) -> nn.Module:
    """``model`` in evaluation mode, its convolutions and linear layers left with ``density`` of their weights, and
    its batch norms with statistics that are not 0 and 1.  In place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                keep = torch.rand(module.weight.shape, generator=generator) < density
                module.weight.copy_(torch.where(keep, module.weight, 0.0))
            elif isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.running_mean, -0.2, 0.2),
                    (module.running_var, 0.5, 1.5),
                    (module.weight, 0.7, 1.3),
                    (module.bias, -0.2, 0.2),
                ):
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def plan_with(
    program: Program,
    *prefer: str,
    threads: int = 1,
    pick: int = 0,
    methods: Mapping[str, AnyMethod] | None = None,
    device: Device | None = None,
) -> Plan:
    """A plan made without measuring: for each layer the first of the methods ``prefer`` (and then dense) that takes it,
    with its candidate number ``pick``.  For the device that the program's tensors are on, or ``device``."""
    if device is None:
        on_gpu = any(tensor.is_cuda for tensor in program.tensors.values())
        device = cuda() if on_gpu else cpu(threads)
    methods, steps, covered = methods or registry(), list[Step](), set[str]()
    layers = program.layers()
    for name, layer in layers.items():
        if name in covered:
            continue
        for method_name in (*prefer, "dense"):
            method = methods[method_name]
            try:
                segment = method.claim(program.graph, layers, name, device)[0]
                found = method.configs(segment, device)
            except Unsupported:
                continue
            if not found:
                continue
            candidate = found[pick % len(found)]
            steps.append(
                Step(
                    segment.nodes,
                    str(layer.shape),
                    layer.weights.density,
                    method_name,
                    to_json(candidate.config),
                    "chosen by a test",
                )
            )
            covered |= set(segment.nodes)
            break
    shapes = tuple(program.graph.values[name].shape for name in program.graph.inputs)
    hashed = weights_hash(program.tensors)
    return Plan(device, program.precisions, shapes, tuple(steps), hashed, versions(device))


def engine_of(program: Program, *prefer: str, threads: int = 1, pick: int = 0) -> Engine:
    """An engine on a plan made without measuring; see ``plan_with``."""
    return Engine([Variant(program, plan_with(program, *prefer, threads=threads, pick=pick))], registry())


def program_of(model: nn.Module, *inputs: Tensor) -> Program:
    """``model`` in evaluation mode, traced and simplified."""
    return simplify(trace(model.eval(), inputs))


def engine_with(
    model: nn.Module, example: Tensor | tuple[Tensor, ...], *prefer: str, threads: int = 1, pick: int = 0
) -> Engine:
    """``engine_of`` a model."""
    inputs = (example,) if isinstance(example, Tensor) else example
    return engine_of(program_of(model, *inputs), *prefer, threads=threads, pick=pick)


def lanes(device: Device, floats: int) -> Device:
    """The same machine with vector registers of another width."""
    return replace(device, vector_floats=floats, vector_registers=32 if floats == 16 else 16)
