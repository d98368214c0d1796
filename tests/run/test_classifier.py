"""The classifier that comes with the package opens, is as sparse as it says, and names photographs."""

from __future__ import annotations

import pytest
import torch

import zeroskip
from real_data import real
from zeroskip import assets
from zeroskip.run.engine import Engine

PHOTOGRAPHS = 150
LEAST = 0.74
"""Of these; all 3,925 give 83.0%, and this is 2.9 standard deviations of such a sample below."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return zeroskip.load(assets.classifier())


def test_it_loads_and_knows_its_classes(engine: Engine) -> None:
    y = engine(torch.rand(1, 3, 112, 112))
    assert y.shape == (1, 10)
    assert y.isfinite().all()
    assert "church" in (engine.labels or ())


def test_it_is_as_sparse_as_it_says(engine: Engine) -> None:
    weights = [one for one in engine.variants[0].program.tensors.values() if one.ndim == 4]
    inner = [one for one in weights if one.shape[1] > 3]
    assert len(inner) == 19
    zeros = sum(int((one == 0).sum()) for one in inner) / sum(one.numel() for one in inner)
    assert 0.899 < zeros < 0.91


def test_it_names_photographs(engine: Engine) -> None:
    pytest.importorskip("PIL", reason="pillow decodes the photographs; pip install zeroskip[demo]")
    from tools.train import photos
    from tools.train.export import accuracy

    test = photos.load(real("imagenette112_webp80.npz"), torch.device("cpu"), PHOTOGRAPHS).test
    assert accuracy(engine, test) > LEAST
