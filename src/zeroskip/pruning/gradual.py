"""Pruning while training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import PruneConfig
from .fisher import GRADIENTS, Fisher, Score
from .masks import Scope
from .pruner import Pruner
from .schedule import CubicSchedule


class GradualPruner(Pruner):
    """Raises a network's sparsity along a cubic schedule while it trains.

    ::

        pruner = GradualPruner(model, 0.9, begin=1_000, end=10_000, every=100)
        for batch in batches:
            ...
            optimizer.step()
            pruner.step()

    A pruned weight stays zero; see `Pruner` for that and for DistributedDataParallel.

    Args:
        model: the network, on its device.
        sparsity: final sparsity of every pruned layer (of all together, with scope "global" and "erk"), in
            [0, 1), or a `PruneConfig`. Ignored for pattern "N:M", whose groups lose one weight after another.
        begin, end, every: the masks change at step `begin`, every `every` steps after it, and at `end`
            for the last time; counted in calls of `step`, the first being 1.
        pattern, scope, skip, only, permute, example: as for `zeroskip.pruning.prune`, except that there is no
            pattern "filters". Channels are permuted here and now.
        score: "magnitude": the smallest weights go. "fisher": those without which the loss grows least, as the
            gradients of the last steps tell (see `zeroskip.pruning.fisher` and docs/PRUNING.md for what it gains). They
            are read from the weights' `grad` in `step`, so call `optimizer.zero_grad()` after it or before the next
            backward pass. Until the last change of masks they take 132 bytes for each weight that is left, in
            checkpoints 128; on a CPU a change takes seconds for each million weights. torch's SGD with nesterov and
            without weight decay adds its momentum to the gradients where it takes all tensors at once: foreach=False.

    Raises:
        ValueError: as for `prune`, and unless 0 <= begin < end and every >= 1.

    Source: Zhu & Gupta 2017, "To prune, or not to prune" (arXiv 1710.01878).
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | PruneConfig | None,
        *,
        begin: int,
        end: int,
        every: int,
        pattern: str = "unstructured",
        scope: Scope = "layer",
        skip: Sequence[str] | None = None,
        only: Sequence[str] | None = None,
        permute: bool = False,
        example: Tensor | None = None,
        score: Score = "magnitude",
    ) -> None:
        self._schedule = CubicSchedule(begin, end, every)
        self._fisher: dict[str, Fisher] = {}
        super().__init__(model, PruneConfig.of(sparsity, pattern, scope, skip, only, permute, score), example)
        if self.config.score == "fisher":
            for name, layer in self._pruned.items():
                if not layer.weight.requires_grad:
                    raise ValueError(
                        f"layer {name!r}: got a weight that does not train, expected gradients for the score; "
                        f"skip=[{name!r}] leaves it alone"
                    )
            self._fisher = {name: Fisher(mask) for name, mask in self._masks.items()}

    def step(self) -> bool:
        """Set masked weights to zero, after choosing new masks where due. Call after `optimizer.step()`.

        True if the masks were chosen anew.

        Raises ValueError where they are due by gradients, and a layer had none, or all layers had zeros.
        """
        self._step += 1
        self._see()
        due = self._schedule.due(self._step)
        if due:
            final = self.config.final_sparsity
            self._masks = self._select(self._schedule.sparsity(self._step, self._initial, final))
            for name, fisher in self._fisher.items():
                fisher.keep(self._masks[name])
        if self._step >= self._schedule.end:
            self._fisher.clear()
        self._apply()
        return due

    def state_dict(self) -> dict[str, Any]:
        """What training needs to resume; with score "fisher" the last gradients among it."""
        gradients = {name: fisher.gradients() for name, fisher in self._fisher.items()}
        return super().state_dict() | {"gradients": gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._fisher = {name: Fisher(self._masks[name], seen) for name, seen in state.get("gradients", {}).items()}

    def _see(self) -> None:
        """Remember this step's gradients, if the masks change soon and depend on them."""
        if not self._fisher:
            return
        if not any(self._schedule.due(self._step + ahead) for ahead in range(GRADIENTS)):
            for fisher in self._fisher.values():
                fisher.forget()
            return
        found = {name: self._pruned[name].weight.grad for name in self._fisher}
        gradients = {name: gradient for name, gradient in found.items() if gradient is not None}
        finite = [gradient.isfinite().all() for gradient in gradients.values()]
        if finite:
            # A gradient scaler skips a step that overflowed in any layer, and may leave all gradients scaled.
            counts = torch.stack([one.to(finite[0].device) for one in finite]).all()
            for name, gradient in gradients.items():
                self._fisher[name].see(gradient, counts)
        if self._schedule.due(self._step) and not any(self._fisher.values()):
            raise ValueError(
                f"gradients: got none but zeros by step {self._step}, expected those of the loss; call step() after "
                "optimizer.step() and before zero_grad()"
            )

    def _score(self, name: str, weight: Tensor) -> Tensor:
        if name not in self._fisher:
            return super()._score(name, weight)
        if not len(self._fisher[name]):
            raise ValueError(
                f"layer {name!r}: got no gradient by step {self._step}, expected one of each step; leave a layer that "
                f"does not train alone: skip=[{name!r}]"
            )
        return self._fisher[name].score(weight)

    def _schedule_key(self) -> str:
        return repr(self._schedule)
