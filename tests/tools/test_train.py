"""`python -m tools.train` on generated photographs and a network of a few hundred weights."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tools.train import cycle, networks, photos
from tools.train.__main__ import main
from tools.train.plan import ROWS, SEEDS, Settings, jobs
from zeroskip.model.zoo import BUILDERS
from zeroskip.model.zoo.files import build_network, load_network
from zeroskip.pruning import TrainedFile

CLASSES, PER_CLASS = 3, 30
SHORT = ["--scale", "0.25", "--batch", "8", "--networks", "resnet18", "--seeds", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of 16x16 whose class is their brightest channel, every fourth for the test part."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), PER_CLASS).astype(np.uint8)
    blobs = []
    for label in labels:
        pixels = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
        pixels[:, :, label] += 90
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "webp", quality=80)
        blobs.append(file.getvalue())
    path = tmp_path_factory.mktemp("photos") / "photos.npz"
    np.savez(
        path,
        blob=np.frombuffer(b"".join(blobs), np.uint8),
        off=np.cumsum([0, *map(len, blobs)]),
        label=labels,
        is_val=np.arange(len(labels)) % 4 == 3,
    )
    return path


@pytest.fixture(autouse=True)
def _small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(classes: int) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 16), (16, 16)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))

    monkeypatch.setitem(BUILDERS, "resnet18", build)


def test_rows(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_pruning")
    words = ["--out", str(tmp_path), "--data", str(data), *SHORT]
    words += ["--rows", "unstructured-90", "2of4", "2of4-permuted", "filters-eighth"]
    main(words)
    file = TrainedFile(tmp_path / "trained.jsonl")
    assert {row.row for row in file.rows} == {"parent", *words[-4:]}
    pruned_layers = {row.row: [layer for layer in row.layers.layers if layer.reason is None] for row in file.rows}
    assert {layer.density for layer in pruned_layers["parent"]} == {1.0}
    assert [layer.nnz for layer in pruned_layers["unstructured-90"]] == [round(0.1 * 2304)] * 2
    assert {layer.density for layer in pruned_layers["2of4"] + pruned_layers["2of4-permuted"]} == {0.5}
    assert 0.05 < next(row for row in file.rows if row.row == "filters-eighth").layers.density < 0.25

    test = photos.load(data, torch.device("cpu")).test
    parent = file.rows[0]
    for row in file.rows:
        path = tmp_path / "networks" / f"resnet18-{row.row}-s0.safetensors"
        model = load_network(path).model
        assert cycle.accuracy(model, test) == row.accuracy > 0.6
        assert path.stat().st_size == row.file_bytes
        assert sum(int(weight.count_nonzero()) for weight in model.parameters() if weight.ndim > 1) == sum(
            layer.nnz for layer in row.layers.layers
        )
        assert row.log[-1].step == row.log[-1].step // 7 * 7  # of 60 photographs with which to train
        assert row.environment in file.environments
        assert row is parent or row.macs < parent.macs
    assert parent.macs == 256 * (3 * 16 + 2 * 16 * 16) * 9 + 16 * CLASSES

    before = (tmp_path / "trained.jsonl").read_bytes()
    capsys.readouterr()
    main(words)
    assert capsys.readouterr().out == "nothing is left to do\n"
    (tmp_path / "networks" / "resnet18-parent-s0.safetensors").unlink()
    main([*words, "dense"])
    after = (tmp_path / "trained.jsonl").read_bytes()
    assert after.startswith(before), "a parent that is trained anew is not recorded anew"


@pytest.mark.parametrize("row", ["unstructured-90", "2of4-permuted", "filters-half"])
def test_resumed_training_ends_at_the_same_bits(
    row: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_pruning")
    words = ["--data", str(data), *SHORT, "--rows", row]
    main(["--out", str(tmp_path / "whole"), *words])

    asked = 0

    def need(budget: cycle.Budget, seconds: float) -> None:
        nonlocal asked
        asked += 1
        if asked % 5 == 0:
            raise cycle.OutOfTime

    monkeypatch.setattr(cycle.Budget, "need", need)
    calls = 0
    parts = TrainedFile(tmp_path / "parts" / "trained.jsonl")
    while ("resnet18", row, 0) not in parts:
        main(["--out", str(tmp_path / "parts"), *words])
        calls += 1
        parts = TrainedFile(tmp_path / "parts" / "trained.jsonl")
    assert calls > 2
    for name in ("parent", row):
        files = [tmp_path / out / "networks" / f"resnet18-{name}-s0.safetensors" for out in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()
    for one, other in zip(TrainedFile(tmp_path / "whole" / "trained.jsonl").rows, parts.rows, strict=True):
        assert one.log == other.log
        assert one.accuracy == other.accuracy
    assert list((tmp_path / "parts" / "checkpoints").iterdir()) == []


def test_other_settings_are_refused(data: Path, tmp_path: Path) -> None:
    words = ["--out", str(tmp_path), "--data", str(data), *SHORT, "--rows", "parent"]
    main(words)
    with pytest.raises(SystemExit, match="was trained with"):
        main([*words, "--peak", "0.2"])


def test_the_checkpoint_of_other_settings_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of a parent, of which nothing is recorded yet."""
    words = ["--out", str(tmp_path), "--data", str(data), *SHORT, "--rows", "parent"]
    asked = iter([None, None, cycle.OutOfTime()])

    def need(budget: cycle.Budget, seconds: float) -> None:
        if error := next(asked, None):
            raise error

    monkeypatch.setattr(cycle.Budget, "need", need)
    main(words)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit, match=r"of resnet18-parent-s0 with .*'peak': 0.05.* go on with those"):
        main([*words, "--peak", "0.2"])
    assert checkpoint.read_bytes() == before


