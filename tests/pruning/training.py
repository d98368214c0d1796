"""A tiny training that every kind of pruner fits into: data depend on the step alone, dropout on torch's seed."""

import torch
from torch import Tensor, nn

from zeroskip.pruning import GradualPruner, Pruner, RewindPruner

KINDS = (
    "gradual",
    "gradual erk",
    "gradual 2:4",
    "gradual fisher",
    "gradual fisher 2:4",
    "rewind",
    "rewind 0",
    "rewind 2:4",
)


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(width * 4, 3),
    )  # fmt: skip


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def pruner_of(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Pruner:
    layers = ["3", "7"]
    if kind.startswith("gradual"):
        pattern = "2:4" if "2:4" in kind else "unstructured"
        scope = "erk" if "erk" in kind else "layer"
        score = "fisher" if "fisher" in kind else "magnitude"
        return GradualPruner(
            model, 0.8, begin=2, end=9, every=2, pattern=pattern, scope=scope, score=score, only=layers  # type: ignore[arg-type]
        )  # fmt: skip
    pattern, rewind = ("2:4" if "2:4" in kind else "unstructured"), (0 if kind == "rewind 0" else 2)
    return RewindPruner(
        model, 0.8, rewind=rewind, end=5, rounds=2, pattern=pattern, only=layers, optimizer=optimizer
    )  # fmt: skip


def batch(step: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 4, 6, 6, generator=generator), torch.randn(size, 3, generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, data: tuple[Tensor, Tensor]) -> bool:
    loss = (model(data[0]) - data[1]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return pruner.step()
