"""`python -m tools.train.export` on a network of a few hundred weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import zeroskip
from run.conftest import quick
from tools.train import export, photos
from zeroskip.cli.main import app
from zeroskip.model.zoo import BUILDERS
from zeroskip.model.zoo.files import save_network
from zeroskip.run.compile import distance

__all__ = ["quick"]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    def build(classes: int) -> nn.Module:
        layers = [nn.Conv2d(3, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))

    monkeypatch.setitem(BUILDERS, "tiny", build)
    torch.manual_seed(0)
    return build(10).eval()


def test_a_photograph_is_classified_as_the_network_does(
    network: nn.Module, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_network(tmp_path / "tiny.safetensors", "tiny", 10, network)
    export.main([str(tmp_path / "tiny.safetensors"), "--out", str(tmp_path / "out" / "tiny.zsk")])
    said = capsys.readouterr().out
    assert "of the 0.00 MB of dense fp32" in said
    engine = zeroskip.load(tmp_path / "out" / "tiny.zsk")
    assert engine.labels == export.LABELS
    assert engine.plan.device.threads == 1
    assert engine.plan.device.vector_floats <= 8
    assert "rounded to float16" in engine.plan.notes[-1]

    pixels = torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8)
    logits = network(photos.normalized(pixels[None])).detach()
    assert distance(engine(pixels[None].float() / 255), logits) < 2e-3
    right = photos.Part(pixels[None].repeat(2, 1, 1, 1), torch.tensor([int(logits.argmax()), 10]))
    assert export.accuracy(engine, right) == 0.5

    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    words = ["run", str(tmp_path / "out" / "tiny.zsk"), "--input", str(tmp_path / "photo.png"), "--json"]
    ((best, *_),) = json.loads(CliRunner().invoke(app, words).stdout)["likeliest"]
    assert best["label"] == export.LABELS[int(logits.argmax())]


def test_a_file_that_is_too_large_is_not_kept(
    network: nn.Module, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_network(tmp_path / "tiny.safetensors", "tiny", 10, network)
    monkeypatch.setattr(export, "MOST_BYTES", 1000)
    with pytest.raises(SystemExit, match=r"at most 1,000 are wanted"):
        export.main([str(tmp_path / "tiny.safetensors"), "--out", str(tmp_path / "tiny.zsk")])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_a_file_that_is_there_survives_one_that_is_too_large(
    network: nn.Module, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_network(tmp_path / "tiny.safetensors", "tiny", 10, network)
    (tmp_path / "tiny.zsk").write_bytes(b"old")
    monkeypatch.setattr(export, "MOST_BYTES", 1000)
    with pytest.raises(SystemExit, match=r"at most 1,000 are wanted"):
        export.main([str(tmp_path / "tiny.safetensors"), "--out", str(tmp_path / "tiny.zsk")])
    assert (tmp_path / "tiny.zsk").read_bytes() == b"old"


def test_mistakes_are_one_message(network: nn.Module, tmp_path: Path) -> None:
    save_network(tmp_path / "seven.safetensors", "tiny", 7, BUILDERS["tiny"](7))
    (tmp_path / "broken.safetensors").write_text("{")
    for name, message in (("seven", "10 labels"), ("broken", "holds no network"), ("absent", "no file")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            export.main([str(tmp_path / f"{name}.safetensors"), "--out", str(tmp_path / "o.zsk")])
