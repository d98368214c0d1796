"""Find the fastest way to run one segment by running them all."""

from __future__ import annotations

import functools
import itertools
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
from zeroskip.measure.turns import pause, turn
from zeroskip.plan.plan import Rejection

MOST_CANDIDATES = {"cpu": 8, "cuda": 24}
"""Of one method: the likeliest ones by its own estimate.  A run takes microseconds on a GPU, and its kernels compile
side by side."""
EACH_ATTEMPT, ATTEMPT_SECONDS = 6, 20.0
"""Of one method: how many are tried, and how long they may take to build on one core (but for the first of them),
before its next ones are compared with what was measured so far."""
DEAR = 2.0
"""What takes longer than so many seconds to build waits until what does not was measured."""
LUCK, MORE_LUCK = 0.65, 0.87
"""What a time may be over its estimate at the luckiest: of a method of which none was measured (the least of 59 layers
was 0.59, records fig10 and fig11, H100), and over the least that was."""
GAIN = 0.98
"""An attempt that does not bring a method's time below this share of what it was is its last."""
FINALISTS, NEAR = 3, 1.5
"""Of one method, after one quick run of each candidate, go into the interleaved measurement: so many, but only one that
took more than so many times what the quickest of all took."""
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
    with torch.no_grad(), turn(device):
        search = _Search(segment, methods, parameters, device)
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
        measured = timer(stages, rounds, device)
    options = [_option(stages[key].bound, times.median_us) for key, times in measured.times.items()]
    return Tuned(tuple(sorted(options, key=lambda option: option.time_us)), rejected, measured.contended)


class _Search:
    """Checks candidates and times each once, as long as their estimates give hope."""

    def __init__(
        self, segment: Segment, methods: Mapping[str, AnyMethod], parameters: Mapping[str, Tensor], device: Device
    ) -> None:
        self.segment, self.methods, self.parameters, self.device = segment, methods, parameters, device
        self.case = Case.random(segment, device=device.torch)
        self.oracle = Oracle(segment, parameters, self.case)
        self.quickest: dict[str, list[tuple[float, Stage]]] = {name: [] for name in methods}
        """By method, up to FINALISTS; the others' memory is free for what comes."""
        self.problems: dict[str, str] = {}
        self._luck: dict[str, float] = {}
        """By method, the least that a time was over its estimate."""
        self._over: set[str] = set()
        """Methods whose last attempt brought nothing."""

    @property
    def best(self) -> float:
        """Seconds of the quickest so far."""
        return min(self._bests().values(), default=math.inf)

    def _bests(self) -> dict[str, float]:
        return {name: found[0][0] for name, found in self.quickest.items() if found}

    def all(self, instead: Mapping[str, Sequence[Candidate[Any]]]) -> None:
        """What every method proposes, or has ``instead``, a few of each at a time."""
        with pause():
            left = {name: self._proposed(name, instead.get(name)) for name in self.methods}
        for attempt in itertools.count():
            chosen = {name: [one for one in found if self._hopeful(name, one, attempt)] for name, found in left.items()}
            chosen = {name: _first(found) for name, found in chosen.items()}
            if attempt and not any(chosen.values()):
                break
            before = self._bests()
            self._try(chosen)
            after = self._bests()
            self._over |= {name for name, best in before.items() if chosen[name] and after[name] > GAIN * best}
            left = {name: [one for one in found if one not in chosen[name]] for name, found in left.items()}
        for name, found in left.items():
            if found and not self.quickest[name]:
                soonest = min(found, key=lambda one: one.run_seconds)
                self.problems.setdefault(
                    name,
                    f"not tried: {soonest.build_seconds:.0f} s to build for an estimated "
                    f"{soonest.run_seconds * 1e6:.1f} us, the fastest took {self.best * 1e6:.1f} us",
                )

    def _proposed(self, name: str, instead: Sequence[Candidate[Any]] | None) -> list[Candidate[Any]]:
        try:
            proposed = instead or self.methods[name].configs(self.segment, self.device)
        except Unsupported as reason:
            self.problems[name] = str(reason)
            return []
        return list(proposed)[: MOST_CANDIDATES[self.device.kind]]

    def _hopeful(self, name: str, one: Candidate[Any], attempt: int) -> bool:
        """Whether ``one`` would be the quickest if its estimate were as far off as that of the luckiest, and more.

        What has no estimate is always tried.
        """
        if attempt == 0:
            return one.build_seconds <= DEAR
        if name in self._over and one.run_seconds:
            return False
        luck = MORE_LUCK * self._luck[name] if name in self._luck else LUCK
        return luck * one.run_seconds <= self.best

    def _try(self, some: Mapping[str, Sequence[Candidate[Any]]]) -> None:
        """Check each and time it once."""
        with pause():
            prepared = _prepared(self.segment, self.methods, self.parameters, self.device, some)
        for name, found in some.items():
            for candidate, ready in zip(found, prepared[name], strict=True):
                try:
                    self._one(name, candidate, ready)
                except (ZeroskipError, RuntimeError) as error:
                    self.problems[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    def _one(self, name: str, candidate: Candidate[Any], ready: Callable[[], Prepared]) -> None:
        method = self.methods[name]
        stage = Stage(bind(method, self.segment, self.parameters, candidate, self.device, ready()), self.case)
        verdict = check(stage, self.oracle)
        # A dense library defines what the model computes, however often it rounds in half precision.
        if not verdict.right and method.exploits != "nothing":
            self.problems[name] = (
                f"WRONG: an element is {verdict.worst:.3g} times its error bound away with {candidate.config}"
            )
            return
        seconds = once(stage, self.device)
        self.quickest[name] = sorted([*self.quickest[name], (seconds, stage)], key=lambda pair: pair[0])[:FINALISTS]
        if candidate.run_seconds:
            self._luck[name] = min(self._luck.get(name, math.inf), seconds / candidate.run_seconds)


def _first(found: Sequence[Candidate[Any]]) -> list[Candidate[Any]]:
    """What one attempt takes of them."""
    until = itertools.accumulate(one.build_seconds for one in found)
    return [
        one
        for index, (one, seconds) in enumerate(zip(found[:EACH_ATTEMPT], until, strict=False))
        if index == 0 or seconds <= ATTEMPT_SECONDS
    ]


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
    before, index = torch.get_num_threads(), device.torch.index
    with ThreadPoolExecutor(os.cpu_count(), initializer=_alone, initargs=(index,)) as pool:
        futures = {name: [pool.submit(call) for call in calls] for name, calls in jobs.items()}
    torch.set_num_threads(before)
    return {name: [future.result for future in found] for name, found in futures.items()}


def _alone(index: int) -> None:
    """For a thread that packs and builds: operators of its own are not divided among further threads."""
    torch.set_num_threads(1)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.set_device(index)


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
