"""Pruning while training."""

from collections.abc import Sequence
from typing import Any

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
            gradients of the last steps tell (see `zeroskip.pruning.fisher`), better at 95% zeros and more. They are
            read from the weights' `grad` in `step`, so call `optimizer.zero_grad()` after it or before the next
            backward pass. Until the last change of masks they take 128 bytes for each weight that is left, in
            checkpoints too, and each change takes some seconds for ten million weights on a GPU.

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
            self._fisher = {name: Fisher(mask) for name, mask in self._masks.items()}

    def step(self) -> bool:
        """Set masked weights to zero, after choosing new masks where due. Call after `optimizer.step()`.

        True if the masks were chosen anew.

        Raises ValueError where they are due by gradients, and a layer had none.
        """
        self._step += 1
        if any(self._schedule.due(self._step + ahead) for ahead in range(GRADIENTS)):
            for name, fisher in self._fisher.items():
                if (gradient := self._pruned[name].weight.grad) is not None:
                    fisher.see(gradient)
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
        self._fisher = {name: Fisher(self._masks[name], seen) for name, seen in state["gradients"].items()}

    def _score(self, name: str, weight: Tensor) -> Tensor:
        if name not in self._fisher:
            return super()._score(name, weight)
        if not len(self._fisher[name]):
            raise ValueError(
                f"layer {name!r}: got no gradient by step {self._step}, expected one of each step; call step() after "
                f"optimizer.step() and before zero_grad(), and leave layers that do not train alone: skip=[{name!r}]"
            )
        return self._fisher[name].score(weight)

    def _schedule_key(self) -> str:
        return repr(self._schedule)
