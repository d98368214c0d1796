"""The last word on a plan: the whole engine, a dense one and the torch model, run in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zeroskip.core.method import AnyMethod
from zeroskip.core.oracle import TOLERANCE
from zeroskip.core.precision import searching
from zeroskip.measure.bound import Bound
from zeroskip.model.bake import bake
from zeroskip.plan.plan import Confirmation, Plan
from zeroskip.run.engine import Variant, executor
from zeroskip.run.timing import compare

Settings = Callable[[], AbstractContextManager[None]]

CONFIRM_SECONDS = 3.0
FEWEST_ROUNDS, MOST_ROUNDS = 5, 31


def confirm(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    best: Variant,
    dense: Variant,
    methods: Mapping[str, AnyMethod],
    known: dict[str, Bound],
    settings: Settings = nullcontext,
    obstacle: str | None = None,
) -> tuple[Plan, list[str]]:
    """The plan of the fastest engine, with the times of all: the dense one takes over where it is faster.

    Args:
        known: see ``executor``.
        settings: those of torch that the model runs with.
        obstacle: why calls cannot be captured in a graph, on a GPU where they cannot.

    Returns:
        The plan, and what the user must be warned of.
    """
    device, warned, differences = best.plan.device, list[str](), dict[str, float]()
    with searching():
        torch_calls, reference = _torch_models(model, inputs, settings)
        engines = {"best": best} | ({"dense": dense} if dense.plan.steps != best.plan.steps else {})
        calls: dict[str, Callable[[], object]] = dict(torch_calls)
        for name, variant in engines.items():
            run = executor(variant, methods, known)
            calls[name] = call = run.on(run.staged(inputs) if device.kind == "cuda" else inputs)
            differences[name] = distance(call(), reference)
        rounds = MOST_ROUNDS if device.kind == "cuda" else _rounds(calls)
        measured = compare(calls, rounds, device, captured=obstacle is None)
    medians = {name: times.median_us for name, times in measured.times.items()}
    winner = min(engines, key=lambda name: medians[name])
    if differences[winner] > tolerance(engines[winner]):
        apart = f"{differences[winner]:.2g} of the largest output"
        warned.append(f"the engine's outputs differ from torch's by {apart}")
    notes = [*warned, *([f"runs without a CUDA graph: {obstacle}"] if obstacle else [])]
    if winner != "best" and any(methods[step.method].exploits != "nothing" for step in best.plan.steps):
        notes.append(f"a dense plan won: the plan with sparse methods took {medians['best'] / 1e3:.3f} ms as a whole")
    confirmation = Confirmation(
        engine_us=medians[winner],
        dense_engine_us=medians.get("dense", medians["best"]),
        torch_us=min(medians[name] for name in torch_calls),
        rounds=rounds,
        contended=measured.contended,
    )
    return replace(engines[winner].plan, confirmation=confirmation, notes=tuple(notes)), warned


def _rounds(calls: Mapping[str, Callable[[], object]]) -> int:
    """How many fit the time."""
    started = time.perf_counter()
    for call in calls.values():
        call()
    return min(MOST_ROUNDS, max(FEWEST_ROUNDS, math.ceil(CONFIRM_SECONDS / max(time.perf_counter() - started, 1e-4))))


def _torch_models(
    model: nn.Module, inputs: tuple[Tensor, ...], settings: Settings
) -> tuple[dict[str, Callable[[], object]], Any]:
    """The model as torch runs it, contiguous and channels_last, and its outputs."""
    plain = bake(model)
    last = bake(model)
    last_inputs = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]

    def run(module: nn.Module, arguments: Sequence[Tensor]) -> object:
        with torch.no_grad(), settings():
            return module(*arguments)

    calls = {"torch": lambda: run(plain, inputs)}
    try:
        last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        run(last, last_inputs)
    except RuntimeError:
        pass  # weights of five dimensions have no such format, and some models call view on what is not contiguous then
    else:
        calls["torch channels_last"] = lambda: run(last, last_inputs)
    return calls, run(plain, inputs)


def tolerance(variant: Variant) -> float:
    """The distance from torch's outputs that the precisions of the layers explain."""
    program = variant.program
    found = {program.precision(node) for node in program.graph.nodes if node.conv is not None}
    return max((TOLERANCE[precision] for precision in found), default=TOLERANCE["fp32"])


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
