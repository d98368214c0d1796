"""`tools/second_order.py` on a few photographs that are made here."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tools import second_order


def test_the_tool_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    for part in ("train", "t10k"):
        for what, array in (
            ("images-idx3", draw.integers(0, 256, (256, 28, 28))),
            ("labels-idx1", np.arange(256) % 10),
        ):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape)
            packed = gzip.compress(head + array.astype(np.uint8).tobytes())
            (tmp_path / f"{part}-{what}-ubyte.gz").write_bytes(packed)
    rows = second_order.one_seed(tmp_path, 0, 1, None)
    assert [(row["score"], row["sparsity"]) for row in rows] == [
        ("parent", 0.0),
        ("dense", 0.0),
        *[(score, sparsity) for sparsity in (0.95, 0.98) for score in ("magnitude", "fisher")],
    ]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    lines = second_order.summary([row | {"seed": seed} for seed in range(2) for row in rows])
    assert len(lines) == 5
    assert lines[1].startswith("95% magnitude")
    json.dumps(rows)
    capsys.readouterr()
