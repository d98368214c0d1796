"""The compiled model: an ``nn.Module`` that is called like the one it was made of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.core.errors import Unsupported
from zeroskip.core.graph import Segment
from zeroskip.core.jsonable import from_json
from zeroskip.core.layer import Layer
from zeroskip.core.method import AnyMethod, layer_parameters
from zeroskip.measure.bound import Bound, bind
from zeroskip.model.program import Program
from zeroskip.plan.plan import Plan, Step
from zeroskip.run.executor import Executor


@dataclass(frozen=True)
class Variant:
    """The engine for one set of input shapes."""

    program: Program
    plan: Plan


class Engine(nn.Module):
    """Same call, same shapes, same dtype, same values as the model it was compiled from, in evaluation mode.

    Returned tensors are new and never overwritten.  Several threads may call it at once.
    """

    def __init__(self, variants: Sequence[Variant], methods: Mapping[str, AnyMethod]) -> None:
        super().__init__()
        self.variants = tuple(variants)
        self._executors = {variant.plan.input_shapes: executor(variant, methods) for variant in variants}
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
        try:
            shapes = tuple([tuple(x.shape) for x in inputs])
        except AttributeError:
            raise ValueError(f"inputs must be tensors, got {[type(x).__name__ for x in inputs]}") from None
        run = self._executors.get(shapes)
        if run is None:
            known = "; ".join(", ".join("x".join(map(str, shape)) for shape in key) for key in self._executors)
            raise ValueError(
                f"this engine was compiled for inputs of shape {known}, got "
                f"{', '.join('x'.join(map(str, shape)) for shape in shapes) or 'none'}: compile it with an "
                "example of that shape too, as in zeroskip.compile(model, [example1, example2])"
            )
        for x, dtype in zip(inputs, self._dtypes, strict=True):
            if x.dtype != dtype or x.device.type != "cpu":
                raise ValueError(
                    f"this engine takes {dtype} on the cpu, got {x.dtype} on {x.device}: convert the input "
                    f"or compile with such an example"
                )
        return run(inputs)

    def save(self, path: str | Path) -> None:
        """Write a ``.zsk`` file: graph, plans and sparse weights, no code and no pickle.

        Raises:
            SaveError: the graph holds an operator or argument that a file cannot carry; it is named.
        """
        from zeroskip.run.file import save

        save(self.variants, Path(path))

    def extra_repr(self) -> str:
        return "\n".join(self.plan.summary())


def executor(variant: Variant, methods: Mapping[str, AnyMethod], known: dict[str, Bound] | None = None) -> Executor:
    """Pack, build and bind every step of a plan.

    Args:
        known: segments bound before, by step and configuration; used instead of binding again, and added to.

    Raises:
        ValueError: a step that its method cannot run as the plan says.
    """
    program, plan = variant.program, variant.plan
    layers = program.layers()
    known = {} if known is None else known
    keys = [f"{step.nodes} {step.method} {step.config}" for step in plan.steps]

    def bound(step: Step) -> Bound:
        method = methods[step.method]
        segment = _segment(program, layers, step, method)
        candidate = method.candidate(segment, from_json(method.config_type, step.config))
        parameters = layer_parameters(program.graph, segment, program.tensors)
        return bind(method, segment, parameters, candidate, plan.device)

    missing = {key: step for key, step in zip(keys, plan.steps, strict=True) if key not in known}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Packing is NumPy's work mostly, which lets other threads run.
        known.update(zip(missing, pool.map(bound, missing.values()), strict=True))
    return Executor(program, [known[key] for key in keys], plan.device.threads)


def _segment(program: Program, layers: Mapping[str, Layer], step: Step, method: AnyMethod) -> Segment:
    try:
        claimed = method.claim(program.graph, layers, step.nodes[0])
    except Unsupported as reason:
        raise ValueError(f"{step.method} cannot run {step.name}: {reason}: compile with replan=True") from reason
    for segment in claimed:
        if segment.nodes == step.nodes:
            return segment
    raise ValueError(f"{step.method} does not run {step.nodes} as one segment: compile with replan=True")