def test_list_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path / "none"), "--list"])
    assert "vgg19_bn-2of4-s2" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_plan() -> None:
    every = list(jobs(networks.NETWORKS, SEEDS))
    for place, job in enumerate(every):
        assert job.parent is None or job.parent in every[:place]
    assert {row.name for row in ROWS if row.seeds == SEEDS} >= {"dense", "unstructured-90", "unstructured-95", "2of4"}
    assert sum(job.expected_seconds(Settings()) for job in every) <= 40 * 60


def test_held_out_part_is_of_every_class(data: Path) -> None:
    found = photos.load(data, torch.device("cpu"))
    assert found.test.labels.bincount().tolist() == [7, 8, 7]
    assert found.holdout.labels.bincount().tolist() == [2, 2, 2]
    assert len(found.train.labels) == CLASSES * PER_CLASS - 22 - 6
    assert found.train.images.dtype == torch.uint8


def test_crops_are_parts_of_the_photograph() -> None:
    """Of an image that is its own coordinates: a crop is a mirrored linear ramp within it."""
    along = torch.arange(64, dtype=torch.uint8)
    images = torch.stack([along.expand(64, 64), along[:, None].expand(64, 64), along.expand(64, 64)]).repeat(
        200, 1, 1, 1
    )
    crops = photos.augmented(images, torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (photos.MEAN, photos.STD))
    pixels = (crops * std + mean) * 255
    assert pixels.min() >= -1e-3
    assert pixels.max() <= 63 + 1e-3
    across, down = pixels[:, 0, 32, 40:50].diff().mean(1), pixels[:, 1, 40:50, 32].diff().mean(1)
    area = across.abs() * down
    assert area.min() > 0.3
    assert area.max() <= 1.001
    assert 0.3 < (across < 0).float().mean() < 0.7
    assert (down > 0).all()


def test_pooled_vgg_has_20_million_weights() -> None:
    with torch.device("meta"):
        model = build_network("vgg19_bn", 10)
    assert sum(weight.numel() for weight in model.parameters()) == 20_040_522
