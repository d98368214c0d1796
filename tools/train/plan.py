"""Which networks are trained, and what is done to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from zeroskip.pruning import PruneConfig

PARENT = "parent"
SEEDS = (0, 1, 2)
SECONDS_PER_EPOCH = {"resnet18": 0.7, "vgg19_bn": 1.3}
"""For 8,500 photographs of 112x112, on an H200 with six or seven trainings side by side; the log has the true ones."""


@dataclass(frozen=True)
class Settings:
    """What a result depends on besides network, row and seed.

    The parent trains for `parent_epochs`, every other row goes on from it for `epochs`, the dense one too. Each is one
    cycle: the learning rate rises to `peak` and falls to zero along a cosine, sparsity rises meanwhile, in the part
    `ramp` of the steps. With 18 epochs and a ramp to 0.55, eight epochs were left to the final masks, and ResNet-18 at
    90% stayed 1.4 points behind its dense opponent (three seeds, H200).
    """

    parent_epochs: int = 24
    epochs: int = 24
    batch: int = 128
    peak: float = 0.05
    warmup: float = 0.05
    ramp: tuple[float, float] = (0.02, 0.45)
    mask_updates: int = 100
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    photos: int | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table: one treatment, trained once for each seed."""

    name: str
    config: PruneConfig
    seeds: tuple[int, ...] = (0,)

    @property
    def filters(self) -> bool:
        return self.config.pattern == "filters"

    @property
    def masks(self) -> bool:
        return not self.filters and self.config.final_sparsity > 0


def _kept(size: float) -> float:
    """The sparsity of filters that leaves `size` of the weights: a layer loses outputs and inputs."""
    return 1 - math.sqrt(size)


DENSE = PruneConfig(0.0)
ROWS = (
    Row(PARENT, DENSE, SEEDS),
    Row("dense", DENSE, SEEDS),
    Row("unstructured-90", PruneConfig(0.9), SEEDS),
    Row("unstructured-95", PruneConfig(0.95), SEEDS),
    Row("unstructured-90-fisher", PruneConfig(0.9, score="fisher"), SEEDS),
    Row("unstructured-95-fisher", PruneConfig(0.95, score="fisher"), SEEDS),
    Row("2of4", PruneConfig(None, "2:4"), SEEDS),
    Row("unstructured-70", PruneConfig(0.7)),
    Row("unstructured-80", PruneConfig(0.8)),
    Row("unstructured-98", PruneConfig(0.98)),
    Row("unstructured-98-fisher", PruneConfig(0.98, score="fisher")),
    Row("2of4-permuted", PruneConfig(None, "2:4", permute=True)),
    Row("filters-half", PruneConfig(_kept(1 / 2), "filters")),
    Row("filters-eighth", PruneConfig(_kept(1 / 8), "filters")),
)


@dataclass(frozen=True)
class Job:
    """One training."""

    network: str
    row: Row
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.network, self.row.name, self.seed

    @property
    def name(self) -> str:
        return f"{self.network}-{self.row.name}-s{self.seed}"

    @property
    def parent(self) -> Job | None:
        """What it goes on from."""
        return None if self.row.name == PARENT else Job(self.network, ROWS[0], self.seed)

    def epochs(self, settings: Settings) -> int:
        return settings.parent_epochs if self.parent is None else settings.epochs

    def expected_seconds(self, settings: Settings) -> float:
        return self.epochs(settings) * SECONDS_PER_EPOCH[self.network]


def jobs(networks: tuple[str, ...], seeds: tuple[int, ...]) -> Iterator[Job]:
    """In the order of work: every parent before what goes on from it, one network and seed after the other."""
    for network in networks:
        for seed in seeds:
            yield from (Job(network, row, seed) for row in ROWS if seed in row.seeds)
