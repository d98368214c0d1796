"""The shipped denoisers, and the demo on crops small enough for a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from zeroskip import assets
from zeroskip.core.errors import Unsupported
from zeroskip.report import demo

pytest.importorskip("skimage", reason="the demo's photographs are in the extra zeroskip[demo]")
pytest.importorskip("PIL", reason="the demo's picture is in the extra zeroskip[demo]")


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return assets.dense_denoiser()


@pytest.fixture(scope="module")
def sparse() -> nn.Module:
    return assets.sparse_denoiser()


@pytest.fixture
def photographs(monkeypatch: pytest.MonkeyPatch) -> list[demo.Denoised]:
    monkeypatch.setattr(demo, "SIZE", 96)
    return [demo._with_noise(photograph, seed) for seed, photograph in enumerate(demo.PHOTOGRAPHS)]


def mean_psnr(model: nn.Module, photographs: list[demo.Denoised]) -> float:
    values = []
    with torch.no_grad():
        for one in photographs:
            one.images["out"] = model(one.images[demo.NOISY])
            values.append(one.psnr("out"))
    return sum(values) / len(values)


@pytest.mark.parametrize("name", [assets.DENSE, assets.SPARSE])
def test_nonzeros_are_as_stated(name: str) -> None:
    model = assets.dense_denoiser() if name == assets.DENSE else assets.sparse_denoiser()
    found = {
        layer: [int(module.weight.count_nonzero()), module.weight.numel()]
        for layer, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    assert found == assets.about(name)["nonzeros"]


def test_hidden_layers_are_ninety_percent_zeros(sparse: nn.Module) -> None:
    convs = [module for module in sparse.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 17
    assert [int((conv.weight == 0).sum()) for conv in convs] == [0, *[round(0.9 * 64 * 64 * 9)] * 15, 0]


def test_loading_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    model = assets.dense_denoiser()
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_stored_state_comes_back() -> None:
    state = {"a": torch.tensor([[0.0, 1.5], [0.0, -2.0]]), "b": torch.ones(3)}
    tensors = assets.stored(state)
    assert set(tensors) == {"a:mask", "a:values", "b"}
    back = assets.restored(tensors, {name: tuple(tensor.shape) for name, tensor in state.items()})
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_networks_denoise(dense: nn.Module, sparse: nn.Module, photographs: list[demo.Denoised]) -> None:
    assert len(photographs) >= 4
    noisy = sum(one.psnr(demo.NOISY) for one in photographs) / len(photographs)
    by_dense, by_sparse = mean_psnr(dense, photographs), mean_psnr(sparse, photographs)
    assert by_dense > noisy + 8
    assert by_sparse > by_dense - 0.3


def test_noise_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SIZE", 32)
    first, second = (demo._with_noise(demo.PHOTOGRAPHS[0], 7) for _ in range(2))
    assert torch.equal(first.images[demo.NOISY], second.images[demo.NOISY])
    assert not torch.equal(first.images[demo.NOISY], first.clean)


def test_demo_writes_picture_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    pytest.importorskip("plotly", reason="the page needs Plotly")
    monkeypatch.setattr(demo, "SIZE", 16)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    threads, said = torch.get_num_threads(), []
    result = demo.run_demo(tmp_path / "out", 1, lambda done, total, what: said.append((done, total, what)))
    assert torch.get_num_threads() == threads
    assert all(0 <= done <= total for done, total, _ in said)
    assert said[-1][0] == said[-1][1]

    with Image.open(result.picture) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    page = result.page.read_text()
    assert "data:image/png;base64," in page
    assert result.plan.input_shapes == ((1, 3, 16, 16),)
    assert result.difference < 1e-5

    head, *rows = result.table
    assert len(head) == 5
    assert all(len(row) == len(head) for row in rows)
    names = [photograph.name for photograph in demo.PHOTOGRAPHS]
    assert [row[0] for row in rows] == [*names, "mean", "ms per photograph", "speed-up"]
    # Same network, same values, whatever runs it.
    assert all(row[3] == row[4] for row in rows[: len(names)])
    assert (rows[-1][2] == "busy") == result.contended


def test_missing_package_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "skimage" else name)
    with pytest.raises(Unsupported, match=r"scikit-image, which is not installed: pip install 'zeroskip\[demo\]'"):
        demo.run_demo(tmp_path)
    assert not list(tmp_path.iterdir())
