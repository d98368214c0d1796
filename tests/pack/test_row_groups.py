"""Groups of rows: exact, complete, balanced as they say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contract.cases import sparse_weight, stable
from zeroskip.pack.csr import Csr
from zeroskip.pack.row_groups import Balance, RowGroups

KINDS: tuple[Balance, ...] = ("ranges", "nonzeros", "columns")


def grouped(weight: Tensor, groups: int, height: int, parts: int, balance: Balance) -> RowGroups:
    return RowGroups.of(Csr.of(weight), weight.shape[1], groups, height, parts, balance)


def lengths(packed: RowGroups) -> list[int]:
    """Nonzeros of each group."""
    return packed.bounds[:: packed.parts].diff().tolist()


def distinct(packed: RowGroups) -> int:
    """Columns of all groups together."""
    starts = packed.bounds[:: packed.parts].tolist()
    return sum(len(packed.columns[low:high].unique()) for low, high in pairwise(starts))


@given(data=st.data())
@stable(60)
def test_packing_is_exact_and_in_order(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30))
    height, parts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 7))
    groups = -(-rows // height) + data.draw(st.integers(0, 3))
    weight = sparse_weight((rows, columns), data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), rows + columns)
    packed = grouped(weight, groups, height, parts, data.draw(st.sampled_from(KINDS)))
    assert torch.equal(packed.dense(), weight)
    present = packed.rows[packed.rows >= 0]
    assert sorted(present.tolist()) == list(range(rows))
    assert packed.rows.shape == (groups, height)
    for group in packed.rows.tolist():
        real = [row for row in group if row >= 0]
        assert group == [*sorted(real), *[-1] * (height - len(real))]
    assert len(packed.bounds) == groups * parts + 1
    for index in range(groups):
        ends = packed.bounds[index * parts : (index + 1) * parts + 1]
        order = packed.columns[ends[0] : ends[-1]].long() * height + packed.places[ends[0] : ends[-1]]
        assert bool((order.diff() > 0).all())
        assert int(ends.diff().max()) - int(ends.diff().min()) <= 1


def test_dealt_groups_are_equally_long() -> None:
    weight = sparse_weight((96, 200), 0.2) * (torch.rand(96, 1, generator=torch.Generator().manual_seed(1)) < 0.7)
    dealt, ranges = (lengths(grouped(weight, 12, 8, 1, kind)) for kind in ("nonzeros", "ranges"))
    assert max(dealt) < 1.1 * np.mean(dealt)
    assert max(ranges) > 1.2 * np.mean(ranges)


def test_ranges_are_cut_where_the_nonzeros_say() -> None:
    weight = torch.zeros(12, 30)
    weight[:3] = 1
    weight[3:, :2] = 1
    packed = grouped(weight, 4, 9, 1, "ranges")
    assert packed.rows[:, :3].tolist() == [[0, -1, -1], [1, -1, -1], [2, -1, -1], [3, 4, 5]]


def test_rows_that_share_columns_come_together() -> None:
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 4, (64,), generator=generator)
    there = torch.arange(80).reshape(4, 20)
    weight = torch.zeros(64, 80)
    for row in range(64):
        weight[row, there[kind[row]]] = (torch.rand(20, generator=generator) < 0.5).float()
    alike, dealt = (grouped(weight, 4, 24, 1, name) for name in ("columns", "nonzeros"))
    assert distinct(alike) < 0.7 * distinct(dealt)
    assert max(lengths(alike)) < 1.3 * np.mean(lengths(alike))


def test_random_rows_gain_a_little_too() -> None:
    weight = sparse_weight((128, 256), 0.1)
    alike, dealt = (grouped(weight, 16, 8, 1, name) for name in ("columns", "nonzeros"))
    assert distinct(alike) < 0.95 * distinct(dealt)
    assert max(lengths(alike)) < 1.2 * np.mean(lengths(alike))


def test_more_rows_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="9 rows do not fit 2 groups of 4"):
        grouped(torch.ones(9, 3), 2, 4, 1, "ranges")
