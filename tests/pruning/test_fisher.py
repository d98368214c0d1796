"""Second-order scores: what they are, what they need, and what they leave behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zeroskip.pruning import GradualPruner, PruneConfig, RewindPruner, prune
from zeroskip.pruning import fisher as module
from zeroskip.pruning.fisher import BLOCK, DAMPING, GRADIENTS, Fisher

from .training import batch, network, optimizer_of, train_step


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
        fisher.see(gradient)
        if index == GRADIENTS // 2:
            fisher.keep(mask)  # gradients from before the change count too
    places = mask.flatten().nonzero().flatten().tolist()
    scores = fisher.score(weight).flatten()
    expected = plain(gradients[-GRADIENTS:], weight, places)
    for place in range(weight.numel()):
        assert float(scores[place]) == pytest.approx(expected.get(place, 0.0), rel=1e-4)


def test_a_layer_without_weights_and_gradients_without_values() -> None:
    empty = Fisher(torch.zeros(2, 3, dtype=torch.bool))
    empty.see(torch.ones(2, 3))
    assert empty.score(torch.ones(2, 3)).tolist() == [[0.0] * 3] * 2
    fisher = Fisher(torch.ones(1, 4, dtype=torch.bool))
    fisher.see(torch.tensor([[1.0, float("inf"), float("nan"), -float("inf")]]))
    assert fisher.gradients().tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert bool(fisher.score(torch.ones(1, 4)).isfinite().all())


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


def test_without_gradients_the_weights_stay_as_they_are() -> None:
    net = network()
    before = net.get_parameter("3.weight").detach().clone()
    pruner = GradualPruner(net, 0.8, begin=1, end=5, every=1, only=["3"], score="fisher")
    with pytest.raises(ValueError, match=r"layer '3': got no gradient by step 1, expected one of each step; call step"):
        pruner.step()
    assert torch.equal(net.get_parameter("3.weight"), before)


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
