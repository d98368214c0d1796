"""Second-order scores: what they are, what they need, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zeroskip.pruning import GradualPruner, PruneConfig, RewindPruner, prune
from zeroskip.pruning import fisher as module
from zeroskip.pruning.fisher import BLOCK, DAMPING, GRADIENTS, Fisher

from .training import batch, network, optimizer_of, train_step

YES = torch.tensor(True)


def plain(gradients: Tensor, weight: Tensor, places: list[int]) -> dict[int, float]:
    """The definition, in float64, a block after the other; by place in the layer."""
    seen = gradients.double().flatten(1)[:, places]
    damping = DAMPING * float(seen.square().mean())
    scores = {}
    for first in range(0, len(places), BLOCK):
        block = seen[:, first : first + BLOCK]
        matrix = block.T @ block / len(seen) + damping * torch.eye(block.shape[1], dtype=torch.float64)
        inverse = torch.linalg.inv(matrix)
        for index, place in enumerate(places[first : first + BLOCK]):
            scores[place] = float(weight.flatten()[place].double() ** 2 / inverse[index, index])
    return scores


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (16, 8), (1, 1), (13, 5, 1, 1)])
@pytest.mark.parametrize("at_once", [1, 4096])
def test_scores_are_the_definition(shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCKS_AT_ONCE", at_once)
    torch.manual_seed(0)
    weight, gradients = torch.randn(shape), torch.randn(GRADIENTS + 5, *shape).bfloat16().float()
    mask = torch.rand(shape) < 0.6
    mask.view(-1)[0] = True
    fisher = Fisher(torch.ones(shape, dtype=torch.bool))
    for index, gradient in enumerate(gradients):
        fisher.see(gradient, YES)
        if index == GRADIENTS // 2:
            fisher.keep(mask)  # gradients from before the change count too
    places = mask.flatten().nonzero().flatten().tolist()
    scores = fisher.score(weight).flatten()
    expected = plain(gradients[-GRADIENTS:], weight, places)
    for place in range(weight.numel()):
        assert float(scores[place]) == pytest.approx(expected.get(place, 0.0), rel=1e-4)


def test_a_layer_without_weights_and_one_without_gradients() -> None:
    empty = Fisher(torch.zeros(2, 3, dtype=torch.bool))
    empty.see(torch.ones(2, 3), YES)
    assert empty.score(torch.ones(2, 3)).tolist() == [[0.0] * 3] * 2
    still = Fisher(torch.ones(1, 4, dtype=torch.bool))
    still.see(torch.zeros(1, 4), YES)
    assert not still
    assert still.score(torch.tensor([[3.0, -1.0, 0.0, 2.0]])).argsort().tolist() == [[2, 1, 3, 0]]


@pytest.mark.parametrize("scale", [1e-30, 2.0**-20, 2.0**-10, 2.0**60])
def test_the_scale_of_the_loss_makes_no_difference(scale: float) -> None:
    torch.manual_seed(0)
    weight, gradients = torch.randn(8, 40), torch.randn(10, 8, 40)
    scores = []
    for factor in (1.0, scale):
        fisher = Fisher(torch.ones(8, 40, dtype=torch.bool))
        for gradient in gradients:
            fisher.see(factor * gradient, YES)
        scores.append(fisher.score(weight) / factor**2)
    assert torch.allclose(*scores, rtol=0.03)  # of bfloat16, where the scale is no power of two


def _scaled(net: nn.Module, optimizer: torch.optim.Optimizer, pruner: GradualPruner, step: int) -> None:
    """As a gradient scaler has it: every fourth step overflows in one layer and is skipped, gradients stay scaled."""
    data, target = batch(step)
    optimizer.zero_grad()
    (net(data) - target).square().mean().backward()
    if step % 4 == 0:
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad *= 2.0**16
        net.get_parameter("7.weight").grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
    else:
        optimizer.step()
    pruner.step()


def _left_out(net: nn.Module, optimizer: torch.optim.Optimizer, pruner: GradualPruner, step: int) -> None:
    """The same with gradients of 0 in those steps."""
    data, target = batch(step)
    optimizer.zero_grad()
    (net(data) - target).square().mean().backward()
    if step % 4 == 0:
        optimizer.zero_grad(set_to_none=False)
    else:
        optimizer.step()
    pruner.step()


def _masks(run: Callable[[nn.Module, torch.optim.Optimizer, GradualPruner, int], object]) -> dict[str, Tensor]:
    net = network()
    optimizer = optimizer_of(net)
    pruner = GradualPruner(net, 0.8, begin=2, end=9, every=2, only=["3", "7"], score="fisher")
    torch.manual_seed(7)  # dropout
    for step in range(1, 10):
        run(net, optimizer, pruner, step)
    return pruner.masks


def test_a_step_that_overflowed_counts_nowhere() -> None:
    for name, mask in _masks(_scaled).items():
        assert torch.equal(mask, _masks(_left_out)[name])


def test_autocast_and_the_default_type_make_no_difference() -> None:
    def plainly(net: nn.Module, optimizer: torch.optim.Optimizer, pruner: GradualPruner, step: int) -> None:
        train_step(net, optimizer, pruner, batch(step))

    def within(net: nn.Module, optimizer: torch.optim.Optimizer, pruner: GradualPruner, step: int) -> None:
        data, target = batch(step)
        optimizer.zero_grad()
        (net(data) - target).square().mean().backward()
        optimizer.step()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                pruner.step()
        finally:
            torch.set_default_dtype(torch.float32)

    for name, mask in _masks(within).items():
        assert torch.equal(mask, _masks(plainly)[name])


@pytest.mark.parametrize(("score", "kept"), [("magnitude", [False, True]), ("fisher", [True, False])])
def test_what_the_loss_needs_stays(score: str, kept: list[bool]) -> None:
    """Of two weights the one whose gradients are large, or the one that is a little larger."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net.get_parameter("0.weight").copy_(torch.tensor([[1.0, 1.1], [1.0, 1.1]]))
        net.get_parameter("1.weight").fill_(1)
    pruner = GradualPruner(net, 0.5, begin=3, end=4, every=1, only=["0"], score=score)  # type: ignore[arg-type]
    for _ in range(4):
        net.zero_grad()
        net(torch.tensor([[5.0, 0.1]])).sum().square().backward()
        pruner.step()
    assert pruner.masks["0"].tolist() == [kept, kept]


