"""Real weights and photographs, which the repository does not hold: a test that wants them is skipped without them."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeroskip.core.env import data_folder

ROOT = Path(__file__).parents[1]


def real(name: str) -> Path:
    """The file or folder ``name`` of the data folder, which is relative to the repository wherever tests run."""
    path = ROOT / data_folder() / name
    if not path.exists():
        pytest.skip(f"there is no {path}; set ZEROSKIP_DATA to its folder")
    return path
