"""From a program to plans: tune every distinct layer, cover the graph, write down why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata

import torch

from zeroskip._version import __version__
from zeroskip.core.device import Device
from zeroskip.core.env import source_hash
from zeroskip.core.errors import Unsupported, ZeroskipError
from zeroskip.core.graph import CONV, LINEAR, Graph, Segment
from zeroskip.core.jsonable import to_json
from zeroskip.core.layer import Layer
from zeroskip.core.method import AnyMethod, layer_parameters
from zeroskip.measure.others import Timing
from zeroskip.measure.timer import Timer, measure
from zeroskip.model.program import Program
from zeroskip.plan.cover import Choice, CopyCost, cover
from zeroskip.plan.plan import Plan, Rejection, Step, weights_hash
from zeroskip.plan.tune import Option, Tuned, tune

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``."""


def silent(done: int, total: int, what: str) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Tuning:
    """What was measured: by starting node, the options of every segment and the refusals of every method."""

    program: Program
    layers: Mapping[str, Layer]
    options: Mapping[str, tuple[Option, ...]]
    refused: Mapping[str, tuple[Rejection, ...]]
    device: Device
    seconds: float
    contended: bool


def tune_program(
    program: Program,
    methods: Mapping[str, AnyMethod],
    device: Device,
    progress: Progress = silent,
    timer: Timer = measure,
) -> Tuning:
    """Measure every method on every distinct layer of ``program``."""
    started = time.perf_counter()
    graph, layers = program.graph, program.layers()
    timing = Timing(device, timer, between=True)  # as the network will run each
    known: dict[tuple[object, ...], Tuned] = {}
    options: dict[str, tuple[Option, ...]] = {}
    refused: dict[str, tuple[Rejection, ...]] = {}
    contended = False
    for done, name in enumerate(layers):
        progress(done, len(layers), name)
        claimed, reasons = claims(graph, layers, name, methods, device)
        found: list[Option] = []
        for segment, able in claimed.items():
            if len(segment.layers) > 1:
                # Cover, plan and engine carry such segments; the oracle that tuning checks against knows one layer.
                reasons += [Rejection(other, "segments of several layers are not tuned yet") for other in able]
                continue
            key = (tuple(layer.key for layer in segment.layers), tuple(sorted(able)))
            if key not in known:
                parameters = layer_parameters(graph, segment, program.tensors)
                known[key] = tune(segment, able, parameters, timing)
            contended |= known[key].contended
            found += [replace(option, segment=segment) for option in known[key].options]
            reasons += known[key].rejected
        if not found:
            raise ZeroskipError(
                f"no method can run {name} ({layers[name].shape}): "
                + "; ".join(f"{item.method}: {item.reason}" for item in reasons)
            )
        options[name], refused[name] = tuple(found), tuple(reasons)
    progress(len(layers), len(layers), "")
    return Tuning(program, layers, options, refused, device, time.perf_counter() - started, contended)


def claims(
    graph: Graph,
    layers: Mapping[str, Layer],
    name: str,
    methods: Mapping[str, AnyMethod],
    device: Device,
) -> tuple[dict[Segment, dict[str, AnyMethod]], list[Rejection]]:
    """What the methods could run from the layer ``name`` on: by segment the methods; and the refusals of the others."""
    found: dict[Segment, dict[str, AnyMethod]] = {}
    reasons = []
    for method_name, method in methods.items():
        try:
            for segment in method.claim(graph, layers, name, device):
                found.setdefault(segment, {})[method_name] = method
        except Unsupported as reason:
            reasons.append(Rejection(method_name, str(reason)))
    return found, reasons


def best_plan(tuning: Tuning) -> Plan:
    """The cheapest cover by the measured times."""
    return _plan(tuning, cover(tuning.program.graph, tuning.options, CopyCost.on(tuning.device)))


def skipping_nothing(tuning: Tuning, methods: Mapping[str, AnyMethod]) -> Tuning:
    """``tuning`` with the options that skip no zeros.

    A layer without zeros may be run by any method: there is nothing to skip, and its gain is not due to zeros.
    """
    dense = {name for name, method in methods.items() if method.exploits == "nothing"}

    def skips_nothing(option: Option) -> bool:
        return option.method in dense or not any(layer.weights.skippable for layer in option.segment.layers)

    options = {name: tuple(filter(skips_nothing, found)) for name, found in tuning.options.items()}
    return replace(tuning, options=options)


def dense_plans(tuning: Tuning, methods: Mapping[str, AnyMethod]) -> list[Plan]:
    """Covers that skip nothing: the cheapest, and those that keep one layout throughout."""
    plans: list[Plan] = []
    dense = skipping_nothing(tuning, methods).options
    for order in (None, "nchw", "nhwc"):
        options = {
            name: [option for option in found if order is None or option.candidate.outputs[0].order in (order, "any")]
            for name, found in dense.items()
        }
        if all(options.values()):
            plan = _plan(tuning, cover(tuning.program.graph, options, CopyCost.on(tuning.device)))
            if all(plan.steps != other.steps for other in plans):
                plans.append(plan)
    return plans


