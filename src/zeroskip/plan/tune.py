"""Find the fastest way to run one segment by running them all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroskip.core.cost import Cost
from zeroskip.core.graph import Segment
from zeroskip.core.method import AnyMethod, Candidate
from zeroskip.measure.bound import Bound, Case, Oracle, Prepared, Stage, bind, check, packed_bytes
from zeroskip.measure.others import Timing
from zeroskip.measure.turns import turn
from zeroskip.plan.plan import Rejection
from zeroskip.plan.search import Search, Wrong, layouts

FINALISTS, NEAR = 5, 1.5
"""Of one method, after one quick run of each candidate, so many go into the interleaved measurement, and the quickest
of every layout; of those that took more than so many times as long as the quickest of all methods, only the method's
quickest."""
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
    timing: Timing,
    candidates: Mapping[str, Sequence[Candidate[Any]]] | None = None,
) -> Tuned:
    """Check and time the candidates of every method in ``methods`` for a segment of one layer.

    A candidate that fails to compile or is wrong is never an option; it is a rejection that says so.

    Args:
        candidates: by method, what to try instead of the method's own choice.
    """
    device = timing.device
    known = None if candidates is not None else _known.get()
    key = (tuple(layer.key for layer in segment.layers), device.kind, device.name, device.threads)
    if known is not None and key in known:
        names, found = known[key]
        if names >= set(methods):
            return found.of(methods)
    tuned = _tune(segment, methods, parameters, timing, candidates or {})
    if known is not None:
        known[key] = (frozenset(methods), tuned)
    return tuned


def _tune(
    segment: Segment,
    methods: Mapping[str, AnyMethod],
    parameters: Mapping[str, Tensor],
    timing: Timing,
    candidates: Mapping[str, Sequence[Candidate[Any]]],
) -> Tuned:
    with torch.no_grad(), turn(timing.device):
        search = _Measured(segment, methods, parameters, timing)
        search.all(candidates)
        rejected = tuple(
            Rejection(name, search.problems.get(name) or "has no configuration for this layer")
            for name in methods
            if not search.quickest[name]
        )
        stages = {
            f"{name}/{index}": stage
            for name, found in search.quickest.items()
            for index, (seconds, stage) in enumerate(found)
            if index == 0 or seconds <= NEAR * search.best
        }
        if not stages:
            return Tuned((), rejected, False)
        started = time.perf_counter()
        for stage in stages.values():
            stage()
        each_round = time.perf_counter() - started
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, math.ceil(FINAL_SECONDS / max(each_round, 1e-4))))
        measured = timing.measure(stages, rounds)
    options = [_option(stages[key].bound, times.median_us) for key, times in measured.times.items()]
    return Tuned(tuple(sorted(options, key=lambda option: option.time_us)), rejected, measured.contended)


class _Measured(Search):
    """Checks candidates against float64 and times each once."""

    def __init__(
        self, segment: Segment, methods: Mapping[str, AnyMethod], parameters: Mapping[str, Tensor], timing: Timing
    ) -> None:
        super().__init__(segment, methods, parameters, timing.device)
        self.timing = timing
        self.case = Case.random(segment, device=timing.device.torch)
        self.oracle = Oracle(segment, parameters, self.case)
        self.quickest: dict[str, list[tuple[float, Stage]]] = {name: [] for name in methods}
        """By method, those that are ``_kept``; the others' memory is free for what comes."""

    def measure(self, name: str, candidate: Candidate[Any], ready: Callable[[], Prepared]) -> float:
        method = self.methods[name]
        stage = Stage(bind(method, self.segment, self.parameters, candidate, self.device, ready()), self.case)
        verdict = check(stage, self.oracle)
        # A dense library defines what the model computes, however often it rounds in half precision.
        if not verdict.right and method.exploits != "nothing":
            raise Wrong(f"WRONG: an element is {verdict.worst:.3g} times its error bound away with {candidate.config}")
        seconds = self.timing.once(stage)
        self.quickest[name] = _kept([*self.quickest[name], (seconds, stage)])
        return seconds


def _kept(found: Sequence[tuple[float, Stage]]) -> list[tuple[float, Stage]]:
    """The first FINALISTS, and of the others the quickest of each layout."""
    kept, seen = [], set[object]()
    for rank, (seconds, stage) in enumerate(sorted(found, key=lambda pair: pair[0])):
        kind = layouts(stage.bound.candidate)
        if rank < FINALISTS or kind not in seen:
            kept.append((seconds, stage))
        seen.add(kind)
    return kept


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
