"""Find the fastest way to run one segment by running them all."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zeroskip.core.cost import Cost
from zeroskip.core.device import Device
from zeroskip.core.errors import ZeroskipError
from zeroskip.core.graph import Segment
from zeroskip.core.method import AnyMethod, Candidate
from zeroskip.measure.bound import Bound, Case, Oracle, Stage, bind, check, packed_bytes
from zeroskip.measure.timer import Timer, once
from zeroskip.plan.plan import Rejection

MOST_CANDIDATES = 8
"""Of one method: the likeliest ones by its own estimate."""
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


def tune(
    segment: Segment, methods: Mapping[str, AnyMethod], parameters: Mapping[str, Tensor], device: Device, timer: Timer
) -> Tuned:
    """Check and time the candidates of every method in ``methods`` for a segment of one layer.

    A candidate that fails to compile or is wrong is never an option; it is a rejection that says so.
    """
    case = Case.random(segment)
    oracle = Oracle(segment, parameters, case)
    stages: dict[str, Stage] = {}
    rejected: list[Rejection] = []
    with torch.no_grad():
        for name, method in methods.items():
            quick: list[tuple[float, Stage]] = []
            problem = ""
            for candidate in method.configs(segment, device)[:MOST_CANDIDATES]:
                try:
                    stage = Stage(bind(method, segment, parameters, candidate, device), case)
                    verdict = check(stage, oracle)
                except (ZeroskipError, RuntimeError) as error:
                    problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                    continue
                # A dense library defines what the model computes, however often it rounds in half precision.
                if not verdict.right and method.exploits != "nothing":
                    problem = (
                        f"WRONG: an element is {verdict.worst:.3g} times its error bound away with {candidate.config}"
                    )
                    continue
                quick.append((once(stage, device.threads), stage))
            if not quick:
                rejected.append(Rejection(name, problem or "has no configuration for this layer"))
                continue
            quick.sort(key=lambda pair: pair[0])
            stages |= {f"{name}/{index}": stage for index, (_, stage) in enumerate(quick[:FINALISTS])}
        started = time.perf_counter()
        for stage in stages.values():
            stage()
        each_round = time.perf_counter() - started
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, math.ceil(FINAL_SECONDS / max(each_round, 1e-4))))
        measured = timer(stages, rounds, device.threads)
    options = [_option(stages[key].bound, times.median_us) for key, times in measured.times.items()]
    return Tuned(tuple(sorted(options, key=lambda option: option.time_us)), tuple(rejected), measured.contended)


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
