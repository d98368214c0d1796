"""CSR, stretched CSR and bitmask give back exactly what they were made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contract.cases import sparse_weight, stable
from zeroskip.pack.bitmask import Bitmask
from zeroskip.pack.csr import Csr
from zeroskip.pack.stretched import BLOCK_FIELDS, stretch, unstretch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
shapes = st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple)
densities = st.sampled_from([0.0, 0.03, 0.3, 0.9, 1.1])


@given(shape=shapes, density=densities, seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES))
@stable(80)
def test_csr_round_trip(shape: tuple[int, ...], density: float, seed: int, dtype: torch.dtype) -> None:
    weight = sparse_weight(shape, density, seed).to(dtype)
    csr = Csr.of(weight)
    assert torch.equal(csr.dense(), weight)
    assert csr.dense().dtype == dtype
    assert csr.row_offsets[-1] == len(csr.values) == int((weight != 0).sum())
    for row in range(shape[0]):
        columns = csr.col_indices[csr.row_offsets[row] : csr.row_offsets[row + 1]]
        assert torch.equal(columns, columns.sort().values)


def test_csr_keeps_nan_and_drops_minus_zero() -> None:
    csr = Csr.of(torch.tensor([[0.0, torch.nan], [-0.0, torch.inf]]))
    assert csr.col_indices.tolist() == [1, 1]
    assert csr.values.isnan().tolist() == [True, False]


def test_csr_of_strided_weights_reads_their_values() -> None:
    weight = sparse_weight((6, 8, 3, 3), 0.3).contiguous(memory_format=torch.channels_last)
    assert torch.equal(Csr.of(weight).dense(), weight)
    assert torch.equal(Csr.of(weight.flip(0)).dense(), weight.flip(0))


@given(shape=shapes, density=densities, seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES))
@stable(80)
def test_bitmask_round_trip(shape: tuple[int, ...], density: float, seed: int, dtype: torch.dtype) -> None:
    tensor = sparse_weight(shape, density, seed).to(dtype)
    again = Bitmask.of(tensor).dense(shape)
    assert torch.equal(again, tensor)
    assert again.dtype == dtype


def test_bitmask_gives_back_the_same_bits() -> None:
    tensor = torch.tensor([[-0.0, 0.0, 1.0], [torch.nan, -torch.inf, -0.0]])
    assert torch.equal(Bitmask.of(tensor).dense((2, 3)).view(torch.int32), tensor.view(torch.int32))


def test_bitmask_takes_a_bit_per_element_and_the_nonzeros() -> None:
    packed = Bitmask.of(torch.eye(9))
    assert packed.mask.numel() == 11
    assert packed.values.numel() == 9


def damaged(**change: Tensor) -> Bitmask:
    good = Bitmask.of(torch.eye(3))
    return Bitmask(change.get("mask", good.mask), change.get("values", good.values))


@pytest.mark.parametrize(
    "bad",
    [
        damaged(mask=torch.tensor([1, 2, 0], dtype=torch.uint8)),
        damaged(mask=torch.tensor([1], dtype=torch.uint8)),
        damaged(mask=torch.tensor([1, 1], dtype=torch.int8)),
        damaged(mask=torch.tensor([[1, 1]], dtype=torch.uint8)),
        damaged(mask=torch.tensor([17, 255], dtype=torch.uint8)),
        damaged(values=torch.ones(2)),
        damaged(values=torch.ones(4)),
        damaged(values=torch.ones(3, 1)),
        damaged(values=torch.ones(0)),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(bad: Bitmask) -> None:
    with pytest.raises(ValueError, match="mask"):
        bad.dense((3, 3))


def test_bitmask_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match="bytes"):
        Bitmask.of(torch.eye(3)).dense((30, 3))


# -- stretched ---------------------------------------------------------------------------------------------
def taps_of(r: int, s: int) -> np.ndarray:
    return (np.arange(r * s, dtype=np.int32) * 4).reshape(r, s)


@given(
    groups=st.sampled_from([1, 1, 2, 3]),
    k=st.integers(1, 12),
    c=st.integers(1, 12),
    r=st.integers(1, 3),
    s=st.integers(1, 3),
    density=densities,
    block=st.integers(1, 15),
    chunks=st.integers(1, 14),
    seed=st.integers(0, 999),
)
@stable(150)
def test_stretched_round_trip(
    groups: int, k: int, c: int, r: int, s: int, density: float, block: int, chunks: int, seed: int
) -> None:
    weight = sparse_weight((k * groups, c, r, s), density, seed)
    packed = stretch(weight, groups, taps_of(r, s), 4 * r * s, block, chunks)
    assert torch.equal(unstretch(packed), weight)
    assert packed.chunks.numel() == chunks + 1
    assert packed.blocks.shape[1] == BLOCK_FIELDS


@given(
    k=st.integers(1, 12), c=st.integers(1, 12), density=densities, block=st.integers(1, 15), chunks=st.integers(1, 14)
)
@stable(100)
def test_every_output_channel_is_begun_once_and_finished_once(
    k: int, c: int, density: float, block: int, chunks: int
) -> None:
    """Also those without a nonzero; a channel begins from the bias and finishes by being written."""
    packed = stretch(sparse_weight((k, c, 3, 3), density), 1, taps_of(3, 3), 36, block, chunks)
    segments = packed.segments[:, 0].tolist()
    begun, finished = [], []
    for _, _, _, both, first, middle, last, end in packed.blocks.tolist():
        begun += segments[both:middle]
        finished += segments[both:first] + segments[last:end]
    assert sorted(begun) == list(range(k))
    assert sorted(finished) == list(range(k))


@given(
    k=st.integers(1, 12), c=st.integers(1, 12), density=densities, block=st.integers(1, 15), chunks=st.integers(1, 14)
)
@stable(100)
def test_every_offset_stays_inside_its_panel(k: int, c: int, density: float, block: int, chunks: int) -> None:
    packed = stretch(sparse_weight((k, c, 3, 3), density), 1, taps_of(3, 3), 36, block, chunks)
    offsets = packed.entries[:, 1]
    for begin, end, *_ in packed.blocks.tolist():
        assert 0 <= end - begin <= block
    assert packed.entries.numel() == 0 or (int(offsets.min()) >= 0 and int(offsets.max()) < block * 36)


def test_chunks_hold_about_equal_work() -> None:
    packed = stretch(sparse_weight((64, 32, 3, 3), 0.1), 1, taps_of(3, 3), 36, 32, 4)
    counts = []
    for first, last in zip(packed.chunks[:-1].tolist(), packed.chunks[1:].tolist(), strict=True):
        rows = packed.blocks[first:last]
        counts.append(int(packed.segments[rows[0, 3] : rows[-1, 7], 1].sum()))
    assert max(counts) < 1.3 * min(counts)
    assert sum(counts) == len(packed.entries)
