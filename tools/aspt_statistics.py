"""How skewed are the masks of trained layers?  What adaptive sparse tiling can gain from them, as tables in Markdown.

``ZEROSKIP_DATA=... python tools/aspt_statistics.py``: the 1x1 layers of a MobileNetV1 that was trained to 90% zeros and
the 3x3 filters of two ResNet-50s.  No GPU, no times: only counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zeroskip.core.env import data_folder
from zeroskip.pack.adaptive_panels import Ints, Order, Tiling, binomial_heavy, column_counts, deal, heavy_columns
from zeroskip.pack.csr import Csr

HEIGHTS, THRESHOLDS = (8, 16, 32, 64, 128), (2, 4, 8, 16)
CLUSTER = 4
"""Rows and input channels of a block of the clustered masks, as in the benchmarks."""


@dataclass(frozen=True)
class Matrix:
    """A mask ``[k, c, r, s]`` as a matrix of k rows."""

    name: str
    group: str
    mask: Tensor

    @cached_property
    def csr(self) -> Csr:
        return Csr.of(self.mask.flatten(1))

    @property
    def columns(self) -> int:
        return self.mask[0].numel()

    @property
    def lengths(self) -> Ints:
        return self.csr.row_offsets.diff().numpy()

    @property
    def density(self) -> float:
        return float(self.mask.float().mean())

    @property
    def clustered(self) -> Matrix:
        """Whole blocks of rows and input channels, as many nonzeros."""
        k, c, r, s = self.mask.shape
        blocks = torch.rand((-(-k // CLUSTER), -(-c // CLUSTER), r, s), generator=torch.Generator().manual_seed(1))
        scores = blocks.repeat_interleave(CLUSTER, 0).repeat_interleave(CLUSTER, 1)[:k, :c]
        keep = round(self.density * self.mask.numel())
        least = scores.flatten().kthvalue(self.mask.numel() - keep + 1).values
        return Matrix(self.name, self.group, scores >= least)

    def panels(self, height: int, order: Order) -> Ints:
        """Of each row."""
        return deal(self.lengths, Tiling(height, height, 1, 1, 0, order))[1]


@dataclass(frozen=True)
class Share:
    """Of one or several matrices: columns of all panels, how many are heavy; nonzeros, how many these hold."""

    columns: float
    heavy: float
    nonzeros: float
    held: float

    @staticmethod
    def of(matrix: Matrix, height: int, threshold: int, order: Order) -> Share:
        counts = column_counts(matrix.csr, matrix.columns, matrix.panels(height, order))
        heavy = heavy_columns(counts, threshold)
        return Share(counts.size, int(heavy.sum()), int(counts.sum()), int(counts[heavy].sum()))

    @staticmethod
    def expected(matrix: Matrix, height: int, threshold: int) -> Share:
        """Of a random mask."""
        columns, nonzeros = matrix.mask.numel() / height, float(matrix.mask.sum())
        share, held = binomial_heavy(height, matrix.density, threshold)
        return Share(columns, share * columns, nonzeros, held * nonzeros)

    @staticmethod
    def sum(shares: Iterable[Share]) -> Share:
        found = list(shares)
        return Share(
            *(sum(getattr(share, name) for share in found) for name in ("columns", "heavy", "nonzeros", "held"))
        )

    @property
    def percent(self) -> str:
        return f"{self.heavy / self.columns:.0%}, {self.held / self.nonzeros:.0%}"

    @property
    def loads(self) -> float:
        """Rows of x that come from L2 for each nonzero, if L1 keeps none: a heavy column comes once a panel."""
        return (self.heavy + self.nonzeros - self.held) / self.nonzeros


def matrices(folder: Path) -> list[Matrix]:
    """The trained layers in ``folder``."""
    found = []
    with np.load(folder / "mobilenet_v1_sparse90.npz") as data:
        for block in range(12):
            mask = torch.from_numpy(data[f"blocks.{block}.pointwise.weight"] != 0)
            found.append(Matrix(f"pointwise {block}", "MobileNetV1 1x1", mask))
    with np.load(folder / "resnet50_3x3_sparse.npz") as data:
        for label, zeros in (("sparse90", "91%"), ("sparse95", "96%")):
            for stage in (1, 2, 3):
                mask = torch.from_numpy(data[f"{label}.stage{stage}.weight"] != 0)
                found.append(Matrix(f"stage {stage}, {zeros}", f"ResNet-50 3x3, {zeros}", mask))
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print(f"| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def pooled(group: Sequence[Matrix]) -> Iterable[list[str]]:
    """Every height and threshold, all layers together."""
    for height in HEIGHTS:
        fitting = [matrix for matrix in group if height <= matrix.mask.shape[0]]
        clustered = [matrix.clustered for matrix in fitting]
        for threshold in (one for one in THRESHOLDS if one <= height // 2):
            shares = [
                Share.sum(Share.of(matrix, height, threshold, "given") for matrix in fitting),
                Share.sum(Share.expected(matrix, height, threshold) for matrix in fitting),
                Share.sum(Share.of(matrix, height, threshold, "given") for matrix in clustered),
            ]
            every = shares[0].columns / shares[0].nonzeros
            loads = [f"{share.loads:.2f}" for share in shares]
            yield [f"{height}, {threshold}", *(share.percent for share in shares), *loads, f"{every:.2f}"]


def orders(matrix: Matrix) -> list[str]:
    """Balance, and what dealing the rows does to clusters."""
    lengths, height = matrix.lengths, 32
    row = [
        "x".join(map(str, (matrix.mask.shape[0], matrix.columns))),
        f"{1 - matrix.density:.1%}",
        f"{lengths.max() / lengths.mean():.2f}",
    ]
    for order in ("given", "dealt"):
        work = np.bincount(matrix.panels(height, order), lengths)
        row.append(f"{work.max() / work.mean():.2f}")
    longest = int(1.5 * lengths.mean())
    places, _, _ = deal(lengths, Tiling(height, height, 1, 1, longest))
    row.append(f"{places.sum() / len(lengths) - 1:.0%}")
    for one, order in ((matrix, "given"), (matrix, "dealt"), (matrix.clustered, "given"), (matrix.clustered, "dealt")):
        row.append(Share.of(one, height, 4, order).percent)  # type: ignore[arg-type]
    return [matrix.name, *row, Share.expected(matrix, height, 4).percent]


def main() -> int:
    """Print the tables; the exit code."""
    try:
        found = matrices(data_folder())
    except FileNotFoundError as error:
        print(f"{error}: set ZEROSKIP_DATA to the folder of the trained weights", file=sys.stderr)
        return 1
    print("Pairs are: share of the columns that are heavy in a panel, share of the nonzeros that these hold.\n")
    for group in dict.fromkeys(matrix.group for matrix in found):
        print(f"{group}: panel height and threshold; loads of a row of x from L2 for each nonzero\n")
        loads = [f"loads, {kind}" for kind in ("trained", "random", "clustered", "every column")]
        head = ["height, threshold", "trained", "random", "clustered", *loads]
        table(head, pooled([matrix for matrix in found if matrix.group == group]))
    print("Panels of 32 rows, threshold 4; places: what rows divided at 1.5 times the mean take more\n")
    balance = ["longest row / mean", "heaviest panel / mean, given", "dealt", "places"]
    shares = ["given", "dealt", "clustered, given", "clustered, dealt", "random"]
    table(["layer", "size", "zeros", *balance, *shares], map(orders, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
