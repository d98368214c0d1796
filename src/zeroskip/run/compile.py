"""``zeroskip.compile``: trace, simplify, tune, choose, confirm."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zeroskip.core.graph import CONV, LINEAR
from zeroskip.core.method import AnyMethod
from zeroskip.core.precision import held, of_torch
from zeroskip.cpu.threads import torch_threads
from zeroskip.measure.bound import Bound
from zeroskip.measure.peaks import this_cpu, this_gpu
from zeroskip.measure.turns import turn
from zeroskip.methods import registry
from zeroskip.model.passes import simplify
from zeroskip.model.program import Program
from zeroskip.plan.plan import Plan
from zeroskip.plan.planner import (
    Progress,
    Tuning,
    best_plan,
    dense_plans,
    silent,
    skipping_nothing,
    tune_program,
    validate,
)
from zeroskip.run.confirm import Settings, confirm, distance
from zeroskip.run.engine import Engine, Variant, check_labels, executor
from zeroskip.run.graphs import captured, in_capture_thread
from zeroskip.run.refine import refine

__all__ = ["compile", "distance"]

Example = Tensor | tuple[Tensor, ...]
FloatPrecision = Literal["fp32", "tf32"]


@dataclass(frozen=True)
class _Wishes:
    """What the caller of ``compile`` decided: ``precision`` as given, ``tf32`` the operators that may use it."""

    device: torch.device
    methods: Mapping[str, AnyMethod]
    threads: int
    precision: FloatPrecision | None
    tf32: frozenset[str]
    skip_zeros: bool
    replan: bool
    labels: Sequence[str] | None
    progress: Progress


def compile(
    model: nn.Module,
    example: Example | list[Example],
    *,
    precision: FloatPrecision | None = None,
    threads: int | None = None,
    methods: Sequence[str] | None = None,
    skip_zeros: bool = True,
    plan: Plan | Sequence[Plan] | None = None,
    replan: bool = False,
    labels: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Engine:
    """Make an engine that runs ``model`` with the fastest method per layer, found by measuring on this machine.

    Works on a copy in evaluation mode.  Pruning masks and parametrizations are baked into the weights, batch norm
    is folded, activations and residual sums are fused; whatever is no convolution or linear layer runs in torch.

    Args:
        example: a tensor, or a tuple of tensors for a model of several inputs; a list of examples makes an engine for
            several shapes.  Device and dtype are theirs: the CPU (float32; other dtypes run dense) or the current
            NVIDIA GPU (float32, float16, bfloat16), with the model on the same.
        precision: of float32 on a GPU: "fp32" is strict, "tf32" lets libraries round operands to TF32; by default each
            kind of layer has what torch's settings say now.  The engine keeps it, whatever they say later.
        threads: how many threads the methods use on a CPU, ``torch.get_num_threads()`` by default.  Operators that stay
            in torch follow ``torch.set_num_threads`` at the time of the call.
        methods: names of the methods to consider (``dense`` always is); by default all whose results are reproducible.
        skip_zeros: False keeps every layer that has zeros on a dense library: what fusion and graphs gain alone.
        plan: plans of an earlier engine (one per example) to use instead of measuring.
        replan: measure again where ``plan`` does not fit this model, or was made on another GPU.
        labels: the names of the classes, for a model whose output is [n, classes]; ``zeroskip run`` shows them, and a
            saved engine keeps them.
        progress: called as ``progress(done, total, what)``.

    Returns:
        An engine; ``engine.plan`` says what was chosen and why.

    Raises:
        Unsupported: ``torch.export`` refuses the model.
        ValueError: an example that is not tensors, or not where the model is; a precision that the dtype or the device
            does not have; an unknown method; a plan for another model; labels that are not one
            string for each class.
    """
    examples = [_tensors(one) for one in (example if isinstance(example, list) else [example])]
    if not examples:
        raise ValueError("example is an empty list; give at least one input tensor")
    device = _device(model, [x for inputs in examples for x in inputs])
    if device.type == "cuda" and threads is not None:
        raise ValueError(f"threads are a choice for the CPU, the example is on {device}: leave threads out")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}; leave it out for torch.get_num_threads()")
    tf32 = _tf32(precision, device, [x for inputs in examples for x in inputs])
    wishes = _Wishes(
        device,
        _methods(methods),
        torch.get_num_threads() if threads is None else threads,
        precision,
        tf32,
        skip_zeros,
        replan,
        labels,
        progress,
    )
    plans = [None] * len(examples) if plan is None else [plan] if isinstance(plan, Plan) else list(plan)
    if len(plans) != len(examples):
        raise ValueError(f"got {len(plans)} plans for {len(examples)} examples; give one per example")
    variants = []
    for inputs, given in zip(examples, plans, strict=True):
        variant, warned = _variant(model, inputs, given, wishes)
        variants.append(variant)
        for warning in warned:
            warnings.warn(warning, stacklevel=2)
    return Engine(variants, registry(), labels)


def _tensors(example: Any) -> tuple[Tensor, ...]:
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, tuple) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(f"an example is a tensor or a tuple of tensors, got {type(example).__name__}")
    return inputs


def _device(model: nn.Module, inputs: list[Tensor]) -> torch.device:
    """Where example and model are."""
    device = inputs[0].device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"engines run on a CPU or an NVIDIA GPU, the example is on {device}: use example.cpu()")
    if device.type == "cuda" and not all(x.numel() for x in inputs):
        raise ValueError("an example is empty: on a GPU an engine is chosen by running it, so give at least one image")
    if any(x.device != device for x in inputs):
        raise ValueError(f"the examples are on {sorted({str(x.device) for x in inputs})}: move them to one device")
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(
            f"the example is on {device}, the current GPU is cuda:{torch.cuda.current_device()}: call "
            f"torch.cuda.set_device({device.index}) first"
        )
    places = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if places and places != [str(device)]:
        raise ValueError(f"the model is on {places}, the example on {device}: use model.to({str(device)!r})")
    return device


def _tf32(precision: str | None, device: torch.device, inputs: list[Tensor]) -> frozenset[str]:
    """The operators whose float32 layers may use TF32."""
    if precision not in (None, "fp32", "tf32"):
        raise ValueError(
            f"precision is 'fp32' or 'tf32', or None for torch's settings, got {precision!r}: half precision comes "
            "from the dtype of model and example, as in model.half() and example.half()"
        )
    others = sorted({str(x.dtype) for x in inputs if x.is_floating_point() and x.dtype != torch.float32})
    if precision is not None and others:
        raise ValueError(f"precision={precision!r} is about float32, the example is {others}: leave precision out")
    if device.type == "cpu":
        if precision == "tf32":
            raise ValueError("TF32 is a precision of NVIDIA GPUs, the example is on the cpu: leave precision out")
        return frozenset()
    if precision is not None:
        return frozenset((CONV, LINEAR) if precision == "tf32" else ())
    return frozenset([CONV] * (of_torch("conv2d") == "tf32") + [LINEAR] * (of_torch("linear") == "tf32"))


def _methods(names: Sequence[str] | None) -> dict[str, AnyMethod]:
    known = registry()
    if isinstance(names, str):
        raise ValueError(f"methods are a list of names, got the string {names!r}: put it in brackets")
    if names is None:
        return {name: method for name, method in known.items() if method.reproducible}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"no method is called {unknown}; there are {sorted(known)}")
    return {name: method for name, method in known.items() if name in names or method.exploits == "nothing"}


def _variant(
    model: nn.Module, inputs: tuple[Tensor, ...], given: Plan | None, wishes: _Wishes
) -> tuple[Variant, list[str]]:
    """``given`` or a plan that is measured now, and warnings."""
    from zeroskip.model.trace import trace  # torch.export costs a second to import, which load() need not pay

    on_gpu = wishes.device.type == "cuda"
    program = simplify(trace(model, inputs)).with_tf32(wishes.tf32)
    check_labels(wishes.labels, program.graph)
    if given is not None:
        try:
            validate(given, program, wishes.methods, wishes.device.type)
            if not (wishes.replan and on_gpu and given.device.name != torch.cuda.get_device_name()):
                return Variant(program, given), []
        except ValueError:
            if not wishes.replan:
                raise
    started = time.perf_counter()
    if on_gpu:
        plan, warned = _in_capture_thread(model, inputs, program, wishes)
    else:
        with torch_threads(wishes.threads):
            plan, warned = _choose(model, inputs, program, wishes)
    return Variant(program, replace(plan, tune_seconds=time.perf_counter() - started)), warned


def _choose(model: nn.Module, inputs: tuple[Tensor, ...], program: Program, wishes: _Wishes) -> tuple[Plan, list[str]]:
    """The plan whose whole engine is fastest, and warnings."""
    device = this_gpu() if wishes.device.type == "cuda" else this_cpu(wishes.threads)
    tuning = tune_program(program, wishes.methods, device, wishes.progress)
    with turn(device):
        return _chosen(model, inputs, wishes, tuning)


def _chosen(model: nn.Module, inputs: tuple[Tensor, ...], wishes: _Wishes, tuning: Tuning) -> tuple[Plan, list[str]]:
    """Of what ``tuning`` measured."""
    program, on_gpu = tuning.program, tuning.device.kind == "cuda"
    methods, known = wishes.methods, dict[str, Bound]()
    without = skipping_nothing(tuning, methods)
    if not wishes.skip_zeros:
        tuning = without
    best, obstacle, dense = best_plan(tuning), None, dense_plans(tuning, methods)
    if on_gpu:
        run = executor(Variant(program, best), methods, known)
        found = captured(run, program, inputs)
        obstacle = found if isinstance(found, str) else None
        del run, found

    def refined(plans: list[Plan], among: Tuning) -> Plan:
        return refine(tuning, plans, among.options, inputs, methods, known, wishes.progress, obstacle is None)

    # What zeros gain is told from a dense engine that was given the same care.
    skips_nothing = any(best.steps == plan.steps for plan in dense)
    rival = refined(dense, without)
    best = refined([rival] if skips_nothing else [best, rival], tuning) if wishes.skip_zeros else rival
    settings: Settings = partial(held, wishes.precision) if on_gpu and wishes.precision else nullcontext
    return confirm(model, inputs, Variant(program, best), Variant(program, rival), methods, known, settings, obstacle)


def _in_capture_thread(
    model: nn.Module, inputs: tuple[Tensor, ...], program: Program, wishes: _Wishes
) -> tuple[Plan, list[str]]:
    """``_choose`` in the thread that captures; it ends soon after Ctrl-C."""
    stopped = False

    def progress(done: int, total: int, what: str) -> None:
        if stopped:
            raise KeyboardInterrupt
        wishes.progress(done, total, what)

    try:
        return in_capture_thread(lambda: _choose(model, inputs, program, replace(wishes, progress=progress)))
    except KeyboardInterrupt:
        stopped = True
        raise
