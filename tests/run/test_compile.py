"""zeroskip.compile from end to end, with little patience."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zeroskip
from contract.cases import OURS, Net, engine_with, plan_with, program_of, thin
from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported
from zeroskip.core.record import Times
from zeroskip.measure.timer import Measurement
from zeroskip.methods import registry
from zeroskip.plan.plan import Plan
from zeroskip.run import confirm
from zeroskip.run.compile import distance
from zeroskip.run.engine import Variant

pytestmark = pytest.mark.usefixtures("quick")


def model(density: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return thin(
        nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(800, 4)),
        density,
    )


X = torch.randn(1, 8, 10, 10, generator=torch.Generator().manual_seed(3))


def expect(net: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return net(x)  # type: ignore[no-any-return]


def test_a_pruned_model_compiles_and_equals_torch() -> None:
    net, steps = model(), []
    engine = zeroskip.compile(net, X, threads=1, progress=lambda *step: steps.append(step))
    assert distance(engine(X), expect(net)) < 1e-6
    assert [step.nodes for step in engine.plan.steps] == [("0",), ("2",), ("4",)]
    assert engine.plan.confirmation is not None
    assert engine.plan.device.threads == 1
    assert engine.plan.tune_seconds > 0
    assert steps
    for step in engine.plan.steps:
        told = {item.method for item in step.rejected} | {step.method}
        assert told == {name for name, method in registry().items() if method.reproducible}
        assert step.time_us is not None
        assert step.why


def test_an_unpruned_model_compiles_and_says_that_there_are_no_zeros() -> None:
    net = model(1.1)
    engine = zeroskip.compile(net, X)
    assert distance(engine(X), expect(net)) < 1e-6
    assert all("no zeros" in step.why for step in engine.plan.steps)
    assert "no zeros" in str(engine.plan)


def test_dense_alone_can_be_asked_for() -> None:
    engine = zeroskip.compile(model(), X, methods=["dense"])
    assert {step.method for step in engine.plan.steps} == {"dense"}


def test_several_examples_make_several_plans() -> None:
    net = thin(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), 0.2)
    other = torch.randn(2, 8, 6, 7)
    engine = zeroskip.compile(net, [X, (other,)])
    assert distance(engine(X), expect(net)) < 1e-6
    assert distance(engine(other), expect(net, other)) < 1e-6
    assert len(engine.plans) == 2


DTYPES = {
    "double": (lambda: thin(nn.Conv2d(8, 8, 3), 0.3).double(), X.double(), 1e-12),
    "bfloat16": (lambda: thin(nn.Conv2d(8, 8, 3), 0.3).bfloat16(), X.bfloat16(), 0.02),
    "double inside": (
        lambda: thin(Net(lambda net, x: net.a(x.double()).float(), a=nn.Conv2d(8, 8, 3)), 0.3).double(),
        X,
        1e-6,
    ),
    "bfloat16 inside": (
        lambda: thin(Net(lambda net, x: net.a(x.bfloat16()).float(), a=nn.Conv2d(8, 8, 3)), 0.3).bfloat16(),
        X,
        0.02,
    ),
    "single inside": (
        lambda: thin(Net(lambda net, x: net.a(x.float()).double(), a=nn.Conv2d(8, 8, 3)), 0.3),
        X.double(),
        1e-6,
    ),
}


@pytest.mark.parametrize("name", DTYPES)
def test_other_types_run_dense(name: str) -> None:
    make, x, close = DTYPES[name]
    net = make()
    engine = zeroskip.compile(net, x)
    got, want = engine(x), expect(net, x)
    assert got.dtype == want.dtype
    assert distance(got, want) <= close
    if name != "single inside":
        assert {step.method for step in engine.plan.steps} == {"dense"}


# -- plans ---------------------------------------------------------------------------------------------------
def test_the_same_plan_gives_the_same_bits(tmp_path: Path) -> None:
    net = model()
    first = engine_with(net, X, *OURS)
    (tmp_path / "plan.json").write_text(first.plan.to_json())
    plan = Plan.read(tmp_path / "plan.json")
    second = zeroskip.compile(net, X, plan=plan)
    assert second.plan == plan
    assert torch.equal(first(X), second(X))


def test_a_plan_for_other_weights_is_refused_unless_asked_to_measure_again() -> None:
    plan, other = engine_with(model(), X, *OURS).plan, model(0.3)
    with pytest.raises(ValueError, match=r"other weights.*replan=True"):
        zeroskip.compile(other, X, plan=plan)
    engine = zeroskip.compile(other, X, plan=plan, replan=True)
    assert engine.plan.weights_hash != plan.weights_hash
    assert engine.plan.confirmation is not None
    assert distance(engine(X), expect(other)) < 1e-6


def test_a_plan_for_another_shape_is_refused() -> None:
    net = thin(nn.Conv2d(8, 8, 3), 0.3)
    with pytest.raises(ValueError, match="inputs of shape"):
        zeroskip.compile(net, torch.randn(2, 8, 10, 10), plan=engine_with(net, X).plan)


def test_plans_and_examples_come_in_pairs() -> None:
    net = model()
    plan = engine_with(net, X).plan
    with pytest.raises(ValueError, match="got 2 plans for 1 examples"):
        zeroskip.compile(net, X, plan=[plan, plan])


@pytest.mark.parametrize(
    "change",
    [
        {"method": "sputnik"},
        {"nodes": ("0", "2")},
        {"nodes": ("1",)},
        {"nodes": ("nowhere",)},
        {"config": {}},
        {"config": {"rows": 0}},
    ],
)
def test_a_step_that_cannot_be_run_is_refused(change: dict[str, object]) -> None:
    net = model()
    plan = engine_with(net, X, *OURS).plan
    with pytest.raises(ValueError, match=r"\w"):
        zeroskip.compile(net, X, plan=replace(plan, steps=(replace(plan.steps[0], **change), *plan.steps[1:])))


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_warning_is_about_the_plan_that_won(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    """The dense one, which is the second that is compared with torch."""
    net, compare = model(), confirm.compare
    program = program_of(net, X)
    best, dense = (Variant(program, plan_with(program, *prefer)) for prefer in (OURS, ()))

    def slower(calls: Any, rounds: int, device: Device, captured: bool) -> Measurement:
        found = compare(calls, rounds, device, captured)
        return replace(found, times={**found.times, "best": Times((1e9,), "wall")})

    distances = iter([torch.inf if at == wrong else 0.0 for at in range(2)])
    monkeypatch.setattr(confirm, "compare", slower)
    monkeypatch.setattr(confirm, "distance", lambda ours, theirs: next(distances))
    plan, warned = confirm.confirm(net, (X,), best, dense, registry(), {})
    assert plan.steps == dense.plan.steps
    assert len(warned) == wrong
    assert any("differ from torch" in note for note in plan.notes) == bool(wrong)


# -- bad input -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("example", "words"),
    [
        ([], "empty list"),
        ((), "tensor or a tuple of tensors"),
        ("image", "tensor or a tuple of tensors, got str"),
        ((X, 3), "tensor or a tuple of tensors"),
        ([X, None], "tensor or a tuple of tensors"),
        (X.to("meta"), "the example is on meta"),
    ],
)
def test_an_example_that_is_none_is_refused(example: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        zeroskip.compile(model(), example)  # type: ignore[arg-type]


def test_an_example_that_the_model_refuses_is_unsupported_with_torchs_reason() -> None:
    with pytest.raises(Unsupported, match=r"could not capture Sequential(.|\n)*What to do"):
        zeroskip.compile(model(), torch.randn(1, 3, 10, 10))


def test_a_model_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model is on \['meta'\]"):
        zeroskip.compile(model().to("meta"), X)


def test_an_unknown_method_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no method is called \['sputnick'\]; there are .*dense"):
        zeroskip.compile(model(), X, methods=["sputnick"])


def test_one_name_is_no_list_of_methods_and_no_thread_no_number_of_them() -> None:
    with pytest.raises(ValueError, match="got the string 'escort': put it in brackets"):
        zeroskip.compile(model(), X, methods="escort")
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        zeroskip.compile(model(), X, threads=0)


def test_a_model_that_has_no_channels_last_form_compiles() -> None:
    net, x = torch.nn.Conv3d(2, 3, 3).eval(), torch.randn(1, 2, 4, 4, 4)
    assert distance(zeroskip.compile(net, x)(x), net(x).detach()) < 1e-5


@pytest.mark.parametrize(("weight", "bias"), [((5, 6), (1,)), ((5, 6), (3, 5)), ((6,), None)])
def test_linear_functions_that_are_no_layers_are_left_to_torch(
    weight: tuple[int, ...], bias: tuple[int, ...] | None
) -> None:
    net = Net(lambda self, x: torch.nn.functional.linear(x, self.w, self.b))
    net.w = nn.Parameter(torch.randn(weight))
    net.b = None if bias is None else nn.Parameter(torch.randn(bias))
    x = torch.randn(3, 6)
    assert distance(zeroskip.compile(net, x)(x), net(x).detach()) < 1e-5


def test_the_model_stays_as_it_was() -> None:
    net = model().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    zeroskip.compile(net, X)
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_nan_weight_does_not_stop_the_model() -> None:
    net = thin(nn.Sequential(nn.Conv2d(8, 8, 3)), 0.3)
    with torch.no_grad():
        net[0].weight[3, 2, 1, 1] = torch.nan  # type: ignore[index]
    engine = zeroskip.compile(net, X)
    assert torch.equal(engine(X).isnan(), expect(net).isnan())
