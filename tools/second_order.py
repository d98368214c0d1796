"""Do second-order scores choose better weights than magnitude?  Measured on Fashion-MNIST.

    python -m tools.second_order --data DIR --out benchmarks/results/second_order.json

Run it in the repository's folder, with `src` in PYTHONPATH; half an hour of two CPU cores (data and network: see
`examples/fashion_mnist.py`). Both scores prune along the same schedule from the same parent, with one threshold for all
layers, in training of the same length on the same photographs. What came out: docs/PRUNING.md, beside the same question
on Imagenette, where both scores are rows of `tools/train`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from torch import nn

from zeroskip.core.device import cpu
from zeroskip.core.env import environment
from zeroskip.pruning import GradualPruner
from zeroskip.pruning.fisher import Score

SCORES: tuple[str, ...] = get_args(Score)
SPARSITIES = (0.95, 0.98)
SEEDS = tuple(range(6))


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
        example.GradualPruner = partial(GradualPruner, scope="global", score=score)  # type: ignore[attr-defined]
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


def summary(found: Sequence[dict[str, Any]]) -> list[str]:
    """Means over the seeds, and by how many points each seed is better than magnitude."""

    def of(score: str, sparsity: float) -> list[float]:
        return [100 * one["accuracy"] for one in found if (one["score"], one["sparsity"]) == (score, sparsity)]

    lines = [f"dense {statistics.mean(of('dense', 0.0)):.2f}"]
    for sparsity in SPARSITIES:
        for score in SCORES:
            gains = [a - b for a, b in zip(of(score, sparsity), of("magnitude", sparsity), strict=True)]
            each = ", ".join(f"{gain:+.2f}" for gain in gains)
            lines.append(f"{sparsity:.0%} {score:10} {statistics.mean(of(score, sparsity)):.2f}  ({each})")
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
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4, help="of the parent, and of every row again")
    parser.add_argument("--photos", type=int, help="take so many of each part, for a trial")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(words)
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        jobs = [pool.submit(one_seed, args.data, seed, args.epochs, args.photos) for seed in SEEDS]
        found = [row for job in jobs for row in job.result()]
    settings = {"epochs": args.epochs, "photos": args.photos}
    facts = environment(cpu(1))
    args.out.write_text(json.dumps({"environment": facts, "settings": settings, "rows": found}, indent=1) + "\n")
    print("\n".join(summary(found)))


if __name__ == "__main__":
    main()
