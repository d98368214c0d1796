"""The trained networks of benchmarks/networks open, run, and have the size that their table says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zeroskip

FOLDER = Path(__file__).parents[2] / "benchmarks" / "networks"
ROWS = [line.split("|")[1:3] for line in (FOLDER / "README.md").read_text().splitlines() if ".zsk |" in line]


def test_the_table_has_every_file() -> None:
    assert sorted(name.strip() for name, _ in ROWS) == sorted(path.name for path in FOLDER.glob("*.zsk"))


@pytest.mark.parametrize(("name", "size"), ROWS)
def test_a_network_of_the_table(name: str, size: str) -> None:
    path = FOLDER / name.strip()
    assert f"{path.stat().st_size:,}" == size.strip()
    engine = zeroskip.load(path)
    y = engine(torch.rand(1, 3, 112, 112))
    assert y.shape == (1, 10)
    assert y.isfinite().all()
    assert len(engine.labels or ()) == 10
