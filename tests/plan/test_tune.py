"""Which candidates are tried at all, with a clock that is told their times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from contract.cases import program_of
from plan.fakes import Fake, FakeConfig
from zeroskip.core.device import Device, cpu
from zeroskip.core.graph import Segment
from zeroskip.core.layout import Layout
from zeroskip.core.method import Candidate, layer_parameters
from zeroskip.core.record import Times
from zeroskip.measure import others
from zeroskip.measure.bound import Stage
from zeroskip.measure.others import Timing
from zeroskip.measure.timer import Measurement
from zeroskip.plan import search as module
from zeroskip.plan import tune

COUNT = 24
US = 1e-6


class Timed(Fake):
    """Candidates that are estimated and run as they are told, by number."""

    def __init__(self, estimate: Callable[[int], float], takes: Callable[[int], float]) -> None:
        super().__init__(configs=COUNT)
        self.estimate, self.takes = estimate, takes

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[FakeConfig]]:
        found = super().configs(segment, device)
        return [replace(one, run_seconds=US * self.estimate(one.config.number)) for one in found]


def tried(monkeypatch: pytest.MonkeyPatch, **methods: Timed) -> tuple[dict[str, list[int]], list[int]]:
    """By method, the numbers of the candidates that were run, and those that were timed against each other."""
    seen: dict[str, list[int]] = {name: [] for name in methods}
    finals: list[int] = []
    for name, method in methods.items():
        method.name = name

    def once(stage: Stage, device: Device) -> float:
        method: Any = stage.bound.method
        number = stage.bound.candidate.config.number
        seen[method.name].append(number)
        return US * float(method.takes(number))

    def timer(variants: Mapping[str, Any], rounds: int, device: Device) -> Measurement:
        finals.extend(stage.bound.candidate.config.number for stage in variants.values())
        return Measurement({key: Times((1.0,), "cpu") for key in variants}, False)

    monkeypatch.setattr(others, "once", once)
    monkeypatch.setattr(module, "MOST_CANDIDATES", {"cpu": COUNT})
    torch.manual_seed(0)
    program = program_of(nn.Sequential(nn.Conv2d(2, 3, 1)), torch.randn(1, 2, 4, 4))
    (segment,) = Fake().claim(program.graph, program.layers(), "0", cpu(1))
    parameters = layer_parameters(program.graph, segment, program.tensors)
    tune.tune(segment, methods, parameters, Timing(cpu(1), timer))
    return seen, finals


def test_an_attempt_that_brings_nothing_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _ = tried(monkeypatch, fake=Timed(lambda number: 1.0, lambda number: 5.0 if number else 4.0))
    assert seen["fake"] == list(range(2 * module.EACH_ATTEMPT))


def test_attempts_go_on_while_they_bring_something(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, finals = tried(monkeypatch, fake=Timed(lambda number: 1.0, lambda number: 9.0 - number / 4))
    assert seen["fake"] == list(range(COUNT))
    assert finals == [COUNT - 1 - rank for rank in range(tune.FINALISTS)]


def test_what_would_lose_even_with_more_luck_than_any_had_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate(number: int) -> float:
        return 1.0 if number < module.EACH_ATTEMPT else 1.1 if number == COUNT - 1 else 2.0

    exact, lucky = Timed(estimate, lambda number: 1.0), Timed(estimate, lambda number: 0.5 if number == 3 else 1.0)
    assert tried(monkeypatch, fake=exact)[0]["fake"] == [*range(module.EACH_ATTEMPT), COUNT - 1]
    assert tried(monkeypatch, fake=lucky)[0]["fake"] == [*range(module.EACH_ATTEMPT), COUNT - 1]
    unlucky = Timed(estimate, lambda number: 0.9 if number == 3 else 1.0)
    monkeypatch.setattr(module, "MORE_LUCK", 0.4)
    assert tried(monkeypatch, fake=unlucky)[0]["fake"] == list(range(2 * module.EACH_ATTEMPT))


def test_a_method_far_behind_another_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, finals = tried(
        monkeypatch,
        near=Timed(lambda number: 1.0, lambda number: 1.0 - number / 50),
        far=Timed(lambda number: 3.0, lambda number: 3.0 - number / 50),
    )
    assert seen["near"] == list(range(COUNT))
    assert seen["far"] == list(range(module.EACH_ATTEMPT))
    assert len(finals) == tune.FINALISTS + 1


def test_what_has_no_estimate_is_always_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _ = tried(
        monkeypatch,
        near=Timed(lambda number: 1.0, lambda number: 1.0),
        unknown=Timed(lambda number: 0.0, lambda number: 9.0),
    )
    assert seen["unknown"] == list(range(COUNT))


def test_an_attempt_takes_no_longer_to_build_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dear(Timed):
        def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[FakeConfig]]:
            seconds = 0.45 * module.ATTEMPT_SECONDS
            return [replace(one, build_seconds=seconds) for one in super().configs(segment, device)]

    near, dear = Timed(lambda number: 1.0, lambda number: 1.0), Dear(lambda number: 1.0, lambda number: 1.0)
    assert tried(monkeypatch, near=near, dear=dear)[0]["dear"] == [0, 1, 2, 3]


class Bordering(Timed):
    """The last candidates write into a border of zeros."""

    def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[FakeConfig]]:
        found = super().configs(segment, device)
        border = (Layout("any", writes_halo=True),)
        return [*found[:-2], *(replace(one, outputs=border) for one in found[-2:])]


def test_another_layout_is_tried_and_kept_though_nothing_gets_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, finals = tried(monkeypatch, fake=Bordering(lambda number: 1.0, lambda number: 5.0 + number / 100))
    assert seen["fake"] == [*range(2 * module.EACH_ATTEMPT), COUNT - 2, COUNT - 1]
    assert finals == [*range(tune.FINALISTS), COUNT - 2]


def test_another_layout_that_is_far_too_slow_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Bordering(lambda number: 1.0, lambda number: 9.0 if number >= COUNT - 2 else 5.0)
    assert tried(monkeypatch, fake=slow)[1] == [*range(tune.FINALISTS)]