def _plan(tuning: Tuning, choice: Choice) -> Plan:
    program = tuning.program
    shapes = tuple(program.graph.values[name].shape for name in program.graph.inputs)
    return Plan(
        tuning.device,
        program.precisions,
        shapes,
        tuple(step_of(tuning, option) for option in choice.options),
        weights_hash(program.tensors),
        versions(tuning.device),
        tune_seconds=tuning.seconds,
    )


def versions(device: Device) -> dict[str, str]:
    """Of everything that may change what a plan for ``device`` means."""
    found = {"zeroskip": __version__, "source": source_hash(), "torch": torch.__version__}
    if device.kind == "cpu":
        return {**found, "llvmlite": metadata.version("llvmlite")}
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {**found, "cuda": str(torch.version.cuda), "cudnn": str(cudnn)}


def step_of(tuning: Tuning, option: Option) -> Step:
    """``option`` as a step of a plan, with what it was chosen over."""
    name = option.segment.nodes[0]
    layer = option.segment.layer
    rivals = [other for other in tuning.options[name] if other.segment.nodes == option.segment.nodes]
    fastest: dict[str, float] = {}
    for other in rivals:
        fastest[other.method] = min(fastest.get(other.method, other.time_us), other.time_us)
    lost = tuple(
        Rejection(method, "slower" if time_us > option.time_us else "would need its tensors in another layout", time_us)
        for method, time_us in fastest.items()
        if method != option.method
    )
    dense_us = fastest.get("dense")
    shape = str(layer.shape) if layer.kind == "conv2d" else f"{layer.shape.c}->{layer.shape.k} linear n{layer.shape.n}"
    return Step(
        option.segment.nodes,
        shape,
        layer.weights.density,
        option.method,
        to_json(option.candidate.config),
        _why(layer, option, fastest),
        option.time_us,
        dense_us,
        option.cost.seconds(tuning.device, layer.precision) * 1e6,
        option.cost.flops,
        option.cost.moved,
        option.pack_seconds,
        option.build_seconds,
        option.packed_bytes,
        (*lost, *tuning.refused[name]),
        option.candidate.build_seconds,
    )


def _why(layer: Layer, option: Option, fastest: Mapping[str, float]) -> str:
    zeros = "no zeros" if layer.weights.density == 1 else f"{1 - layer.weights.density:.0%} zeros"
    others = [time_us for method, time_us in fastest.items() if method != option.method]
    if not others:
        return f"the only method that can ({zeros})"
    if option.time_us > min(fastest.values()):
        return f"not the fastest alone, but spares a copy between layouts ({zeros})"
    return f"fastest, {min(others) / option.time_us:.2f}x the next ({zeros})"


def validate(plan: Plan, program: Program, methods: Mapping[str, AnyMethod], kind: str) -> None:
    """Check that ``plan`` was made for ``program`` on this library.

    Args:
        kind: of device the model is on, "cpu" or "cuda".

    Raises:
        ValueError: another kind of device, other weights, other shapes, other precisions, a method that is gone; the
            message says what to do.
    """
    if plan.device.kind != kind:
        raise ValueError(
            f"this plan was made for {plan.device.kind} ({plan.device.name}), the model is on {kind}: move model and "
            f"example with .to({plan.device.kind!r}), or compile with replan=True to measure again"
        )
    found = weights_hash(program.tensors)
    if found != plan.weights_hash:
        raise ValueError(
            f"this plan was made for other weights (hash {plan.weights_hash}, the model has {found}): "
            "compile with replan=True to measure again"
        )
    shapes = tuple(program.graph.values[name].shape for name in program.graph.inputs)
    if shapes != plan.input_shapes:
        raise ValueError(
            f"this plan is for inputs of shape {plan.input_shapes}, the example has {shapes}: "
            "compile with replan=True to measure again"
        )
    if plan.precision != program.precisions:
        raise ValueError(
            f"this plan is for layers in {plan.precision}, the model has them in {program.precisions}: compile with "
            "the precision of the plan, or with replan=True to measure again"
        )
    covered = [name for step in plan.steps for name in step.nodes]
    layers = program.graph.names(CONV, LINEAR)
    if sorted(covered) != sorted(layers) and (len(set(covered)) < len(covered) or set(layers) - set(covered)):
        raise ValueError(
            "the steps of this plan do not hold every layer of the model exactly once: compile with replan=True to "
            "measure again"
        )
    missing = {step.method for step in plan.steps} - set(methods)
    if missing:
        raise ValueError(
            f"this plan uses methods that this zeroskip does not have: {sorted(missing)}; it has "
            f"{sorted(methods)}: compile with replan=True to measure again"
        )
