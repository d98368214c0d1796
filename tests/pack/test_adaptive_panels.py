"""Panels with heavy and light columns: exact, complete, cut as asked, and readable as the kernel reads them."""

from __future__ import annotations

import math
import runpy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contract.cases import sparse_weight, stable
from real_data import real
from zeroskip.pack.adaptive_panels import (
    FEWEST_HEAVY,
    MOST_NONZEROS,
    SPARE,
    AdaptivePanels,
    Tiling,
    binomial_heavy,
    column_counts,
    deal,
    header_words,
    heavy_columns,
)
from zeroskip.pack.csr import Csr

PITCH = 128
PLAIN = Tiling(positions=16, height=12, threshold=3, tile=10)


def packed(weight: Tensor, tiling: Tiling) -> AdaptivePanels:
    bias = torch.arange(weight.shape[0], dtype=torch.float32) + 0.5
    return AdaptivePanels.of(Csr.of(weight), weight.shape[1], bias, tiling, PITCH)


def skewed(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    """Some columns are full, most nearly empty, and row 0 is long."""
    weight = sparse_weight((rows, columns), 1.1, seed)
    chance = torch.rand(columns, generator=torch.Generator().manual_seed(seed)).pow(3) * 4 * density
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) < chance
    keep[0, : columns // 2] = density > 0
    return torch.where(keep, weight, 0.0)


def walked(panels: AdaptivePanels, x: Tensor) -> Tensor:
    """``W x + bias`` computed the way the kernel walks the chunks; a nonzero outside its part is an error."""
    y = torch.full((panels.shape[0], x.shape[1]), torch.nan, dtype=torch.float64)
    positions, width = panels.tiling.positions, panels.width
    header = header_words(positions, width)
    for head, chunks in zip(panels.heads.numpy(), panels.chunks.numpy(), strict=True):
        sums = torch.zeros(positions, x.shape[1], dtype=torch.float64)
        for chunk in chunks:
            index, heavy = chunk[: 2 * positions + 1], chunk[2 * positions + 1]
            assert heavy <= width <= panels.tiling.tile
            tile = x[chunk[2 * positions + 2 : 2 * positions + 2 + heavy].astype(np.int64)]
            for slot in range(2 * positions):
                begin, end = (index[slot] + 1) // 2 * 2, index[slot + 1]
                for at in range(header + 2 * begin, header + 2 * end, 2):
                    weight, place = float(chunk[at : at + 1].view(np.float32)[0]), chunk[at + 1]
                    if slot >= positions:
                        assert place % PITCH == 0
                    met = tile[place // PITCH] if slot >= positions else x[place]
                    sums[slot % positions] += weight * met
            assert len(chunk) >= header + 2 * (index[-1] + SPARE)
        for place, (row, bias, parts, _) in enumerate(head):
            if row >= 0:
                assert y[row].isnan().all(), "a row is computed once"
                y[row] = sums[place : place + parts].sum(0) + float(np.int32(bias).view(np.float32))
    return y


@given(st.data())
@stable(80)
def test_packing_is_exact_and_the_walk_computes_the_product(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    rows, columns, positions = draw(1, 40), draw(1, 60), draw(1, 17)
    tiling = Tiling(
        positions,
        draw(1, positions),
        draw(1, 6),
        draw(1, 30),
        data.draw(st.sampled_from([0, 0, 1, 4, 9])),
        data.draw(st.sampled_from(["given", "dealt"])),
    )
    weight = skewed(rows, columns, data.draw(st.sampled_from([0.0, 0.05, 0.3, 9.0])), draw(0, 99))
    panels = packed(weight, tiling)
    assert torch.equal(panels.dense(), weight)
    x = torch.randn(columns, 3, dtype=torch.float64)
    want = weight.double() @ x + torch.arange(rows)[:, None] + 0.5
    assert torch.allclose(walked(panels, x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e-45, -3.4e38])
@pytest.mark.parametrize("threshold", [1, 9])
def test_odd_values_survive(value: float, threshold: int) -> None:
    weight = torch.zeros(5, 9)
    weight[2:4, :] = 1.0
    weight[3, 8] = value
    found = packed(weight, replace(PLAIN, threshold=threshold)).dense()
    assert torch.equal(found.nan_to_num(nan=7.0), weight.nan_to_num(nan=7.0))


def test_chunks_and_heads_are_whole_vectors() -> None:
    panels = packed(skewed(50, 70, 0.2), PLAIN)
    assert panels.chunk_bytes % 16 == 0
    assert panels.heads.shape == (panels.panels, 16, 4)
    assert header_words(16, panels.width) % 4 == 0


def heavy_of(panels: AdaptivePanels) -> list[set[int]]:
    """The columns in the tiles of each panel."""
    first = 2 * panels.tiling.positions + 1
    return [
        {column for chunk in chunks.tolist() for column in chunk[first + 1 : first + 1 + chunk[first]]}
        for chunks in panels.chunks
    ]


def test_heavy_columns_are_those_with_enough_nonzeros_in_the_panel() -> None:
    weight = skewed(36, 60, 0.3)
    panels = packed(weight, replace(PLAIN, order="given"))
    assert panels.panels == 3
    for panel, columns in enumerate(heavy_of(panels)):
        counts = (weight[12 * panel : 12 * panel + 12] != 0).sum(0)
        assert len(columns) >= FEWEST_HEAVY
        assert columns == set((counts >= 3).nonzero().flatten().tolist())


def test_a_panel_with_few_heavy_columns_has_no_tile() -> None:
    weight = torch.zeros(24, 40)
    weight[:12, : FEWEST_HEAVY - 1] = 1.0
    weight[12:, :FEWEST_HEAVY] = 1.0
    found = heavy_of(packed(weight, replace(PLAIN, order="given")))
    assert found == [set(), set(range(FEWEST_HEAVY))]


def test_heavy_columns_and_light_nonzeros_are_divided_evenly_among_sections() -> None:
    panels = packed(skewed(12, 400, 0.2), replace(PLAIN, tile=40))
    heavy = panels.chunks[0, :, 33].tolist()
    assert panels.sections == math.ceil(sum(heavy) / 40) > 2
    assert max(heavy) - min(heavy) <= 1
    light = panels.chunks[0, :, 16].tolist()
    assert max(light) - min(light) <= 16 + 3  # what evens out the places' beginnings, and a column


def test_no_section_has_many_more_nonzeros_than_fit() -> None:
    for threshold in (1, 99):
        panels = packed(sparse_weight((12, 1500), 0.9), Tiling(12, 12, threshold, 1500))
        used = panels.chunks[0, :, 2 * 12]
        assert panels.sections == 4
        assert int(used.max()) <= 1.1 * MOST_NONZEROS
        x = torch.randn(1500, 2, dtype=torch.float64)
        want = panels.dense().double() @ x + torch.arange(12)[:, None] + 0.5
        assert torch.allclose(walked(panels, x), want, rtol=1e-12, atol=1e-12)


def test_dealt_panels_have_equal_work_and_given_ones_neighbours() -> None:
    lengths = np.arange(64)
    for order, most in (("dealt", 2), ("given", 800)):
        _, panel, _ = deal(lengths, replace(PLAIN, height=16, order=order))  # type: ignore[arg-type]
        work = np.bincount(panel, lengths)
        assert len(work) == 4
        assert work.max() - work.min() <= most
        assert (np.diff(panel) >= 0).all() == (order == "given")


def test_rows_of_equal_length_stand_together() -> None:
    weight = torch.tril(torch.ones(12, 12))
    lengths = [int((weight[row] != 0).sum()) for row in packed(weight, PLAIN).heads[0, :12, 0].tolist()]
    assert lengths == sorted(lengths, reverse=True)


def test_long_rows_take_several_places_with_equal_shares() -> None:
    weight = torch.zeros(8, 90)
    weight[3] = 1.0
    weight[5, :20] = 1.0
    panels = packed(weight, Tiling(20, 20, 1, 200, longest=10))
    taken = {int(row): int(parts) for row, _, parts, _ in panels.heads[0].tolist() if row >= 0}
    assert taken == {3: 9, 5: 2, **dict.fromkeys((0, 1, 2, 4, 6, 7), 1)}
    index = panels.chunks[0, 0, :41].tolist()
    shares = [index[slot + 1] - (index[slot] + 1) // 2 * 2 for slot in range(20, 31)]
    assert shares == [10] * 11


def test_a_row_longer_than_a_panel_takes_no_more_than_a_panel() -> None:
    weight = torch.ones(3, 500)
    panels = packed(weight, Tiling(4, 4, 1, 500, longest=2))
    assert panels.panels == 3
    assert torch.equal(panels.dense(), weight)


def test_divided_rows_that_leave_gaps_get_another_panel() -> None:
    parts, panel, place = deal(np.array([30, 30, 30]), Tiling(4, 4, 1, 8, longest=10))
    assert parts.tolist() == [3, 3, 3]
    assert sorted(panel.tolist()) == [0, 1, 2]
    assert place.tolist() == [0, 0, 0]


def test_rows_that_leave_gaps_are_dealt_in_time() -> None:
    started = time.perf_counter()
    parts, panel, _ = deal(np.full(6000, 9), Tiling(8, 8, 2, 64, 3))
    assert (np.bincount(panel, parts) <= 8).all()
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    "change",
    [{"height": 17}, {"height": 0}, {"threshold": 0}, {"tile": 0}, {"longest": -1}, {"order": "random"}],
    ids=str,
)
def test_a_tiling_checks_itself(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"height|threshold|order"):
        replace(PLAIN, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [1, 2, 4, 8])
def test_the_binomial_expectation_is_what_random_masks_have(threshold: int) -> None:
    csr = Csr.of(sparse_weight((32 * 10, 4000), 0.1))
    counts = column_counts(csr, 4000, np.arange(32 * 10) // 32)
    heavy = heavy_columns(counts, threshold)
    columns, held = binomial_heavy(32, 0.1, threshold)
    assert heavy.mean() == pytest.approx(columns, abs=0.01)
    assert counts[heavy].sum() / counts.sum() == pytest.approx(held, abs=0.01)


def test_the_binomial_expectation_at_its_ends() -> None:
    assert binomial_heavy(16, 0.0, 2) == (0.0, 0.0)
    assert binomial_heavy(16, 1.0, 16) == (1.0, 1.0)
    assert binomial_heavy(16, 0.5, 17) == pytest.approx((0.0, 0.0))


# -- statistics of trained layers ---------------------------------------------------------------------------
TOOL = Path(__file__).parents[2] / "tools" / "aspt_statistics.py"


def test_statistics_without_data_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZEROSKIP_DATA", str(tmp_path))
    assert runpy.run_path(str(TOOL))["main"]() == 1
    assert "ZEROSKIP_DATA" in capsys.readouterr().err


def test_trained_masks_are_hardly_more_skewed_than_random_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines that the method's README quotes."""
    monkeypatch.setenv("ZEROSKIP_DATA", str(real("mobilenet_v1_sparse90.npz").parent))
    assert runpy.run_path(str(TOOL))["main"]() == 0
    text = capsys.readouterr().out
    assert "| 32, 2 | 81%, 96% | 84%, 96% | 57%, 100% | 0.30 | 0.30 | 0.18 | 0.31 |" in text
    assert "| 128, 16 | 27%, 40% | 21%, 29% | 40%, 62% | 0.62 | 0.73 | 0.41 | 0.08 |" in text
    assert "| 32, 2 | 36%, 74% | 37%, 72% | 28%, 100% | 0.53 | 0.57 | 0.22 | 0.78 |" in text
