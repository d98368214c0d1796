"""Does a second-order score choose better weights than magnitude?  Measured, on Fashion-MNIST and on Imagenette.

    python -m tools.second_order --data DIR --out benchmarks/results/second_order.json
    python -m tools.second_order --network resnet18 --parents OUT/networks --data FILE.npz --out resnet18.json

Run it in the repository's folder, with `src` in PYTHONPATH. The first takes half an hour of two CPU cores (data and
network: see `examples/fashion_mnist.py`), with one threshold for all layers. The second goes on from the parents that
`tools/train` trained, as its rows do (every layer to the same sparsity), with as many changes of the masks as
`MASK_UPDATES`; some minutes of a GPU. All scores prune along the same schedule from the same parent, in training of the
same length on the same photographs. What came out: docs/PRUNING.md.

Scores of a weight w with gradients g, the lowest going first:

- `magnitude`: |w|.
- `fisher`: w^2 E[g^2], the growth of the loss by a diagonal empirical Fisher matrix. Theis et al. 2018 (arXiv
  1801.05787).
- `block`: w^2 / [F^-1], F being the empirical Fisher matrix of `BLOCK` neighbouring weights, damped. Singh & Alistarh
  2020, "WoodFisher" (arXiv 2004.14340), without its change of the other weights, which training does here.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.core import device as devices
from zeroskip.core.env import environment
from zeroskip.model.zoo.files import load_network
from zeroskip.pruning import GradualPruner, PruneConfig

from .train import cycle, photos
from .train.networks import NETWORKS
from .train.plan import PARENT, SEEDS, Job, Row, Settings

SCORES = ("magnitude", "fisher", "block")
SPARSITIES = (0.95, 0.98)
FASHION_SEEDS = tuple(range(6))
GRADIENTS, BLOCK = 64, 64
"""How many of the last steps' gradients estimate a Fisher matrix, and of how many weights."""
DAMPING = 1e-2
"""Of a Fisher matrix, as a share of its mean diagonal."""
MASK_UPDATES = 40
"""Of the rows on Imagenette: inverting the matrices of ten million weights takes most of the time."""


