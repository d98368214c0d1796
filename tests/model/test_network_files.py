"""Trained networks in files: what was written comes back, and everything else is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from zeroskip.core.errors import FileFormatError, SaveError
from zeroskip.model.zoo import BUILDERS
from zeroskip.model.zoo.files import build_network, load_network, save_network

CLASSES = 4


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILDERS, "tiny", lambda classes: network(8, classes))


def network(width: int = 8, classes: int = CLASSES) -> nn.Module:
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_network(tmp_path / "new" / "tiny.safetensors", "tiny", CLASSES, network())
    return tmp_path / "new" / "tiny.safetensors"


@pytest.mark.parametrize("width", [8, 3])
def test_what_was_saved_comes_back_in_fp16(tmp_path: Path, width: int) -> None:
    model = network(width)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor[torch.rand(tensor.shape) < 0.8] = 0
    save_network(tmp_path / "n.safetensors", "tiny", CLASSES, model)
    torch.manual_seed(5)
    saved = load_network(tmp_path / "n.safetensors")
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1)), "loading draws no random numbers"
    assert (saved.network, saved.classes, saved.model.training) == ("tiny", CLASSES, False)
    assert isinstance(saved.model[0], nn.Conv2d)
    assert saved.model[0].out_channels == width
    for name, tensor in model.state_dict().items():
        wanted = tensor.half().float() if tensor.ndim > 1 else tensor
        assert torch.equal(saved.model.state_dict()[name], wanted), name
    assert all(parameter.requires_grad for parameter in saved.model.parameters())
    assert saved.model(torch.rand(2, 3, 9, 9)).shape == (2, CLASSES)


def test_damaged_bytes_are_refused(path: Path) -> None:
    whole = path.read_bytes()
    for content in (b"", b"{}", whole[:7], whole[: len(whole) // 2], whole[:-1], b"PK\3\4" * 99):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"tiny\.safetensors holds no network"):
            load_network(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*absent"):
        load_network(tmp_path / "absent.safetensors")


def test_another_safetensors_file_is_told_apart(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(3)}, path)
    with pytest.raises(FileFormatError, match="without its network's name"):
        load_network(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "resnet19"}, "no network is called 'resnet19'"),
        ({"network": "resnet18"}, "conv1.weight is None"),
        ({"network": 3}, "about.network"),
        ({"classes": 5}, "not 5"),
        ({"classes": "many"}, "about.classes"),
        ({"classes": 10**15}, f"not {10**15}"),
        ({"classes": 10**30}, "holds no network"),
        ({"tensors": {}}, r"0\.weight is None"),
        ({"tensors": {"0.weight": ["float32", 5, 3, 3, 3]}}, "holds no network"),
        ({"tensors": {"0.weight": ["float32", 8, 3, 3]}}, "expected 4 sizes"),
        ({"tensors": {"0.weight": ["float64", 8, 3, 3, 3]}}, "float64"),
        ({"tensors": {"0.weight": 3}}, "holds no network"),
        ({"tensors": {"0.bias": ["float32", 8]}}, r"0\.bias is \['float32', 8\], tiny has None"),
        ({"more": 1}, "more"),
    ],
)
def test_a_network_that_cannot_be_is_refused(path: Path, change: dict[str, Any], message: str) -> None:
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    if change.get("tensors"):
        change = {"tensors": about["tensors"] | change["tensors"]}
    safetensors.torch.save_file(arrays, path, {"about": json.dumps(about | change)})
    with pytest.raises(FileFormatError, match=rf"tiny\.safetensors.*{message}"):
        load_network(path)


@pytest.mark.parametrize("tensor", [torch.ones(8, 3, 3), torch.ones(8, 3, 3, 3, dtype=torch.int64)])
def test_a_tensor_unlike_its_description_is_refused(path: Path, tensor: torch.Tensor) -> None:
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    safetensors.torch.save_file(arrays | {"0.weight": tensor}, path, about)
    with pytest.raises(FileFormatError, match="weight"):
        load_network(path)


def test_a_weight_beyond_float16_is_not_written(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] = -1e6
    with pytest.raises(SaveError, match=r"0\.weight holds 1e"):
        save_network(tmp_path / "n.safetensors", "tiny", CLASSES, model)
    assert not (tmp_path / "n.safetensors").exists()


def test_the_zoo_is_asked_by_name() -> None:
    with pytest.raises(ValueError, match="no network is called 'lenet'"):
        build_network("lenet", 10)
