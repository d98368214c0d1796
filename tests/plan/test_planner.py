"""Tuning with a clock that is told the times: what is chosen, and what is written down about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from contract.cases import program_of, thin
from plan.fakes import Fake, FakeConfig, clock
from zeroskip.core.device import Device, cpu
from zeroskip.core.errors import CompileError, Unsupported, ZeroskipError
from zeroskip.core.graph import Segment
from zeroskip.core.method import Candidate
from zeroskip.methods import registry
from zeroskip.model.program import Program
from zeroskip.plan.plan import Plan
from zeroskip.plan.planner import best_plan, dense_plans, tune_program, validate

DENSE = registry()["dense"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 6, 1)
    )


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of(thin(model(), 0.3), torch.randn(1, 4, 6, 7))


def plan_of(program: Program, method: Fake, /, **times_us: float) -> Plan:
    return best_plan(tune_program(program, {"dense": DENSE, "fake": method}, cpu(1), timer=clock(times_us)))


@pytest.mark.parametrize(
    ("times_us", "winner"), [({"dense": 10.0, "fake": 4.0}, "fake"), ({"dense": 3.0, "fake": 4.0}, "dense")]
)
def test_the_faster_method_is_chosen(program: Program, times_us: dict[str, float], winner: str) -> None:
    plan = plan_of(program, Fake(), **times_us)
    assert [step.method for step in plan.steps] == [winner] * 3
    assert [step.nodes for step in plan.steps] == [("0",), ("2",), ("4",)]


def test_a_step_says_what_it_was_chosen_over(program: Program) -> None:
    step = plan_of(program, Fake(), dense=10.0, fake=4.0).steps[0]
    assert step.time_us == pytest.approx(4.0)
    assert step.dense_us == pytest.approx(10.0, abs=0.01)
    assert "2.50x the next" in step.why
    (lost,) = step.rejected
    assert (lost.method, lost.reason) == ("dense", "slower")
    assert lost.time_us == pytest.approx(10.0, abs=0.01)


def test_a_refusal_is_told_in_the_methods_words(program: Program) -> None:
    plan = plan_of(program, Fake(refuses="needs a blue moon"), dense=10.0)
    assert {step.method for step in plan.steps} == {"dense"}
    (refused,) = plan.steps[0].rejected
    assert (refused.method, refused.reason, refused.time_us) == ("fake", "needs a blue moon", None)
    assert "needs a blue moon" in str(plan)
    assert "only method that can" in plan.steps[0].why


def test_a_wrong_method_is_never_chosen_however_fast(program: Program) -> None:
    plan = plan_of(program, Fake(add=1e-3), dense=10.0, fake=0.1)
    assert {step.method for step in plan.steps} == {"dense"}
    assert plan.steps[0].rejected[0].reason.startswith("WRONG")


@pytest.mark.parametrize(
    ("run_seconds", "build_seconds", "tried"), [(3600.0, 1.0, True), (1e-9, 60.0, True), (3600.0, 60.0, False)]
)
def test_what_is_dear_to_build_must_be_worth_it(
    program: Program, run_seconds: float, build_seconds: float, tried: bool
) -> None:
    plan = plan_of(program, Fake(run_seconds=run_seconds, build_seconds=build_seconds), dense=10.0, fake=4.0)
    assert {step.method for step in plan.steps} == {"fake" if tried else "dense"}
    assert {step.estimated_build_seconds for step in plan.steps} == {build_seconds if tried else 0.0}
    if not tried:
        (refused,) = plan.steps[0].rejected
        assert refused.reason.startswith("not tried: 60 s to build for an estimated 3600000000.0 us, the fastest took")


def test_a_wrong_method_is_called_wrong_even_if_its_other_candidates_are_hopeless(program: Program) -> None:
    class Both(Fake):
        def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[FakeConfig]]:
            cheap = self.candidate(segment, FakeConfig())
            return [cheap, replace(cheap, run_seconds=3600.0, build_seconds=60.0)]

    plan = plan_of(program, Both(add=1e-3), dense=10.0)
    assert plan.steps[0].rejected[0].reason.startswith("WRONG")


def test_a_method_without_candidates_says_why(program: Program) -> None:
    class Nothing(Fake):
        def configs(self, segment: Segment, device: Device) -> Sequence[Candidate[FakeConfig]]:
            raise Unsupported("nothing fits")

    plan = plan_of(program, Nothing(), dense=10.0)
    assert plan.steps[0].rejected[0].reason == "nothing fits"


def test_what_is_dear_to_build_is_tried_where_nothing_else_can(program: Program) -> None:
    methods = {"fake": Fake(run_seconds=3600.0, build_seconds=60.0)}
    plan = best_plan(tune_program(program, methods, cpu(1), timer=clock({"fake": 4.0})))
    assert {step.method for step in plan.steps} == {"fake"}


@pytest.mark.parametrize(
    "error", [CompileError("no such instruction", "log"), Unsupported("not here"), RuntimeError("driver says no")]
)
def test_a_method_that_fails_to_build_is_a_rejection(program: Program, error: Exception) -> None:
    plan = plan_of(program, Fake(fails=error), dense=10.0, fake=0.1)
    assert {step.method for step in plan.steps} == {"dense"}
    reason = plan.steps[0].rejected[0].reason
    assert type(error).__name__ in reason
    assert str(error).splitlines()[0] in reason


def test_a_method_without_configurations_is_a_rejection(program: Program) -> None:
    plan = plan_of(program, Fake(configs=0), dense=10.0)
    assert "no configuration" in plan.steps[0].rejected[0].reason


def test_no_method_at_all_is_an_error_that_names_the_layer_and_every_reason(program: Program) -> None:
    with pytest.raises(ZeroskipError, match=r"no method can run 0 .*fake: needs a blue moon"):
        tune_program(program, {"fake": Fake(refuses="needs a blue moon")}, cpu(1), timer=clock({}))


def test_like_layers_are_measured_once(program: Program) -> None:
    """The two 3x3 layers differ in name only if their densities agree to a percent."""
    same = Program(program.graph, {**program.tensors, "2.weight": program.tensors["0.weight"]})
    calls: list[int] = []
    inner = clock({"dense": 10.0, "fake": 4.0})

    def counting(*arguments: object) -> object:
        calls.append(1)
        return inner(*arguments)

    plan = best_plan(tune_program(same, {"dense": DENSE, "fake": Fake()}, cpu(1), timer=counting))  # type: ignore[arg-type]
    assert len(calls) == 2
    assert [step.nodes for step in plan.steps] == [("0",), ("2",), ("4",)]


def test_progress_is_told_from_start_to_end(program: Program) -> None:
    seen: list[tuple[int, int, str]] = []
    tune_program(program, {"dense": DENSE}, cpu(1), lambda *step: seen.append(step), clock({"dense": 1.0}))
    assert seen == [(0, 3, "0"), (1, 3, "2"), (2, 3, "4"), (3, 3, "")]


def test_contention_is_carried_on(program: Program) -> None:
    inner = clock({"dense": 1.0})

    def busy(*arguments: object) -> object:
        return replace(inner(*arguments), contended=True)

    assert tune_program(program, {"dense": DENSE}, cpu(1), timer=busy).contended  # type: ignore[arg-type]


def test_dense_plans_use_dense_libraries_only_and_differ(program: Program) -> None:
    methods = {"dense": DENSE, "fake": Fake()}
    plans = dense_plans(tune_program(program, methods, cpu(1), timer=clock({"dense": 10.0, "fake": 4.0})), methods)
    assert plans
    assert {step.method for plan in plans for step in plan.steps} == {"dense"}
    assert all(a.steps != b.steps for index, a in enumerate(plans) for b in plans[:index])


@pytest.mark.parametrize(("zeros", "methods_of_dense"), [(0, {"fake"}), (1, {"fake"}), (40, {"dense"})])
def test_a_layer_with_hardly_any_zeros_has_none_to_skip(zeros: int, methods_of_dense: set[str]) -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Flatten())
    with torch.no_grad():
        net.get_parameter("0.weight").view(-1)[:zeros] = 0
    tuning = tune_program(
        program_of(net, torch.randn(1, 8, 4, 4)), METHODS, cpu(1), timer=clock({"dense": 10.0, "fake": 4.0})
    )
    plans = dense_plans(tuning, METHODS)
    assert {step.method for step in plans[0].steps} == methods_of_dense


# -- validation ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plan(program: Program) -> Plan:
    return plan_of(program, Fake(), dense=10.0, fake=4.0)


METHODS = {"dense": DENSE, "fake": Fake()}


def test_a_plan_fits_the_program_it_was_made_for(program: Program, plan: Plan) -> None:
    validate(plan, program, METHODS, "cpu")


def one_bit_off(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(torch.int32).view(-1)[0] ^= 1
    return changed


def test_other_weights_are_refused_with_the_way_out(program: Program, plan: Plan) -> None:
    other = Program(program.graph, {**program.tensors, "0.bias": one_bit_off(program.tensors["0.bias"])})
    with pytest.raises(ValueError, match=r"other weights.*replan=True"):
        validate(plan, other, METHODS, "cpu")


def test_other_shapes_are_refused_with_the_way_out(plan: Plan) -> None:
    other = program_of(thin(model(), 0.3), torch.randn(2, 4, 6, 7))
    with pytest.raises(ValueError, match=r"inputs of shape.*replan=True"):
        validate(plan, other, METHODS, "cpu")


def test_a_method_that_is_gone_is_named(program: Program, plan: Plan) -> None:
    with pytest.raises(ValueError, match=r"\['fake'\].*it has \['dense'\].*replan=True"):
        validate(plan, program, {"dense": DENSE}, "cpu")


@pytest.mark.parametrize("change", ["missing", "twice"])
def test_every_layer_is_covered_exactly_once(program: Program, plan: Plan, change: str) -> None:
    steps = plan.steps[1:] if change == "missing" else (*plan.steps, plan.steps[0])
    with pytest.raises(ValueError, match="exactly once"):
        validate(replace(plan, steps=steps), program, METHODS, "cpu")