def test_gradients_are_let_go_after_the_last_change() -> None:
    net = network()
    optimizer = optimizer_of(net)
    pruner = GradualPruner(net, 0.8, begin=2, end=5, every=1, only=["3", "7"], score="fisher")
    for step in range(1, 8):
        before = pruner.masks
        changed = train_step(net, optimizer, pruner, batch(step))
        state = pruner.state_dict()["gradients"]
        assert changed == (2 <= step <= 5)
        assert state.keys() == (before.keys() if step < 5 else set())
        for name, seen in state.items():
            assert tuple(seen.shape) == (step, int(pruner.masks[name].count_nonzero()))
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)


def test_gradients_long_before_a_change_are_not_kept() -> None:
    net = network()
    optimizer = optimizer_of(net)
    pruner = GradualPruner(net, 0.8, begin=GRADIENTS + 3, end=GRADIENTS + 4, every=1, only=["3"], score="fisher")
    for step in range(1, 6):
        train_step(net, optimizer, pruner, batch(step))
        assert len(pruner.state_dict()["gradients"]["3"]) == max(0, step - 3)


def test_gradients_of_long_ago_are_forgotten() -> None:
    net = network()
    optimizer = optimizer_of(net)
    pruner = GradualPruner(net, 0.8, begin=2, end=200, every=100, only=["3"], score="fisher")
    for step in range(1, 5):
        train_step(net, optimizer, pruner, batch(step))
    assert len(pruner.state_dict()["gradients"]["3"]) == 0
    optimizer.zero_grad()
    for _ in range(97):
        pruner.step()
    with pytest.raises(ValueError, match="gradients: got none but zeros by step 102, expected those of the loss"):
        pruner.step()


@pytest.mark.parametrize("to_none", [True, False])
def test_without_gradients_the_weights_stay_as_they_are(to_none: bool) -> None:
    net = network()
    optimizer = optimizer_of(net)
    before = net.get_parameter("3.weight").detach().clone()
    pruner = GradualPruner(net, 0.8, begin=1, end=5, every=1, only=["3"], score="fisher")
    net(batch(1)[0]).sum().backward()
    optimizer.zero_grad(set_to_none=to_none)
    with pytest.raises(ValueError, match=r"gradients: got none but zeros by step 1, expected .* before zero_grad"):
        pruner.step()
    assert torch.equal(net.get_parameter("3.weight"), before)


def test_a_layer_that_does_not_train_is_named() -> None:
    net = network()
    net.get_submodule("3").requires_grad_(False)
    with pytest.raises(ValueError, match=r"layer '3': got a weight that does not train"):
        GradualPruner(net, 0.8, begin=1, end=5, every=1, only=["3", "7"], score="fisher")
    net.get_submodule("3").requires_grad_(True)
    pruner = GradualPruner(net, 0.8, begin=1, end=5, every=1, only=["3", "7"], score="fisher")
    net.get_submodule("3").requires_grad_(False)
    net(batch(1)[0]).sum().backward()
    with pytest.raises(ValueError, match=r"layer '3': got no gradient by step 1, expected .* skip=\['3'\]"):
        pruner.step()


def test_states_from_before_there_were_scores_are_taken() -> None:
    net = network()
    pruner = GradualPruner(net, 0.8, begin=1, end=5, every=1, only=["3"])
    state = pruner.state_dict()
    state["config"] = state["config"].replace(', "score": "magnitude"', "")
    del state["gradients"]
    assert "score" not in state["config"]
    pruner.load_state_dict(state)


def test_scores_are_refused_where_nothing_sees_gradients() -> None:
    by_fisher = PruneConfig(0.9, score="fisher")
    assert PruneConfig.from_json(by_fisher.to_json()) == by_fisher
    with pytest.raises(ValueError, match="score: got 'fisher', expected \"magnitude\", since pruning in one shot"):
        prune(network(), by_fisher)
    with pytest.raises(ValueError, match="RewindPruner sees no gradients; take GradualPruner"):
        RewindPruner(network(), by_fisher, rewind=0, end=4, rounds=2)
    with pytest.raises(ValueError, match="filters go by their norms"):
        PruneConfig(0.5, "filters", score="fisher")
    with pytest.raises(ValueError, match=r"score: got 'hessian', expected \"magnitude\" or \"fisher\""):
        PruneConfig(0.5, score="hessian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a PruneConfig and further arguments"):
        GradualPruner(network(), by_fisher, begin=0, end=1, every=1, score="magnitude", scope="erk")
