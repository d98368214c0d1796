"""The compiled model: an ``nn.Module`` that is called like the one it was made of."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.core.device import Device, cuda
from zeroskip.core.errors import Unsupported, ZeroskipError
from zeroskip.core.graph import Graph, Ref, Segment
from zeroskip.core.jsonable import from_json
from zeroskip.core.layer import Layer
from zeroskip.core.method import AnyMethod, layer_parameters
from zeroskip.measure.bound import Bound, bind
from zeroskip.model.program import Program
from zeroskip.plan.plan import Plan, Step
from zeroskip.run.executor import Executor
from zeroskip.run.graphs import Graphs


@dataclass(frozen=True)
class Variant:
    """The engine for one set of input shapes."""

    program: Program
    plan: Plan


class Engine(nn.Module):
    """Same call, same shapes, same dtype, same values as the model it was compiled from, in evaluation mode.

    Returned tensors are new and never overwritten.  Several threads may call it at once, on a GPU on several streams.
    """

    def __init__(
        self, variants: Sequence[Variant], methods: Mapping[str, AnyMethod], labels: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.variants = tuple(variants)
        for variant in variants:
            check_labels(labels, variant.program.graph)
        self.labels = None if labels is None else tuple(labels)
        """The names of the classes, in the order of the output's columns."""
        plan = self.plan
        self.device = _device(plan).torch
        """Where its inputs must be."""
        self._executors = {variant.plan.input_shapes: executor(variant, methods) for variant in variants}
        self._calls: dict[tuple[tuple[int, ...], ...], Callable[[Sequence[Tensor]], Any]] = dict(self._executors)
        if plan.device.kind == "cuda":
            programs = {variant.plan.input_shapes: variant.program for variant in variants}
            self._calls = {shapes: Graphs(run, programs[shapes]) for shapes, run in self._executors.items()}
            if plan.device.name != (here := cuda().name):
                warnings.warn(
                    f"this plan was made on {plan.device.name} and runs on {here}: its times do not hold here, compile "
                    "with replan=True to measure again",
                    stacklevel=3,
                )
        graph = variants[0].program.graph
        self._dtypes = [getattr(torch, graph.values[name].dtype) for name in graph.inputs]

    @property
    def plan(self) -> Plan:
        """The plan of the first input shape."""
        return self.variants[0].plan

    @property
    def plans(self) -> tuple[Plan, ...]:
        """One plan per input shape."""
        return tuple(variant.plan for variant in self.variants)

    def forward(self, *inputs: Tensor) -> Any:
        """Run the model.

        Raises:
            ValueError: inputs of another number, shape, dtype or device than it was compiled for.
        """
        return self._call(inputs)(inputs)

    def work(self, *inputs: Tensor) -> Callable[[], Any]:
        """The work of one such call as a function, for a timer or for a graph of the caller's, on one stream at a time.

        It reads these very tensors at every call and launches its kernels one by one.  Raises as ``forward``.
        """
        self._call(inputs)
        return self._executors[tuple([tuple(x.shape) for x in inputs])].on(inputs)

    def _call(self, inputs: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Any]:
        """What runs ``inputs``, which are checked."""
        try:
            shapes = tuple([x.shape for x in inputs])
        except AttributeError:
            raise ValueError(f"inputs must be tensors, got {[type(x).__name__ for x in inputs]}") from None
        call = self._calls.get(shapes)
        if call is None:
            known = "; ".join(", ".join("x".join(map(str, shape)) for shape in key) for key in self._calls)
            raise ValueError(
                f"this engine was compiled for inputs of shape {known}, got "
                f"{', '.join('x'.join(map(str, shape)) for shape in shapes) or 'none'}: compile it with an "
                "example of that shape too, as in zeroskip.compile(model, [example1, example2])"
            )
        for x, dtype in zip(inputs, self._dtypes, strict=True):
            if x.dtype != dtype or x.device != self.device:
                raise ValueError(
                    f"this engine takes {dtype} on {_place(self.device)}, got {x.dtype} on {x.device}: convert the "
                    f"input or compile with such an example"
                )
        return call

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write a ``.zsk`` file: graph, plans, sparse weights and labels, no code and no pickle.

        An interruption leaves the old file or the new one.

        Args:
            half: round float32 weights of layers to float16 numbers, which take half the bytes.  The engine that is
                loaded computes in float32 as before, with the same zeros, and a note of its plan says how far the
                weights moved; its accuracy is yours to measure.

        Raises:
            SaveError: the graph holds an operator or argument that a file cannot carry, or, with ``half``, a weight is
                beyond float16's 65504; it is named.
        """
        from zeroskip.run.file import save
        from zeroskip.run.rounding import rounded

        save([rounded(one) for one in self.variants] if half else self.variants, Path(path), self.labels)

    def extra_repr(self) -> str:
        return "\n".join(self.plan.summary())


def check_labels(labels: Sequence[str] | None, graph: Graph) -> None:
    """Raise ``ValueError`` where ``labels`` cannot name the columns of the graph's output, one tensor [n, classes]."""
    if labels is None:
        return
    if isinstance(labels, str) or not all(isinstance(label, str) and label.isprintable() for label in labels):
        raise ValueError(f"labels are a sequence of printable strings, got {labels!r:.200}")
    output = graph.values.get(graph.outputs.ref) if isinstance(graph.outputs, Ref) else None
    if output is None or len(output.shape) != 2:
        raise ValueError(f"labels are for a model that returns one tensor [n, classes], this one returns {output}")
    if len(labels) != output.shape[1]:
        raise ValueError(f"got {len(labels)} labels for an output of {output.shape[1]} classes: give one for each")


