"""Exchanges in place stay if, and only if, the whole engine got faster by the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from contract.cases import program_of, thin
from plan.fakes import Fake, clock
from zeroskip.core.device import Device, cpu
from zeroskip.core.record import Times
from zeroskip.measure.timer import Measurement
from zeroskip.methods import registry
from zeroskip.plan.planner import Tuning, best_plan, dense_plans, skipping_nothing, tune_program
from zeroskip.run import refine as module

X = torch.randn(1, 4, 6, 7, generator=torch.Generator().manual_seed(0))
METHODS = {"dense": registry()["dense"], "fake": Fake()}


@pytest.fixture(scope="module")
def tuning() -> Tuning:
    torch.manual_seed(0)
    model = thin(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 6, 1)), 0.3)
    return tune_program(program_of(model, X), METHODS, cpu(1), timer=clock({"dense": 10.0, "fake": 9.0}))


def refined(tuning: Tuning, monkeypatch: pytest.MonkeyPatch, changed_us: float) -> tuple[list[str], int]:
    """The methods of the refined plan, and how many exchanges were measured, if each takes ``changed_us`` for 100."""
    measured = []

    def timer(calls: Mapping[str, Callable[[], object]], rounds: int, device: Device, captured: bool) -> Measurement:
        measured.append(1)
        assert all(isinstance(call(), torch.Tensor) for call in calls.values())
        first, *others = calls
        times = {first: 100.0} | dict.fromkeys(others, changed_us)
        return Measurement({name: Times((value,) * 3, "cpu") for name, value in times.items()}, False)

    monkeypatch.setattr(module, "compare", timer)
    plan = module.refine(tuning, [best_plan(tuning)], tuning.options, (X,), METHODS, {})
    return [step.method for step in plan.steps], len(measured)


def test_a_faster_engine_keeps_the_exchange(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    methods, measured = refined(tuning, monkeypatch, 90.0)
    assert methods == ["dense", "dense"]
    assert measured >= 2


@pytest.mark.parametrize("changed_us", [99.5, 100.0, 150.0])
def test_an_engine_that_is_not_clearly_faster_stays(
    tuning: Tuning, monkeypatch: pytest.MonkeyPatch, changed_us: float
) -> None:
    assert refined(tuning, monkeypatch, changed_us)[0] == ["fake", "fake"]


def test_it_starts_from_the_fastest_engine(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, (dense, *_) = best_plan(tuning), dense_plans(tuning, METHODS)

    def timer(calls: Mapping[str, Callable[[], object]], *others: object) -> Measurement:
        # Of the two starts the second is faster, and no exchange is.
        return Measurement({name: Times((9.0 if name == "1" else 9.01,) * 3, "cpu") for name in calls}, False)

    monkeypatch.setattr(module, "compare", timer)
    for plans in ([sparse, dense], [dense, sparse]):
        assert module.refine(tuning, plans, tuning.options, (X,), METHODS, {}) == plans[1]


def test_it_exchanges_what_it_may(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, dense = dense_plans(tuning, METHODS)[0], skipping_nothing(tuning, METHODS)
    tried = []

    def timer(calls: Mapping[str, Callable[[], object]], *others: object) -> Measurement:
        tried.append(1)
        return Measurement({name: Times((9.0 - int(name),) * 3, "cpu") for name in calls}, False)

    monkeypatch.setattr(module, "compare", timer)
    part = module.refine(tuning, [plan], dense.options, (X,), METHODS, {})
    of_part = len(tried)
    module.refine(tuning, [plan], tuning.options, (X,), METHODS, {})
    assert [step.method for step in part.steps] == ["dense", "dense"]
    assert all(any(rejection.method == "fake" for rejection in step.rejected) for step in part.steps)
    assert len(tried) - of_part > of_part


def test_hopeless_alternatives_are_not_tried(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE", 1.0)
    assert refined(tuning, monkeypatch, 1.0) == (["fake", "fake"], 0)


def test_time_that_is_up_ends_it(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", -1.0)
    assert refined(tuning, monkeypatch, 1.0) == (["fake", "fake"], 0)
