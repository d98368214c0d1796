"""Pruning on a GPU, where sums come in any order: an interruption changes neither the schedule nor the densities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pruning.training import KINDS, batch, network, optimizer_of, pruner_of, train_step
from zeroskip.pruning import Pruner, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.gpu

STEPS, STOP = 12, 6


def densities(pruner: Pruner) -> list[float]:
    return [layer.density for layer in pruner.record().layers]


def tensors(state: object) -> list[torch.Tensor]:
    """All of a state, in its order."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_has_the_same_schedule_and_densities(kind: str, tmp_path: Path) -> None:
    def start() -> tuple[torch.nn.Module, torch.optim.Optimizer, Pruner]:
        model = network().cuda()
        optimizer = optimizer_of(model)
        return model, optimizer, pruner_of(kind, model, optimizer)

    def train(
        model: torch.nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, steps: range
    ) -> list[list[float]]:
        found = []
        for step in steps:
            x, y = batch(step)
            train_step(model, optimizer, pruner, (x.cuda(), y.cuda()))
            found.append(densities(pruner))
        return found

    whole = start()
    want = train(*whole, range(1, STEPS + 1))
    model, optimizer, pruner = start()
    got = train(model, optimizer, pruner, range(1, STOP + 1))
    save_checkpoint(tmp_path / "c.pt", STOP, model=model, optimizer=optimizer, pruner=pruner)
    saved = tensors(pruner.state_dict())
    model, optimizer, pruner = start()
    assert load_checkpoint(tmp_path / "c.pt", model=model, optimizer=optimizer, pruner=pruner) == STOP
    assert all(parameter.is_cuda for parameter in model.parameters())
    loaded = tensors(pruner.state_dict())
    assert len(loaded) == len(saved)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(loaded, saved, strict=True))
    got += train(model, optimizer, pruner, range(STOP + 1, STEPS + 1))
    assert got == want
    assert pruner.schedule == whole[2].schedule
