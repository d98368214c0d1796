"""Gradual pruning: the schedule, masks that hold, resuming."""

import copy
import io
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zeroskip.pruning import GradualPruner, prune
from zeroskip.pruning.schedule import CubicSchedule

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def mlp(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, pruner: GradualPruner, first: int, last: int
) -> list[float]:
    """Steps `first` to `last` with data that depends on the step alone; the sparsity after each."""
    sparsities = []
    for step in range(first, last + 1):
        torch.manual_seed(step)
        loss = (model(torch.randn(16, 8)) - torch.randn(16, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
        sparsities.append(pruner.sparsity)
    return sparsities


schedules = st.builds(
    lambda begin, length, every: CubicSchedule(begin, begin + length, every),
    st.integers(0, 50), st.integers(1, 100), st.integers(1, 30),
)  # fmt: skip


@given(schedule=schedules, bounds=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)))
def test_schedule_rises_from_initial_to_final(schedule: CubicSchedule, bounds: tuple[float, float]) -> None:
    initial, final = sorted(bounds)
    values = [schedule.sparsity(step, initial, final) for step in range(schedule.end + 10)]
    assert values[schedule.begin] == pytest.approx(initial)
    assert values[schedule.end] == values[-1] == final
    assert all(a <= b + 1e-12 for a, b in pairwise(values))


@given(schedule=schedules)
def test_masks_are_due_at_both_ends_and_every_so_often(schedule: CubicSchedule) -> None:
    due = [step for step in range(schedule.end + 10) if schedule.due(step)]
    assert due[0] == schedule.begin
    assert due[-1] == schedule.end
    assert {b - a for a, b in pairwise(due[:-1])} <= {schedule.every}


def test_schedule_is_cubic() -> None:
    assert CubicSchedule(100, 200, 10).sparsity(150, 0, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))


@pytest.mark.parametrize(
    ("begin", "end", "every", "message"),
    [(5, 5, 1, "begin, end: got 5, 5"), (-1, 5, 1, "begin, end: got -1, 5"), (0, 5, 0, "every: got 0")],
)
def test_schedule_errors(begin: int, end: int, every: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualPruner(mlp(), 0.9, begin=begin, end=end, every=every)


def test_what_prune_objects_to_fails_at_once() -> None:
    with pytest.raises(ValueError, match="multiple of 3"):
        GradualPruner(mlp(), None, begin=0, end=9, every=1, pattern="1:3")
    with pytest.raises(ValueError, match="sparsity: got None"):
        GradualPruner(mlp(), None, begin=0, end=9, every=1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_hold_and_end_at_the_exact_sparsity(optimizer: str, scope: str) -> None:
    model = mlp()
    weight = model.get_parameter("2.weight")
    pruner = GradualPruner(model, 0.9, begin=3, end=20, every=4, scope=scope, only=["0", "2"])  # type: ignore[arg-type]
    optim = OPTIMIZERS[optimizer](model.parameters())
    dead = torch.zeros_like(weight, dtype=torch.bool)
    sparsities = []
    for step in range(1, 31):
        sparsities += train(model, optim, pruner, step, step)
        assert (weight[dead] == 0).all()
        dead = weight == 0
    assert sparsities == sorted(sparsities)
    changes = {step for step, (a, b) in enumerate(pairwise([0.0, *sparsities]), start=1) if a != b}
    assert {7, 11, 15} <= changes <= {7, 11, 15, 19, 20}
    layers = [layer for layer in pruner.record().layers if layer.reason is None]
    total = sum(layer.numel for layer in layers)
    if scope == "global":
        assert total - sum(layer.nnz for layer in layers) == round(0.9 * total)
    else:
        assert all(layer.numel - layer.nnz == round(0.9 * layer.numel) for layer in layers)


def test_n_of_m_loses_one_weight_of_each_group_after_another() -> None:
    model = mlp()
    pruner = GradualPruner(model, None, begin=1, end=10, every=1, pattern="1:4")
    optimizer = OPTIMIZERS["adam"](model.parameters())
    assert sorted(set(train(model, optimizer, pruner, 1, 12))) == [0, 0.25, 0.5, 0.75]
    groups = model.get_parameter("2.weight").reshape(-1, 4)
    assert ((groups != 0).sum(1) == 1).all()
    assert {layer.pattern for layer in pruner.record().layers if layer.reason is None} == {"1:4"}


def test_starts_from_the_sparsity_there_is() -> None:
    model = mlp()
    prune(model, 0.5, only=["0", "2"])
    dead = model.get_parameter("2.weight") == 0
    pruner = GradualPruner(model, 0.9, begin=5, end=10, every=1, only=["0", "2"])
    sparsities = train(model, OPTIMIZERS["momentum"](model.parameters()), pruner, 1, 10)
    assert sparsities[:5] == [0.5] * 5
    assert sparsities[-1] == pytest.approx(0.9, abs=0.01)
    assert (model.get_parameter("2.weight")[dead] == 0).all()


def test_a_sparser_network_stays_as_it_is() -> None:
    model = mlp()
    prune(model, 0.95, only=["2"])
    dead = model.get_parameter("2.weight") == 0
    pruner = GradualPruner(model, 0.5, begin=0, end=5, every=1, only=["2"])
    train(model, OPTIMIZERS["adam"](model.parameters()), pruner, 1, 8)
    assert torch.equal(model.get_parameter("2.weight") == 0, dead)


@settings(max_examples=10, deadline=None)
@given(stop=st.integers(0, 24), pattern=st.sampled_from(["unstructured", "2:4"]))
def test_resuming_gives_bitwise_equal_weights(stop: int, pattern: str) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, GradualPruner]:
        model = mlp()
        pruner = GradualPruner(model, 0.8, begin=2, end=18, every=3, pattern=pattern)
        return model, OPTIMIZERS["adam"](model.parameters()), pruner

    model, optimizer, pruner = start()
    train(model, optimizer, pruner, 1, stop)
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], saved)
    train(model, optimizer, pruner, stop + 1, 25)

    model2, optimizer2, pruner2 = start()
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    model2.load_state_dict(states[0])
    optimizer2.load_state_dict(states[1])
    pruner2.load_state_dict(states[2])
    train(model2, optimizer2, pruner2, stop + 1, 25)
    for a, b in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_network_is_rejected() -> None:
    state = GradualPruner(mlp(12), 0.5, begin=0, end=5, every=1).state_dict()
    with pytest.raises(ValueError, match=r"masks: got .*12, 12.* expected .*16, 16"):
        GradualPruner(mlp(16), 0.5, begin=0, end=5, every=1).load_state_dict(state)


def test_equal_replicas_agree_without_communication() -> None:
    """What each rank of DistributedDataParallel does with its own copy."""
    replicas = [mlp()]
    replicas.append(copy.deepcopy(replicas[0]))
    for model in replicas:
        pruner = GradualPruner(model, 0.8, begin=1, end=6, every=1)
        train(model, OPTIMIZERS["momentum"](model.parameters()), pruner, 1, 8)
    for a, b in zip(replicas[0].parameters(), replicas[1].parameters(), strict=True):
        assert torch.equal(a, b)
