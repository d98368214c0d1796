"""Iterative magnitude pruning: train, prune, go back to early weights, train again."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import PruneConfig
from .masks import Scope
from .pruner import Pruner


class RewindPruner(Pruner):
    """Finds a sparse network by training it several times from the same early weights.

    ::

        pruner = RewindPruner(model, 0.9, rewind=500, end=10_000, rounds=5, optimizer=optimizer)
        while not pruner.done:
            set_learning_rate(optimizer, pruner.training_step)
            ...
            optimizer.step()
            pruner.step()

    The first training goes from step 0 to `end`, dense. After it, and after each of the next, the smallest trained
    weights are masked, everything else goes back to what it was at step `rewind`, and training goes on from there
    to `end` again. After `rounds` of that the masks have the final sparsity; every round masks the same fraction
    of the weights that are left. In all: rewind + (rounds + 1) * (end - rewind) calls of `step`.

    Back go parameters, buffers (batch norm's statistics) and, where it is given, the optimizer's state with its
    learning rates; take further schedules from `training_step`, which goes back too. A pruned weight stays zero;
    see `Pruner` for that and for DistributedDataParallel.

    Args:
        model: the network, on its device.
        sparsity: final sparsity, in [0, 1), or a `PruneConfig`. Ignored for pattern "N:M", whose groups lose
            weights by rounds.
        rewind: the step whose weights are gone back to; 0 for those that the network has now.
        end: the last step of each training.
        rounds: how often weights are masked.
        optimizer: one whose state goes back, too.
        pattern, scope, skip, only, permute, example: as for `GradualPruner`.

    Raises:
        ValueError: as for `GradualPruner`, and unless 0 <= rewind < end and rounds >= 1.

    Source: Frankle & Carbin 2019, "The Lottery Ticket Hypothesis" (arXiv 1803.03635); Frankle et al. 2020, "Linear
    Mode Connectivity and the Lottery Ticket Hypothesis" (arXiv 1912.05671), for rewinding to a step after 0.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | PruneConfig | None,
        *,
        rewind: int,
        end: int,
        rounds: int,
        optimizer: torch.optim.Optimizer | None = None,
        pattern: str = "unstructured",
        scope: Scope = "layer",
        skip: Sequence[str] | None = None,
        only: Sequence[str] | None = None,
        permute: bool = False,
        example: Tensor | None = None,
    ) -> None:
        if not 0 <= rewind < end:
            raise ValueError(f"rewind, end: got {rewind}, {end}, expected 0 <= rewind < end; swap or raise them")
        if rounds < 1:
            raise ValueError(f"rounds: got {rounds}, expected at least 1; 5 is a common choice for 90%")
        self._rewind, self._end, self._rounds = rewind, end, rounds
        self._model, self._optimizer = model, optimizer
        self._round = 0
        config = PruneConfig.of(sparsity, pattern, scope, skip, only, permute)
        config.need_magnitude("RewindPruner")
        super().__init__(model, config, example)
        self._kept = self._snapshot() if rewind == 0 else None

    @property
    def done(self) -> bool:
        """Whether the last training has reached its end."""
        return self._round == self._rounds and self._step >= self._end

    def step(self) -> bool:
        """Set masked weights to zero; at the end of a training, mask more and go back; True if it did.

        Call after `optimizer.step()`.
        """
        self._step += 1
        self._apply()
        if self._step == self._rewind and self._round == 0:
            self._kept = self._snapshot()
        if self._step < self._end or self._round == self._rounds:
            return False
        self._round += 1
        final = self.config.final_sparsity
        kept = (1 - final) / (1 - self._initial)
        # The last is `final` itself: rounding must not change the count of weights.
        last = self._round == self._rounds
        self._masks = self._select(final if last else 1 - (1 - self._initial) * kept ** (self._round / self._rounds))
        self._go_back()
        return True

    def state_dict(self) -> dict[str, Any]:
        """What training needs to resume, the weights to go back to among it."""
        return super().state_dict() | {"round": self._round, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._round, self._kept = state["round"], copy.deepcopy(state["kept"])

    def _schedule_key(self) -> str:
        with_optimizer = "" if self._optimizer is None else f", optimizer={type(self._optimizer).__name__}"
        return f"RewindPruner(rewind={self._rewind}, end={self._end}, rounds={self._rounds}{with_optimizer})"

    def _snapshot(self) -> dict[str, Any]:
        optimizer = None if self._optimizer is None else self._optimizer.state_dict()
        return copy.deepcopy({"model": dict(self._model.state_dict()), "optimizer": optimizer})

    def _go_back(self) -> None:
        assert self._kept is not None
        self._model.load_state_dict(self._kept["model"])
        if self._optimizer is not None:
            # A copy: the optimizer goes on with the tensors that it is given.
            self._optimizer.load_state_dict(copy.deepcopy(self._kept["optimizer"]))
        self._apply()
        self._step = self._rewind
