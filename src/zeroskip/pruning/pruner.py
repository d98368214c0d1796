"""What pruning while training has in common: masks that hold."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .config import PruneConfig
from .layers import choose_layers
from .masks import FILTERS, select
from .record import PruneRecord, record_layers


class Pruner(ABC):
    """Keeps masked weights at zero while `model` trains; subclasses decide when the masks change.

    Sparsity starts at what the network has now, zero weights being counted as pruned (so load its weights
    first), and never falls: a pruned weight stays zero, whatever momentum the optimizer keeps for it.

    Masks depend on the weights, and with some scores on their gradients, without randomness. Under
    DistributedDataParallel (torchrun) every rank holds the same of both, so each runs its own pruner and all agree
    without communication. What that takes: wrap the network first, which gives all ranks the weights of rank 0,
    then build the pruner on the inner network (`ddp.module`, whose names `skip` and `only` match); the same
    arguments and calls on every rank. `check_ranks` raises where they differ all the same.
    """

    def __init__(self, model: nn.Module, config: PruneConfig, example: Tensor | None) -> None:
        if config.pattern == FILTERS:
            raise ValueError(
                'pattern: got "filters", expected "unstructured" or "N:M", since removed filters leave nothing to '
                'mask; call prune(model, ..., pattern="filters") and train the smaller network'
            )
        self.config = config
        self._step = 0
        self._layers = choose_layers(model, config.skip, config.only)
        self._pruned = {layer.name: layer for layer in self._layers if layer.reason is None}
        self._masks = {name: layer.weight.detach() != 0 for name, layer in self._pruned.items()}
        # A network sparser than the goal stays as it is.
        self._initial = min(self.sparsity, config.final_sparsity)
        self._select(config.final_sparsity)  # raises now, not hours into training, what `select` has to object to
        if config.permute:
            from .permute import permute_channels

            permute_channels(model, example, config)
            self._masks = {name: layer.weight.detach() != 0 for name, layer in self._pruned.items()}

    @property
    def sparsity(self) -> float:
        """Fraction of the pruned layers' weights that is masked now."""
        kept = sum(int(mask.count_nonzero()) for mask in self._masks.values())
        return 1 - kept / max(sum(mask.numel() for mask in self._masks.values()), 1)

    @property
    def training_step(self) -> int:
        """Where the training is: the calls of `step` so far; after rewinding, the step that it goes on from."""
        return self._step

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by layer name, True where a weight stays; not to be changed."""
        return dict(self._masks)

    @property
    def schedule(self) -> tuple[str, str, int]:
        """Configuration, schedule and step, equal for pruners that will do the same to equal weights."""
        return self.config.to_json(), self._schedule_key(), self._step

    def record(self) -> PruneRecord:
        """The network's layers as they are now."""
        return record_layers(self._layers, self.config.pattern)

    def state_dict(self) -> dict[str, Any]:
        """What training needs to resume, for `torch.save` and `save_checkpoint`."""
        return {
            "config": self.config.to_json(),
            "schedule": self._schedule_key(),
            "step": self._step,
            "initial_sparsity": self._initial,
            "masks": self.masks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict` of a pruner built with the same arguments; load the network itself too.

        Raises ValueError where the masks are not for this network's pruned layers, or the configuration or the
        schedule is another. The pruner is then unchanged.
        """
        got = {name: tuple(mask.shape) for name, mask in state["masks"].items()}
        expected = {name: tuple(mask.shape) for name, mask in self._masks.items()}
        for what, has, wants in (
            ("masks", got, expected),
            ("config", PruneConfig.from_json(state["config"]).to_json(), self.config.to_json()),
            ("schedule", state["schedule"], self._schedule_key()),
        ):
            if has != wants:
                raise ValueError(
                    f"{what}: got {has}, expected {wants}; load the state of a pruner that was built with the same "
                    "arguments"
                )
        self._step, self._initial = state["step"], state["initial_sparsity"]
        self._masks = {name: mask.to(self._masks[name].device) for name, mask in state["masks"].items()}

    @abstractmethod
    def step(self) -> bool:
        """Set masked weights to zero, after choosing new masks where due; call after `optimizer.step()`.

        True if the masks were chosen anew.
        """

    @abstractmethod
    def _schedule_key(self) -> str:
        """The schedule in words, equal for equal schedules."""

    def _score(self, name: str, weight: Tensor) -> Tensor:
        """Of each weight of the layer `name`, 0 or more; the lowest go first."""
        return weight.abs()

    @torch.no_grad()
    def _apply(self) -> None:
        for name, layer in self._pruned.items():
            layer.weight.masked_fill_(~self._masks[name], 0)

    @torch.no_grad()
    def _select(self, sparsity: float) -> dict[str, Tensor]:
        # Score -1, under any other: what is masked already goes first, so it is never chosen to stay
        # in place of a live weight that happens to be zero.
        scores = [
            self._score(name, layer.weight).masked_fill(~self._masks[name], -1) for name, layer in self._pruned.items()
        ]
        masks = select(list(self._pruned), scores, self.config.pattern, sparsity, self.config.scope)
        return {name: mask & self._masks[name] for name, mask in zip(self._pruned, masks, strict=True)}
