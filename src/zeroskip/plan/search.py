"""Which candidates are tried: a few of each method at a time, as long as their estimates give hope."""

from __future__ import annotations

import functools
import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported, ZeroskipError
from zeroskip.core.graph import Segment
from zeroskip.core.method import AnyMethod, Candidate
from zeroskip.cpu.threads import torch_threads
from zeroskip.measure.bound import Prepared, prepare
from zeroskip.measure.turns import pause

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


class Wrong(ZeroskipError):
    """A candidate computed wrong values."""


class Search(ABC):
    """Asks methods for candidates of a segment, packs and builds them, and has them measured."""

    def __init__(
        self, segment: Segment, methods: Mapping[str, AnyMethod], parameters: Mapping[str, Tensor], device: Device
    ) -> None:
        self.segment, self.methods, self.parameters, self.device = segment, methods, parameters, device
        self.problems: dict[str, str] = {}
        """By method, what kept candidates from being measured; the last of each."""
        self.seconds: dict[str, float] = {}
        """By method, of its quickest candidate so far."""
        self._luck: dict[str, float] = {}
        """By method, the least that a time was over its estimate."""
        self._over: set[str] = set()
        """Methods whose last attempt brought nothing."""
        self._layouts: dict[str, set[object]] = {name: set() for name in methods}
        """By method, those of the candidates that were tried: another layout may spare a neighbour a copy."""

    @abstractmethod
    def measure(self, name: str, candidate: Candidate[Any], ready: Callable[[], Prepared]) -> float:
        """Seconds of one run of what ``ready`` returns.

        Raises:
            ZeroskipError, RuntimeError: it cannot be run; the message becomes the method's problem.
        """

    @property
    def best(self) -> float:
        """Seconds of the quickest so far."""
        return min(self.seconds.values(), default=math.inf)

    def all(self, instead: Mapping[str, Sequence[Candidate[Any]]]) -> None:
        """What every method proposes, or has ``instead``, a few of each at a time."""
        with pause():
            left = {name: self._proposed(name, instead.get(name)) for name in self.methods}
        for attempt in itertools.count():
            chosen = {name: [one for one in found if self._hopeful(name, one, attempt)] for name, found in left.items()}
            chosen = {name: _first(found) for name, found in chosen.items()}
            if attempt and not any(chosen.values()):
                break
            before = dict(self.seconds)
            self._try(chosen)
            self._over |= {name for name, best in before.items() if chosen[name] and self.seconds[name] > GAIN * best}
            left = {name: [one for one in found if one not in chosen[name]] for name, found in left.items()}
        for name, found in left.items():
            if found and name not in self.seconds:
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
        if name in self._over and one.run_seconds and layouts(one) in self._layouts[name]:
            return False
        luck = MORE_LUCK * self._luck[name] if name in self._luck else LUCK
        return luck * one.run_seconds <= self.best

    def _try(self, some: Mapping[str, Sequence[Candidate[Any]]]) -> None:
        """Have each measured once."""
        with pause():
            built = prepared(self.segment, self.methods, self.parameters, self.device, some)
        for name, found in some.items():
            self._layouts[name] |= {layouts(one) for one in found}
            for candidate, ready in zip(found, built[name], strict=True):
                try:
                    seconds = self.measure(name, candidate, ready)
                except Wrong as error:
                    self.problems[name] = str(error)
                except (ZeroskipError, RuntimeError) as error:
                    self.problems[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                else:
                    self.seconds[name] = min(self.seconds.get(name, math.inf), seconds)
                    if candidate.run_seconds:
                        self._luck[name] = min(self._luck.get(name, math.inf), seconds / candidate.run_seconds)


def layouts(candidate: Candidate[Any]) -> object:
    """How it wants its inputs and what it makes of its outputs, but for what vectors are aligned to."""
    return tuple(replace(one, aligned=1) for one in (*candidate.inputs, *candidate.outputs))


def _first(found: Sequence[Candidate[Any]]) -> list[Candidate[Any]]:
    """What one attempt takes of them."""
    until = itertools.accumulate(one.build_seconds for one in found)
    return [
        one
        for index, (one, seconds) in enumerate(zip(found[:EACH_ATTEMPT], until, strict=False))
        if index == 0 or seconds <= ATTEMPT_SECONDS
    ]


def prepared(
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
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    with (
        torch_threads(torch.get_num_threads()),  # what the pool's threads set would hold here too
        ThreadPoolExecutor(os.cpu_count(), initializer=_alone, initargs=(index,)) as pool,
    ):
        futures = {name: [pool.submit(call) for call in calls] for name, calls in jobs.items()}
    return {name: [future.result for future in found] for name, found in futures.items()}


def _alone(index: int | None) -> None:
    """For a thread that packs and builds: operators of its own are not divided among further threads."""
    torch.set_num_threads(1)
    if index is not None:
        torch.cuda.set_device(index)
