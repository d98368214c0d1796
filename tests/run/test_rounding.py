"""Weights rounded to float16 before saving: half the bytes, the same zeros, and a note that says how far they moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import zeroskip
from contract.cases import OURS, engine_of, plan_with, program_of, thin
from run.files import read
from zeroskip.core.errors import SaveError
from zeroskip.run.compile import distance
from zeroskip.run.engine import Variant
from zeroskip.run.file import save
from zeroskip.run.rounding import SMALLEST, rounded

IMAGE = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def variant_of(model: nn.Module) -> Variant:
    program = program_of(model, IMAGE)
    return Variant(program, plan_with(program, *OURS))


def network() -> nn.Module:
    torch.manual_seed(0)
    return thin(nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)), 0.1)


def test_a_file_of_rounded_weights_loads_and_says_so(tmp_path: Path) -> None:
    variant = variant_of(network())
    save([rounded(variant)], tmp_path / "half.zsk")
    save([variant], tmp_path / "whole.zsk")
    engine = zeroskip.load(tmp_path / "half.zsk")
    assert "rounded to float16: by at most" in engine.plan.notes[-1]
    expected = engine_of(variant.program, *OURS)(IMAGE)
    assert engine(IMAGE).dtype == torch.float32
    assert 0 < distance(engine(IMAGE), expected) < 1e-3
    half, whole = read(tmp_path / "half.zsk")[1], read(tmp_path / "whole.zsk")[1]
    values = [name for name in half if name.endswith(":values")]
    assert len(values) == 2
    for name in values:
        assert half[name].dtype == torch.float16
        assert half[name].shape == whole[name].shape
    biases = [name for name in half if "bias" in name]
    assert all(half[name].dtype == torch.float32 for name in biases)


def test_an_engine_saves_half_of_the_bytes_when_asked(tmp_path: Path) -> None:
    engine = engine_of(variant_of(network()).program, *OURS)
    engine.save(tmp_path / "whole.zsk")
    engine.save(tmp_path / "half.zsk", half=True)
    half = zeroskip.load(tmp_path / "half.zsk")
    assert "rounded to float16" in half.plan.notes[-1]
    assert 0 < distance(half(IMAGE), engine(IMAGE)) < 1e-3
    values = [
        sum(array.nbytes for name, array in read(tmp_path / file)[1].items() if name.endswith(":values"))
        for file in ("half.zsk", "whole.zsk")
    ]
    assert 2 * values[0] == values[1]


def test_rounding_twice_changes_nothing() -> None:
    once = rounded(variant_of(network()))
    twice = rounded(once)
    assert once.plan.weights_hash == twice.plan.weights_hash
    assert "by at most 0.0e+00" in twice.plan.notes[-1]


def test_no_weight_becomes_zero() -> None:
    model = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        model.weight[0, 0, 0] = torch.tensor([1e-9, -1e-9, 0.0])
    (weight,) = (tensor for tensor in rounded(variant_of(model)).program.tensors.values() if tensor.dim() == 4)
    assert weight[0, 0, 0].tolist() == [SMALLEST, -SMALLEST, 0.0]


def test_numbers_beyond_float16_are_refused_by_name() -> None:
    model = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        model.weight[0, 0, 0, 0] = 70000.0
    with pytest.raises(SaveError, match=r"weight.* holds 70000"):
        rounded(variant_of(model))