class Scored(GradualPruner):
    """Chooses by a score that may need the gradients of the last steps, which it sees as they come."""

    def __init__(self, score: str, model: nn.Module, sparsity: float | PruneConfig, **choices: Any) -> None:
        self._by = score
        self._seen: dict[str, deque[Tensor]] = {}
        super().__init__(model, sparsity, **choices)
        for name, layer in self._pruned.items():
            layer.weight.register_post_accumulate_grad_hook(partial(self._see, name))

    @torch.no_grad()
    def _see(self, name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        self._seen.setdefault(name, deque(maxlen=GRADIENTS)).append(weight.grad.flatten().clone())

    def _score(self, name: str, weight: Tensor) -> Tensor:
        if self._by == "magnitude" or name not in self._seen:  # the latter: a trial before training
            return super()._score(name, weight)
        gradients = torch.stack(tuple(self._seen[name])) * self._masks[name].flatten()  # what is gone cannot make up
        if self._by == "fisher":
            return weight.square() * gradients.square().mean(0).view(weight.shape)
        blocks = nn.functional.pad(gradients, (0, -weight.numel() % BLOCK)).view(len(gradients), -1, BLOCK)
        fisher = torch.einsum("gbi,gbj->bij", blocks, blocks) / len(gradients)
        diagonal = fisher.diagonal(dim1=1, dim2=2)
        fisher += torch.eye(BLOCK, device=fisher.device) * (DAMPING * diagonal.mean().clamp(min=1e-12))
        inverse = torch.linalg.inv(fisher.double()).diagonal(dim1=1, dim2=2).flatten()[: weight.numel()]
        return (weight.square() / inverse.view(weight.shape).clamp(min=1e-30)).float()


def fashion_mnist() -> ModuleType:
    """The example, whose data, network and training these are."""
    path = Path(__file__).parents[1] / "examples" / "fashion_mnist.py"
    spec = importlib.util.spec_from_file_location("fashion_mnist", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_seed(folder: Path, seed: int, epochs: int, photos: int | None) -> list[dict[str, Any]]:
    """Test accuracy of the dense opponent and of each score at each sparsity."""
    torch.set_num_threads(1)
    example = fashion_mnist()
    images, labels = (part[:photos] for part in example.load(folder, "train"))
    test, expected = (part[:photos] for part in example.load(folder, "t10k"))

    def trained(parent: nn.Module | None, score: str = "magnitude", sparsity: float = 0.0) -> tuple[nn.Module, float]:
        torch.manual_seed(seed)
        model = example.network() if parent is None else copy.deepcopy(parent)
        example.GradualPruner = partial(Scored, score, scope="global")  # type: ignore[attr-defined]
        example.train(model, images, labels, epochs, sparsity)
        right = example.predictions(model, test, min(500, len(test))) == expected
        return model, float(right.float().mean())

    parent, first = trained(None)
    found: list[dict[str, Any]] = [{"seed": seed, "score": "parent", "sparsity": 0.0, "accuracy": first}]
    found.append({"seed": seed, "score": "dense", "sparsity": 0.0, "accuracy": trained(parent)[1]})
    for sparsity in SPARSITIES:
        for score in SCORES:
            accuracy = trained(parent, score, sparsity)[1]
            found.append({"seed": seed, "score": score, "sparsity": sparsity, "accuracy": accuracy})
            print(f"seed {seed}, {sparsity:.0%}, {score}: {accuracy:.2%}", file=sys.stderr, flush=True)
    return found


def one_seed_of(
    network: str, parents: Path, data: Path, settings: Settings, seed: int, device: torch.device
) -> list[dict[str, Any]]:
    """The same of magnitude and blocks for a network on Imagenette at 95%, beside the accuracy on the hold-out part."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    pictures = photos.load(data, device, settings.photos)
    found: list[dict[str, Any]] = []
    for score in ("magnitude", "block"):
        job = Job(network, Row(f"by-{score}", PruneConfig(SPARSITIES[0])), seed)
        parent = load_network(parents / f"{network}-{PARENT}-s{seed}.safetensors").model
        parent.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        cycle.GradualPruner = partial(Scored, score)  # type: ignore[assignment, misc]
        one = cycle.Cycle(job, parent, pictures, settings, parents / f"{job.name}.pt")
        one.run(cycle.Budget(float("inf")))
        right = {"accuracy": cycle.accuracy(one.model, pictures.test)}
        right["holdout"] = cycle.accuracy(one.model, pictures.holdout)
        found.append({"seed": seed, "score": score, "sparsity": SPARSITIES[0], **right})
        print(f"seed {seed}, {score}: {right}, {one.watch.seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def summary(found: Sequence[dict[str, Any]]) -> list[str]:
    """Means over the seeds, and by how many points each seed is better than magnitude."""

    def of(score: str, sparsity: float) -> list[float]:
        return [100 * one["accuracy"] for one in found if (one["score"], one["sparsity"]) == (score, sparsity)]

    lines = []
    for score, sparsity in dict.fromkeys((one["score"], one["sparsity"]) for one in found):
        accuracies = of(score, sparsity)
        gains = [a - b for a, b in zip(accuracies, of("magnitude", sparsity), strict=False)]
        each = ", ".join(f"{gain:+.2f}" for gain in gains)
        lines.append(f"{sparsity:.0%} {score:10} {statistics.mean(accuracies):.2f}  ({each})")
    return lines


def main(words: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m tools.second_order",
        description=about[0],
        epilog=about[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=fashion_mnist().FOLDER, help="folder of the four .gz files")
    parser.add_argument("--network", choices=NETWORKS, help="on Imagenette; --data is its .npz then")
    parser.add_argument("--parents", type=Path, help="folder of the parents that tools/train wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4, help="on Fashion-MNIST, of the parent and of every row again")
    parser.add_argument("--photos", type=int, help="take so many of each part, for a trial")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0 to 5, on Imagenette 0 to 2")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(words)
    settings: dict[str, Any] = {"photos": args.photos, "gradients": GRADIENTS, "block": BLOCK}
    work: Callable[[int], list[dict[str, Any]]]
    if args.network is None:
        device, seeds, settings["epochs"] = devices.cpu(1), FASHION_SEEDS, args.epochs
        work = partial(one_seed, args.data, epochs=args.epochs, photos=args.photos)
    elif args.parents is None:
        parser.error("--network goes on from parents: name their folder with --parents")
    else:
        device = devices.cuda() if torch.cuda.is_available() else devices.cpu(torch.get_num_threads())
        cycle_settings = Settings(photos=args.photos, mask_updates=MASK_UPDATES)
        seeds, settings["training"] = SEEDS, asdict(cycle_settings)
        work = partial(one_seed_of, args.network, args.parents, args.data, cycle_settings, device=device.torch)
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        found = [row for rows in pool.map(work, args.seeds or seeds) for row in rows]
    args.out.write_text(
        json.dumps({"environment": environment(device), "settings": settings, "rows": found}, indent=1) + "\n"
    )
    print("\n".join(summary(found)))


if __name__ == "__main__":
    main()
