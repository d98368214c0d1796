"""Pruning while training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .layers import choose_layers
from .masks import Scope, final_sparsity, select
from .record import PruneRecord, record_layers
from .schedule import CubicSchedule


class GradualPruner:
    """Raises a network's sparsity along a cubic schedule while it trains.

    ::

        pruner = GradualPruner(model, 0.9, begin=1_000, end=10_000, every=100)
        for batch in batches:
            ...
            optimizer.step()
            pruner.step()

    Sparsity starts at what the network has now, zero weights being counted as pruned (so load its weights
    first), and never falls: a pruned weight stays zero, whatever momentum the optimizer keeps for it.

    Masks depend on the weights alone, without randomness. Under DistributedDataParallel (torchrun) every
    rank holds the same weights, so each runs its own pruner and all agree without communication; pass
    the inner network (`ddp.module`) for the names in `skip` and `only` to match.

    Args:
        model: the network, on its device.
        sparsity: final sparsity of every pruned layer (of all together, with scope "global"), in
            [0, 1). Ignored for pattern "N:M", whose groups lose one weight after another.
        begin, end, every: the masks change at step `begin`, every `every` steps after it, and at `end`
            for the last time; counted in calls of `step`, the first being 1.
        pattern, scope, skip, only: as for `zeroskip.pruning.prune`.

    Raises:
        ValueError: as for `prune`, and unless 0 <= begin < end and every >= 1.

    Source: Zhu & Gupta 2017, "To prune, or not to prune" (arXiv 1710.01878).
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None,
        *,
        begin: int,
        end: int,
        every: int,
        pattern: str = "unstructured",
        scope: Scope = "layer",
        skip: Sequence[str] | None = None,
        only: Sequence[str] | None = None,
    ) -> None:
        self._final = final_sparsity(pattern, sparsity, scope)
        self._schedule = CubicSchedule(begin, end, every)
        self._pattern, self._scope = pattern, scope
        self._layers = choose_layers(model, skip, only)
        self._pruned = {layer.name: layer for layer in self._layers if layer.reason is None}
        self._masks = {name: layer.weight.detach() != 0 for name, layer in self._pruned.items()}
        # A network sparser than the goal stays as it is.
        self._initial = min(self.sparsity, self._final)
        self._step = 0
        self._select(self._final)  # raises now, not hours into training, what `select` has to object to

    @property
    def sparsity(self) -> float:
        """Fraction of the pruned layers' weights that is masked now."""
        kept = sum(int(mask.count_nonzero()) for mask in self._masks.values())
        return 1 - kept / sum(mask.numel() for mask in self._masks.values())

    @torch.no_grad()
    def step(self) -> None:
        """Set masked weights to zero, after choosing new masks where due. Call after `optimizer.step()`."""
        self._step += 1
        if self._schedule.due(self._step):
            self._masks = self._select(self._schedule.sparsity(self._step, self._initial, self._final))
        for name, layer in self._pruned.items():
            layer.weight.masked_fill_(~self._masks[name], 0)

    def record(self) -> PruneRecord:
        """The network's layers as they are now."""
        return record_layers(self._layers, self._pattern)

    def state_dict(self) -> dict[str, Any]:
        """What training needs to resume, for torch.save: step, initial sparsity and masks by layer name."""
        return {"step": self._step, "initial_sparsity": self._initial, "masks": dict(self._masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict` of a pruner built with the same arguments; load the network itself too.

        Raises ValueError where the masks are not for this network's pruned layers.
        """
        got = {name: tuple(mask.shape) for name, mask in state["masks"].items()}
        expected = {name: tuple(mask.shape) for name, mask in self._masks.items()}
        if got != expected:
            raise ValueError(
                f"masks: got {got}, expected {expected}; "
                "load the state of a pruner that was built with the same arguments"
            )
        self._step, self._initial = state["step"], state["initial_sparsity"]
        self._masks = {name: mask.to(self._masks[name].device) for name, mask in state["masks"].items()}

    @torch.no_grad()
    def _select(self, sparsity: float) -> dict[str, torch.Tensor]:
        # Score -1, under any magnitude: what is masked already goes first, so it is never chosen to stay
        # in place of a live weight that happens to be zero.
        scores = [layer.weight.abs().masked_fill(~self._masks[name], -1) for name, layer in self._pruned.items()]
        masks = select(list(self._pruned), scores, self._pattern, sparsity, self._scope)
        return {name: mask & self._masks[name] for name, mask in zip(self._pruned, masks, strict=True)}
