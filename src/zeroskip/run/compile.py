"""``zeroskip.compile``: trace, simplify, tune, choose, confirm."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zeroskip.core.method import AnyMethod
from zeroskip.measure.bound import Bound
from zeroskip.measure.peaks import this_device
from zeroskip.measure.timer import measure
from zeroskip.methods import registry
from zeroskip.model.bake import bake
from zeroskip.model.passes import simplify
from zeroskip.plan.plan import Confirmation, Plan
from zeroskip.plan.planner import Progress, best_plan, dense_plans, silent, tune_program, validate
from zeroskip.run.engine import Engine, Variant, executor
from zeroskip.run.refine import refine

CONFIRM_SECONDS = 3.0
FEWEST_ROUNDS, MOST_ROUNDS = 5, 31
SAME = 1e-4
"""Largest distance of the engine's outputs from torch's, over the largest output, before a warning."""

Example = Tensor | tuple[Tensor, ...]


def compile(
    model: nn.Module,
    example: Example | list[Example],
    *,
    threads: int | None = None,
    methods: Sequence[str] | None = None,
    plan: Plan | Sequence[Plan] | None = None,
    replan: bool = False,
    progress: Progress = silent,
) -> Engine:
    """Make an engine that runs ``model`` with the fastest method per layer, found by measuring on this machine.

    Works on a copy in evaluation mode.  Pruning masks and parametrizations are baked into the weights, batch norm
    is folded, activations and residual sums are fused; whatever is no convolution or linear layer runs in torch.

    Args:
        example: a tensor, or a tuple of tensors for a model of several inputs; a list of examples makes an engine for
            several shapes.  float32 on the CPU (other dtypes run dense).
        threads: how many threads the methods use, ``torch.get_num_threads()`` by default.  Operators that stay in
            torch follow ``torch.set_num_threads`` at the time of the call.
        methods: names of the methods to consider (``dense`` always is); all by default.
        plan: plans of an earlier engine (one per example) to use instead of measuring.
        replan: measure again where ``plan`` does not fit this model.
        progress: called as ``progress(done, total, what)``.

    Returns:
        An engine; ``engine.plan`` says what was chosen and why.

    Raises:
        Unsupported: ``torch.export`` refuses the model.
        ValueError: an example that is not tensors on the CPU, an unknown method, a plan for another model.
    """
    examples = [_tensors(one) for one in (example if isinstance(example, list) else [example])]
    if not examples:
        raise ValueError("example is an empty list; give at least one input tensor")
    threads = threads or torch.get_num_threads()
    chosen = _methods(methods)
    plans = [None] * len(examples) if plan is None else [plan] if isinstance(plan, Plan) else list(plan)
    if len(plans) != len(examples):
        raise ValueError(f"got {len(plans)} plans for {len(examples)} examples; give one per example")
    variants = [
        _variant(model, inputs, given, replan, threads, chosen, progress)
        for inputs, given in zip(examples, plans, strict=True)
    ]
    return Engine(variants, registry())


def _tensors(example: Any) -> tuple[Tensor, ...]:
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, tuple) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(f"an example is a tensor or a tuple of tensors, got {type(example).__name__}")
    for x in inputs:
        if x.device.type != "cpu":
            raise ValueError(f"this version runs on the cpu, the example is on {x.device}: use example.cpu()")
    return inputs


def _methods(names: Sequence[str] | None) -> dict[str, AnyMethod]:
    known = registry()
    if names is None:
        return dict(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"no method is called {unknown}; there are {sorted(known)}")
    return {name: method for name, method in known.items() if name in names or method.exploits == "nothing"}


def _variant(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    given: Plan | None,
    replan: bool,
    threads: int,
    methods: Mapping[str, AnyMethod],
    progress: Progress,
) -> Variant:
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices - {"cpu"}:
        raise ValueError(f"this version runs on the cpu, the model is on {sorted(devices)}: use model.cpu()")
    from zeroskip.model.trace import trace  # torch.export costs a second to import, which load() need not pay

    program = simplify(trace(model, inputs))
    if given is not None:
        try:
            validate(given, program, methods)
            return Variant(program, given)
        except ValueError:
            if not replan:
                raise
    started = time.perf_counter()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tuning = tune_program(program, methods, this_device(threads), progress)
        known: dict[str, Bound] = {}
        best = refine(tuning, best_plan(tuning), inputs, methods, known, progress)
        dense = [Variant(program, other) for other in dense_plans(tuning, methods)]
        plan = _confirm(model, inputs, Variant(program, best), dense, methods, known, threads)
    finally:
        torch.set_num_threads(before)
    return Variant(program, replace(plan, tune_seconds=time.perf_counter() - started))


def _confirm(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    best: Variant,
    dense: list[Variant],
    methods: Mapping[str, AnyMethod],
    known: dict[str, Bound],
    threads: int,
) -> Plan:
    """Run the whole engine and the whole torch model in turns; a dense plan takes over where it is faster."""
    torch_calls, reference = _torch_models(model, inputs)
    engines = {"best": best} | {f"dense {index}": variant for index, variant in enumerate(dense)}
    calls: dict[str, Callable[[], object]] = dict(torch_calls)
    notes: list[str] = []
    for name, variant in engines.items():
        run = executor(variant, methods, known)
        if name == "best" and (difference := distance(run(inputs), reference)) > SAME:
            notes.append(f"the engine's outputs differ from torch's by {difference:.2g} of the largest output")
            warnings.warn(notes[-1], stacklevel=4)
        calls[name] = lambda run=run: run(inputs)  # type: ignore[misc]
    started = time.perf_counter()
    for call in calls.values():
        call()
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, math.ceil(CONFIRM_SECONDS / max(time.perf_counter() - started, 1e-4))))
    measured = measure(calls, rounds, threads)
    medians = {name: times.median_us for name, times in measured.times.items()}
    winner = min(engines, key=lambda name: medians[name])
    if winner != "best" and any(methods[step.method].exploits != "nothing" for step in best.plan.steps):
        notes.append(f"a dense plan won: the plan with sparse methods took {medians['best'] / 1e3:.2f} ms as a whole")
    confirmation = Confirmation(
        engine_us=medians[winner],
        dense_engine_us=min(medians[name] for name in engines if name.startswith("dense")),
        torch_us=min(medians[name] for name in torch_calls),
        rounds=rounds,
        contended=measured.contended,
    )
    return replace(engines[winner].plan, confirmation=confirmation, notes=tuple(notes))


def _torch_models(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[dict[str, Callable[[], object]], Any]:
    """The model as torch runs it, contiguous and channels_last, and its outputs."""
    plain = bake(model)
    last = bake(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last_inputs = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]

    def run(module: nn.Module, arguments: Sequence[Tensor]) -> object:
        with torch.no_grad():
            return module(*arguments)

    calls = {"torch": lambda: run(plain, inputs)}
    try:
        run(last, last_inputs)
    except RuntimeError:
        pass  # some models call view on tensors that are not contiguous then
    else:
        calls["torch channels_last"] = lambda: run(last, last_inputs)
    return calls, run(plain, inputs)


def distance(ours: Any, theirs: Any) -> float:
    """Largest absolute difference over the largest absolute value, over all tensors of two nests; NaN equals NaN."""
    worst, largest = 0.0, 0.0
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
        if isinstance(b, Tensor) and b.numel():
            difference = (a.double() - b.double()).abs()
            difference = difference[~(a.isnan() & b.isnan())]
            worst = max(worst, float(difference.nan_to_num(nan=math.inf).max()) if difference.numel() else 0.0)
            finite = b.double().abs().nan_to_num(0.0, 0.0, 0.0)
            largest = max(largest, float(finite.max()))
    return worst / largest if largest else worst
