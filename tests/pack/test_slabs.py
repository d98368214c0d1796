"""Chunks of rows and slabs of columns: exact, complete, and readable as the kernel reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contract.cases import sparse_weight, stable
from zeroskip.pack.csr import Csr
from zeroskip.pack.slabs import Slabs


def packed(weight: Tensor, positions: int, blocks: int, slab: int, pitch: int = 128) -> Slabs:
    bias = torch.arange(weight.shape[0], dtype=torch.float32) + 0.5
    return Slabs.of(Csr.of(weight), weight.shape[1], bias, positions, blocks, slab, pitch)


def walked(slabs: Slabs, x: Tensor) -> Tensor:
    """``W x + bias`` computed the way the kernel walks the chunks, with its row of zeros behind every slab."""
    y = torch.full((slabs.shape[0], x.shape[1]), torch.nan, dtype=torch.float64)
    header = (slabs.positions + 1 + 3) // 4 * 4
    chunks, heads = slabs.chunks.numpy(), slabs.heads.numpy()
    for block in range(slabs.blocks):
        for position in range(slabs.positions):
            row, bias = heads[block, position, 0], heads[block, position, 1:].view(np.float32)[0]
            total = torch.full((x.shape[1],), float(bias) if row >= 0 else 0.0, dtype=torch.float64)
            for slab in range(slabs.slabs):
                tile = torch.zeros(slabs.slab + 1, x.shape[1], dtype=torch.float64)
                part = x[slab * slabs.slab : (slab + 1) * slabs.slab]
                tile[: len(part)] = part
                begin, end = chunks[block, slab, position : position + 2]
                for at in range(header + 4 * begin, header + 4 * end, 2):
                    weight = chunks[block, slab, at : at + 1].view(np.float32)[0]
                    place = chunks[block, slab, at + 1]
                    assert place % slabs.pitch == 0
                    total = total + float(weight) * tile[place // slabs.pitch]
            if row >= 0:
                assert y[row].isnan().all(), "a row is computed once"
                y[row] = total
    return y


@given(st.data())
@stable(60)
def test_packing_is_exact_and_the_walk_computes_the_product(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    rows, columns, positions, slab = draw(1, 40), draw(1, 50), draw(1, 17), draw(1, 60)
    blocks = -(-rows // positions) + draw(0, 2)
    weight = sparse_weight((rows, columns), data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.1])), draw(0, 99))
    slabs = packed(weight, positions, blocks, slab)
    assert torch.equal(slabs.dense(), weight)
    x = torch.randn(columns, 3, dtype=torch.float64)
    want = weight.double() @ x + torch.arange(rows)[:, None] + 0.5
    assert torch.allclose(walked(slabs, x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e-45, -3.4e38])
def test_odd_values_survive(value: float) -> None:
    weight = torch.zeros(5, 9)
    weight[3, 8] = value
    assert torch.equal(packed(weight, 4, 2, 4).dense().nan_to_num(nan=7.0), weight.nan_to_num(nan=7.0))


def test_chunks_are_whole_vectors_and_equally_long() -> None:
    slabs = packed(sparse_weight((50, 70), 0.2), 16, 4, 32)
    assert slabs.chunks.shape[:2] == (4, 3)
    assert slabs.chunk_bytes % 16 == 0
    assert slabs.heads.shape == (4, 16, 2)


def test_long_rows_are_dealt_to_all_blocks_and_stand_together() -> None:
    weight = torch.zeros(64, 64)
    for row in range(64):
        weight[row, : row + 1] = 1.0
    slabs = packed(weight, 16, 4, 64)
    lengths = [[int((weight[row] != 0).sum()) for row in block[:, 0].tolist()] for block in slabs.heads]
    assert all(block == sorted(block, reverse=True) for block in lengths)
    assert max(map(sum, lengths)) - min(map(sum, lengths)) <= 4


def test_more_rows_than_places_is_an_error() -> None:
    with pytest.raises(ValueError, match="9 rows do not fit 2 blocks of 4"):
        packed(torch.ones(9, 3), 4, 2, 3)
