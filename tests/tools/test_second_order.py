"""`tools/second_order.py` on a few photographs that are made here."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tools import second_order


def test_a_score_sees_gradients_and_keeps_what_the_loss_needs() -> None:
    """Of two equal weights the one stays whose gradients are large; by magnitude the larger one does."""
    for score, kept in (("magnitude", [False, True]), ("fisher", [True, False]), ("block", [True, False])):
        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        with torch.no_grad():
            net.get_parameter("0.weight").copy_(torch.tensor([[1.0, 1.1], [1.0, 1.1]]))
            net.get_parameter("1.weight").fill_(1)
        pruner = second_order.Scored(score, net, 0.5, begin=0, end=1, every=1)
        pruner._pruned = {"0": next(layer for layer in pruner._layers if layer.name == "0")}
        pruner._masks = {"0": torch.ones(2, 2, dtype=torch.bool)}
        net.get_parameter("0.weight").register_post_accumulate_grad_hook(lambda w, it=pruner: it._see("0", w))
        for _ in range(3):
            net.zero_grad()
            net(torch.tensor([[5.0, 0.1]])).sum().square().backward()
        assert pruner._select(0.5)["0"].tolist() == [kept, kept]


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
        *[(score, sparsity) for sparsity in (0.95, 0.98) for score in ("magnitude", "fisher", "block")],
    ]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    lines = second_order.summary([row | {"seed": seed} for seed in range(2) for row in rows])
    assert [line.split()[1] for line in lines[:3]] == ["parent", "dense", "magnitude"]
    assert len(lines) == 8
    json.dumps(rows)
    capsys.readouterr()
