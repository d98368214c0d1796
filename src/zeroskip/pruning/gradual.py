"""Pruning while training."""

from collections.abc import Sequence

from torch import Tensor, nn

from .config import PruneConfig
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
    ) -> None:
        self._schedule = CubicSchedule(begin, end, every)
        super().__init__(model, PruneConfig.of(sparsity, pattern, scope, skip, only, permute), example)

    def step(self) -> bool:
        """Set masked weights to zero, after choosing new masks where due. Call after `optimizer.step()`.

        True if the masks were chosen anew.
        """
        self._step += 1
        due = self._schedule.due(self._step)
        if due:
            final = self.config.final_sparsity
            self._masks = self._select(self._schedule.sparsity(self._step, self._initial, final))
        self._apply()
        return due

    def _schedule_key(self) -> str:
        return repr(self._schedule)
