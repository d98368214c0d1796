"""Find the fastest way to run one segment by running them all."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroskip.core.cost import Cost
from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported, ZeroskipError
from zeroskip.core.graph import Segment
from zeroskip.core.method import AnyMethod, Candidate
from zeroskip.measure.bound import Bound, Case, Oracle, Prepared, Stage, bind, check, packed_bytes, prepare
from zeroskip.measure.timer import Timer, once
from zeroskip.plan.plan import Rejection

MOST_CANDIDATES = {"cpu": 8, "cuda": 24}
"""Of one method: the likeliest ones by its own estimate.  A run takes microseconds on a GPU, and its kernels compile
side by side."""
DEAR, HOPELESS = 2.0, 1.5
"""What takes longer than so many seconds to build is built only if its estimate is not so many times what the others
took."""
FINALISTS = 3
"""Of one method, after one quick run of each candidate: they go into the interleaved measurement."""
FINAL_SECONDS = 0.6
FEWEST_ROUNDS, MOST_ROUNDS = 5, 25


@dataclass(frozen=True)
class Option:
    """A candidate that computed the right values, and its median time."""

    method: str
    candidate: Candidate[Any]
    segment: Segment
    time_us: float
    pack_seconds: float
    build_seconds: float
    packed_bytes: int
    cost: Cost


@dataclass(frozen=True)
class Tuned:
    """Every way to run a segment, fastest first, and the methods that cannot with their reasons."""

    options: tuple[Option, ...]
    rejected: tuple[Rejection, ...]
    contended: bool

    def of(self, methods: Mapping[str, AnyMethod]) -> Tuned:
        """The part that concerns ``methods``."""
        return Tuned(
            tuple(option for option in self.options if option.method in methods),
            tuple(item for item in self.rejected if item.method in methods),
            self.contended,
        )


_known: ContextVar[dict[tuple[object, ...], tuple[frozenset[str], Tuned]] | None] = ContextVar("tuned", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Within, a layer like one that was tuned before, with these methods or more, is not tuned again.

    For engines that are compared with each other: the dense one then runs what the sparse one chose from.
    """
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def tune(
    segment: Segment,
    methods: Mapping[str, AnyMethod],
    parameters: Mapping[str, Tensor],
    device: Device,
    timer: Timer,
    candidates: Mapping[str, Sequence[Candidate[Any]]] | None = None,
) -> Tuned:
    """Check and time the candidates of every method in ``methods`` for a segment of one layer.

    A candidate that fails to compile or is wrong is never an option; it is a rejection that says so.

    Args:
        candidates: by method, what to try instead of the method's own choice.
    """
    known = None if candidates is not None else _known.get()
    key = (tuple(layer.key for layer in segment.layers), device.kind, device.name, device.threads)
    if known is not None and key in known:
        names, found = known[key]
        if names >= set(methods):
            return found.of(methods)
    tuned = _tune(segment, methods, parameters, device, timer, candidates or {})
    if known is not None:
        known[key] = (frozenset(methods), tuned)
    return tuned


def _tune(
    segment: Segment,
    methods: Mapping[str, AnyMethod],
    parameters: Mapping[str, Tensor],
    device: Device,
    timer: Timer,
    candidates: Mapping[str, Sequence[Candidate[Any]]],
) -> Tuned:
    case = Case.random(segment, device=device.torch)
    oracle = Oracle(segment, parameters, case)
    stages: dict[str, Stage] = {}
    rejected: list[Rejection] = []
    chosen: dict[str, list[Candidate[Any]]] = {}
    quick: dict[str, list[tuple[float, Stage]]] = {name: [] for name in methods}
    problems: dict[str, str] = {}
    for name, method in methods.items():
        try:
            proposed = candidates.get(name) or method.configs(segment, device)
        except Unsupported as reason:
            proposed, problems[name] = [], str(reason)
        chosen[name] = list(proposed)[: MOST_CANDIDATES[device.kind]]

    def run(some: Mapping[str, Sequence[Candidate[Any]]]) -> None:
        """Check and time each once."""
        prepared = _prepared(segment, methods, parameters, device, some)
        for name, found in some.items():
            method = methods[name]
            for candidate, ready in zip(found, prepared[name], strict=True):
                try:
                    stage = Stage(bind(method, segment, parameters, candidate, device, ready()), case)
                    verdict = check(stage, oracle)
                    # A dense library defines what the model computes, however often it rounds in half precision.
                    if not verdict.right and method.exploits != "nothing":
                        problems[name] = (
                            f"WRONG: an element is {verdict.worst:.3g} times its error bound away with "
                            f"{candidate.config}"
                        )
                        continue
                    quick[name].append((once(stage, device), stage))
                except (ZeroskipError, RuntimeError) as error:
                    problems[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    with torch.no_grad():
        run({name: [one for one in found if one.build_seconds <= DEAR] for name, found in chosen.items()})
        best = min((seconds for found in quick.values() for seconds, _ in found), default=math.inf)
        dear = {name: [one for one in found if one.build_seconds > DEAR] for name, found in chosen.items()}
        for name, found in dear.items():
            if found and (soonest := min(found, key=lambda one: one.run_seconds)).run_seconds > HOPELESS * best:
                problems.setdefault(
                    name,
                    f"not tried: {soonest.build_seconds:.0f} s to build for an estimated "
                    f"{soonest.run_seconds * 1e6:.1f} us, the fastest took {best * 1e6:.1f} us",
                )
        run({name: [one for one in found if one.run_seconds <= HOPELESS * best] for name, found in dear.items()})
        for name in methods:
            if not quick[name]:
                rejected.append(Rejection(name, problems.get(name) or "has no configuration for this layer"))
            fastest = sorted(quick[name], key=lambda pair: pair[0])[:FINALISTS]
            stages |= {f"{name}/{index}": stage for index, (_, stage) in enumerate(fastest)}
        if not stages:
            return Tuned((), tuple(rejected), False)
        started = time.perf_counter()
        for stage in stages.values():
            stage()
        each_round = time.perf_counter() - started
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, math.ceil(FINAL_SECONDS / max(each_round, 1e-4))))
        measured = timer(stages, rounds, device)
    options = [_option(stages[key].bound, times.median_us) for key, times in measured.times.items()]
    return Tuned(tuple(sorted(options, key=lambda option: option.time_us)), tuple(rejected), measured.contended)


def _prepared(
    segment: Segment,
    methods: Mapping[str, AnyMethod],
    parameters: Mapping[str, Tensor],
    device: Device,
    chosen: Mapping[str, Sequence[Candidate[Any]]],
) -> dict[str, list[Callable[[], Prepared]]]:
    """What packs and builds each candidate, or raises why that cannot be done.

    For a GPU all of it is done here, side by side, since NVRTC takes about a second for each, and nothing is left that
    could hold up the launches which are timed later.  On the CPU it is done when asked for, one after the other.
    """
    on_cpu = {name: tensor.detach().cpu() for name, tensor in parameters.items()}
    jobs = {
        name: [
            functools.partial(prepare, methods[name], segment, on_cpu, candidate, device) for candidate in candidates
        ]
        for name, candidates in chosen.items()
    }
    if device.kind == "cpu":
        return {name: [*calls] for name, calls in jobs.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {name: [pool.submit(call).result for call in calls] for name, calls in jobs.items()}


def _option(bound: Bound, time_us: float) -> Option:
    return Option(
        bound.method.name,
        bound.candidate,
        bound.segment,
        time_us,
        bound.pack_seconds,
        bound.build_seconds,
        packed_bytes(bound.packed),
        bound.method.cost(bound.segment),
    )
