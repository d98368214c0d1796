"""End to end on generated images: train, prune while training on, compile, same accuracy."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fashion_mnist as example
from zeroskip.pruning import prune


def write_idx(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of 28x28 with a bright bar whose height in the image is the class: 600 + 100 images."""
    folder = tmp_path_factory.mktemp("fashion")
    random = np.random.default_rng(0)
    for part, count in (("train", 600), ("t10k", 100)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = random.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 2 * label + 4 : 2 * label + 8] += 120
        images[labels % 2 == 0] = images[labels % 2 == 0].transpose(0, 2, 1)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def test_prune_finetune_compile_same_accuracy(
    quick: None, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "BATCH", 20)
    example.main(["--data", str(data), "--epochs", "3"])
    out = capsys.readouterr().out
    accuracy = {name: float(value) for name, value in re.findall(r"^(\w+).*?: ([\d.]+)%", out, re.MULTILINE)}
    assert accuracy["pruned"] == accuracy["compiled"] > 50, out
    assert "0 of 100 answers differ" in out
    assert re.search(r"64->64 3x3 @7x7 n100 +90%", out), out


@pytest.mark.skipif(not example.FOLDER.exists(), reason="dataset-fashion-mnist is not installed")
def test_the_real_images_keep_their_accuracy(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of them, for seconds instead of minutes."""
    for part, count in (("train", 6000), ("t10k", 1000)):
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{part}-{kind}-ubyte.gz"
            write_idx(tmp_path / name, example.read_idx(example.FOLDER / name)[:count].numpy())
    example.main(["--data", str(tmp_path), "--epochs", "3"])
    out = capsys.readouterr().out
    accuracy = {name: float(value) for name, value in re.findall(r"^(\w+).*?: ([\d.]+)%", out, re.MULTILINE)}
    assert accuracy["pruned"] == accuracy["compiled"] > 75, out
    assert "0 of 1,000 answers differ" in out, out


def test_training_prunes_to_the_sparsity_asked_for(data: Path) -> None:
    torch.manual_seed(0)
    model = example.network()
    images, labels = example.load(data, "train")
    example.train(model, images[:256], labels[:256], epochs=2, sparsity=0.9)
    pruned = [layer for layer in prune(model, 0.0).layers if layer.reason is None]
    assert [layer.nnz for layer in pruned] == [layer.numel - round(0.9 * layer.numel) for layer in pruned]


def test_missing_data_say_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        example.main(["--data", str(tmp_path)])


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x0d\1rest"))
    with pytest.raises(SystemExit, match="expected an IDX file"):
        example.read_idx(path)
