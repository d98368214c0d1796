"""Train a small CNN on Fashion-MNIST, prune it to 90% while it trains on, compile it, compare.

    python examples/fashion_mnist.py

Minutes on a CPU. The data are Debian's package `dataset-fashion-mnist` (MIT licence, 60,000 + 10,000 images of 28x28 in
ten classes); another folder with the same four files goes into `--data`. Three networks come out of it: the dense
parent, the parent trained for as long again without pruning, and the parent pruned gradually in the same time. The
second is the fair opponent of the third. Then the pruned one is compiled, and has to answer as it did.

Fashion-MNIST is an easy task and this a small network: the accuracy says that the steps work together, no more.
"""

import argparse
import copy
import gzip
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import zeroskip
from zeroskip.pruning import GradualPruner

FOLDER = Path("/usr/share/datasets/fashion-mnist")
SPARSITY = 0.9
PEAK_LR = 0.1
BATCH = 128
MISSING = """\
{file}: no such file. The data come with Debian and Ubuntu:
    sudo apt-get install dataset-fashion-mnist
or, without being root, `apt-get download dataset-fashion-mnist`, `dpkg -x dataset-fashion-mnist_*.deb DIR` and
    python examples/fashion_mnist.py --data DIR{folder}"""


def read_idx(path: Path) -> Tensor:
    """The uint8 array of a gzipped IDX file. Raises SystemExit, with what to install, where there is none."""
    if not path.exists():
        raise SystemExit(MISSING.format(file=path, folder=FOLDER))
    data = gzip.decompress(path.read_bytes())
    zero, kind, dims = int.from_bytes(data[:2], "big"), data[2], data[3]
    if (zero, kind) != (0, 8):
        raise SystemExit(f"{path}: got the first bytes {data[:4].hex()}, expected an IDX file of uint8 (000008..)")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())


def load(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Of "train" or "t10k": images, float [n, 1, 28, 28] with mean 0 and deviation 1 in the former, and labels."""
    images, labels = (read_idx(folder / f"{part}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1"))
    return (images[:, None].float() / 255 - 0.286) / 0.353, labels.long()


def network() -> nn.Sequential:
    """Four convolutions, 61,000 weights: [n, 1, h, w] to the logits of ten classes."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, sparsity: float = 0.0) -> None:
    """SGD along one cosine, in place; sparsity rises from the beginning to the middle, then rests."""
    per_epoch = max(1, len(images) // BATCH)
    steps = epochs * per_epoch
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    pruner = GradualPruner(model, sparsity, begin=0, end=max(1, steps // 2), every=max(1, steps // 50))
    model.train()
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(images))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min((step + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        batch = order[step % per_epoch * BATCH :][:BATCH]
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        pruner.step()
    model.eval()


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor, batch: int = 500) -> Tensor:
    """The class of each image; `batch` divides their number, since an engine is made for one shape."""
    return torch.cat([model(part).argmax(1) for part in torch.split(images, batch)])


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prune and compile a small CNN on Fashion-MNIST.")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of the four .gz files")
    parser.add_argument("--epochs", type=int, default=4, help="of the dense training, and of the pruning again")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    images, labels = load(args.data, "train")
    test, expected = load(args.data, "t10k")

    def accuracy(model: nn.Module) -> float:
        return float((predictions(model, test) == expected).float().mean())

    start = time.perf_counter()
    torch.manual_seed(args.seed)
    parent = network()
    train(parent, images, labels, args.epochs)
    print(f"dense, {args.epochs} epochs: {accuracy(parent):.2%} ({time.perf_counter() - start:.0f} s)", flush=True)
    dense, pruned = copy.deepcopy(parent), copy.deepcopy(parent)
    train(dense, images, labels, args.epochs)
    print(f"dense, {args.epochs} more: {accuracy(dense):.2%} ({time.perf_counter() - start:.0f} s)", flush=True)
    train(pruned, images, labels, args.epochs, SPARSITY)
    print(f"pruned, {args.epochs} more: {accuracy(pruned):.2%} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(zeroskip.prune(copy.deepcopy(pruned), 0.0))

    engine = zeroskip.compile(pruned, test[:500])
    different = int((predictions(engine, test) != predictions(pruned, test)).sum())
    print(engine.plan)
    print(f"compiled: {accuracy(engine):.2%}, {different} of {len(test):,} answers differ")


if __name__ == "__main__":
    main()
