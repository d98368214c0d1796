"""Iterative magnitude pruning: what goes back, what stays, what is counted."""

import pytest
import torch
from torch import nn

from pruning.training import batch, network, optimizer_of, train_step
from zeroskip.pruning import RewindPruner, prune


def run(model: nn.Module, pruner: RewindPruner, optimizer: torch.optim.Optimizer) -> list[tuple[int, float]]:
    """Train to the end; (step gone back to, sparsity) after each step."""
    seen = []
    while not pruner.done:
        train_step(model, optimizer, pruner, batch(pruner.training_step))
        seen.append((pruner.training_step, pruner.sparsity))
    return seen


@pytest.mark.parametrize("rewind", [0, 2])
def test_weights_buffers_and_optimizer_go_back_and_masks_stay(rewind: int) -> None:
    model = network()
    optimizer = optimizer_of(model)
    pruner = RewindPruner(model, 0.8, rewind=rewind, end=5, rounds=2, optimizer=optimizer, only=["3", "7"])
    early = {name: value.clone() for name, value in model.state_dict().items()}
    momentum: list[torch.Tensor] = []
    rounds = 0
    while not pruner.done:
        if pruner.training_step == rewind and rounds == 0:
            early = {name: value.clone() for name, value in model.state_dict().items()}
            momentum = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        went_back = train_step(model, optimizer, pruner, batch(pruner.training_step))
        if went_back:
            rounds += 1
            assert pruner.training_step == rewind
            for name, value in model.state_dict().items():
                mask = pruner.masks.get(name.removesuffix(".weight")) if name.endswith("weight") else None
                expected = early[name] if mask is None else early[name] * mask
                assert torch.equal(value, expected)
            assert [s["momentum_buffer"].tolist() for s in optimizer.state.values()] == [m.tolist() for m in momentum]
            del trained
    assert rounds == 2
    for layer in pruner.record().layers:
        assert layer.reason or layer.numel - layer.nnz == round(0.8 * layer.numel)


def test_every_round_masks_the_same_fraction_of_what_is_left() -> None:
    model = network()
    optimizer = optimizer_of(model)
    pruner = RewindPruner(model, 0.9, rewind=2, end=5, rounds=3, optimizer=optimizer, only=["3"])
    seen = run(model, pruner, optimizer)
    assert len(seen) == 2 + 4 * 3
    assert [step for step, _ in seen] == [1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4, 5]
    densities = [1 - sparsity for _, sparsity in seen]
    for index, exact in ((0, 1), (4, 0.1 ** (1 / 3)), (7, 0.1 ** (2 / 3)), (13, 0.1)):
        assert densities[index] == pytest.approx(exact, abs=1 / 576)


def test_the_smallest_trained_weights_are_masked() -> None:
    model = network()
    optimizer = optimizer_of(model)
    pruner = RewindPruner(model, 0.5, rewind=0, end=3, rounds=1, only=["3"])
    for step in range(2):
        train_step(model, optimizer, pruner, batch(step))
    before = model.get_parameter("3.weight").detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0  # the last step changes nothing
    assert train_step(model, optimizer, pruner, batch(2))
    mask = pruner.masks["3"]
    assert before.abs()[~mask].max() <= before.abs()[mask].min()


def test_starts_from_the_sparsity_there_is() -> None:
    model = network()
    prune(model, 0.5, only=["3"])
    dead = model.get_parameter("3.weight") == 0
    optimizer = optimizer_of(model)
    pruner = RewindPruner(model, 0.8, rewind=0, end=2, rounds=1, only=["3"])
    run(model, pruner, optimizer)
    assert pruner.sparsity == pytest.approx(0.8, abs=1 / 576)
    assert (model.get_parameter("3.weight")[dead] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewind": 5}, "rewind, end: got 5, 5"),
        ({"rewind": -1}, "rewind, end: got -1, 5"),
        ({"rounds": 0}, "rounds: got 0"),
        ({"sparsity": 1.0}, "sparsity: got 1.0"),
        ({"only": ["9"]}, "only: got '9', which matches no"),
        ({"pattern": "1:3"}, "multiple of 3"),
        ({"pattern": "filters"}, 'pattern: got "filters"'),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewindPruner(network(), **({"sparsity": 0.5, "rewind": 0, "end": 5, "rounds": 2} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize(("sparsity", "weights"), [(0.1, 15), (0.3, 35)])
def test_the_last_round_ends_at_the_exact_count(sparsity: float, weights: int) -> None:
    """Where half a weight decides, powers of a density would tip it."""
    model = nn.Linear(weights, 1)
    pruner = RewindPruner(model, sparsity, rewind=0, end=1, rounds=3, only=[""])
    while not pruner.done:
        pruner.step()
    assert int((model.weight == 0).sum()) == round(sparsity * weights)