def _place(device: torch.device) -> str:
    return "the cpu" if device.type == "cpu" else str(device)


def _device(plan: Plan) -> Device:
    """The device that a plan runs on here: for a GPU the current one, which may be another than it was made on.

    Raises:
        ValueError: the plan is for a GPU, and torch finds none.
    """
    return plan.device if plan.device.kind == "cpu" else cuda()


def executor(variant: Variant, methods: Mapping[str, AnyMethod], known: dict[str, Bound] | None = None) -> Executor:
    """Pack, build and bind every step of a plan.

    Args:
        known: segments bound before, by step and configuration; used instead of binding again, and added to.

    Raises:
        ValueError: a step that its method cannot run as the plan says.
    """
    program, plan = variant.program, variant.plan
    layers, device = program.layers(), _device(plan)
    known = {} if known is None else known
    keys = [f"{step.nodes} {step.method} {step.config}" for step in plan.steps]

    def bound(step: Step) -> Bound:
        method = methods[step.method]
        try:
            segment = _segment(program, layers, step, method, device)
            candidate = method.candidate(segment, from_json(method.config_type, step.config))
            parameters = layer_parameters(program.graph, segment, program.tensors)
            return bind(method, segment, parameters, candidate, device)
        except (ZeroskipError, RuntimeError) as error:
            if device.name == plan.device.name:
                raise
            raise ValueError(
                f"{step.method} cannot run {step.name} on {device.name} as it did on {plan.device.name}, where this "
                f"plan was made: {error}: compile with replan=True to measure again"
            ) from error

    missing = {key: step for key, step in zip(keys, plan.steps, strict=True) if key not in known}
    # Packing is NumPy's work mostly, which lets other threads run.  The current GPU is a setting of each thread.
    enter = None
    if device.kind == "cuda":
        enter = partial(torch.cuda.set_device, device.torch)
    with ThreadPoolExecutor(os.cpu_count(), initializer=enter) as pool:
        known.update(zip(missing, pool.map(bound, missing.values()), strict=True))
    if device.kind == "cuda":
        torch.cuda.synchronize()  # what those threads copied is there for every stream
    return Executor(program, [known[key] for key in keys], device)


def _segment(program: Program, layers: Mapping[str, Layer], step: Step, method: AnyMethod, device: Device) -> Segment:
    try:
        claimed = method.claim(program.graph, layers, step.nodes[0], device)
    except Unsupported as reason:
        raise ValueError(f"{step.method} cannot run {step.name}: {reason}: compile with replan=True") from reason
    for segment in claimed:
        if segment.nodes == step.nodes:
            return segment
    raise ValueError(f"{step.method} does not run {step.nodes} as one segment: compile with replan=True")
