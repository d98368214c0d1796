"""A method that runs two layers as one segment: claimed, covered, executed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from contract.cases import plan_with, program_of, thin
from plan.fakes import Fake, Pair
from zeroskip.core.cost import Cost
from zeroskip.core.device import cpu
from zeroskip.core.errors import Unsupported
from zeroskip.core.method import AnyMethod
from zeroskip.methods import registry
from zeroskip.plan.cover import cover
from zeroskip.plan.plan import Step
from zeroskip.plan.planner import validate
from zeroskip.plan.tune import Option
from zeroskip.run.compile import distance
from zeroskip.run.engine import Engine, Variant

METHODS: dict[str, AnyMethod] = {**registry(), "pair": Pair(), "fake": Fake()}
X = torch.randn(1, 4, 6, 7, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return thin(
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 6, 1)),
        0.4,
    )


def test_two_layers_run_as_one_step() -> None:
    net = model()
    program = program_of(net, X)
    plan = plan_with(program, "pair", "escort", methods=METHODS)
    assert [(step.method, step.nodes) for step in plan.steps] == [("pair", ("0", "1")), ("escort", ("3",))]
    assert plan.step("1").name == "0..1"
    validate(plan, program, METHODS, "cpu")
    with torch.no_grad():
        assert distance(Engine([Variant(program, plan)], METHODS)(X), net(X)) < 1e-6


def test_a_layer_in_two_steps_is_refused() -> None:
    program = program_of(model(), X)
    plan = plan_with(program, "pair", methods=METHODS)
    again = Step(("1",), "", 1.0, "dense", {}, "")
    with pytest.raises(ValueError, match="exactly once"):
        validate(replace(plan, steps=(*plan.steps, again)), program, METHODS, "cpu")


def test_a_pair_wins_the_cover_of_a_real_graph_by_its_time() -> None:
    program = program_of(model(), X)
    layers = program.layers()

    def options(pair_us: float) -> dict[str, list[Option]]:
        found: dict[str, list[Option]] = {}
        for name in layers:
            for method, time_us in ((METHODS["fake"], 10.0), (METHODS["pair"], pair_us)):
                try:
                    claimed = method.claim(program.graph, layers, name, cpu(1))
                except Unsupported:
                    continue
                found.setdefault(name, []).extend(
                    Option(
                        method.name, method.configs(segment, cpu(1))[0], segment, time_us, 0.0, 0.0, 0, Cost(0, 0, 0)
                    )
                    for segment in claimed
                )
        return found

    assert [one.segment.nodes for one in cover(program.graph, options(19.0)).options] == [("0", "1"), ("3",)]
    assert [one.segment.nodes for one in cover(program.graph, options(21.0)).options] == [("0",), ("1",), ("3",)]
