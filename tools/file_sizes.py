"""The table of docs/FILE_FORMAT.md: what pruned networks take as files, and how long their tensors take to read.

    python tools/file_sizes.py [network ...]

Networks of the zoo with random weights, batch norm folded, pruned in one shot to each sparsity; sizes depend on where
the zeros are and how many, hardly on the values of the others (gzip's excepted, as float32 values hardly compress).
"""

from __future__ import annotations

import gzip
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from zeroskip.model.passes import simplify
from zeroskip.model.trace import trace
from zeroskip.model.zoo import BUILDERS
from zeroskip.pack.smallest import FORMS, Form, restored, stored
from zeroskip.pruning import prune

NETWORKS = ("resnet18", "resnet50", "mobilenet_v1", "vgg19")
SPARSITIES = (0.7, 0.8, 0.9, 0.95, 0.98)
READS = 5
"""Times each file is read, in turns."""


def tensors_of(network: str, sparsity: float) -> dict[str, Tensor]:
    """As an engine would save them."""
    torch.manual_seed(0)
    model = BUILDERS[network]().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # As after training: without it every folded bias is zero.
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.9, 1.1)  # type: ignore[arg-type]
    prune(model, sparsity)
    return simplify(trace(model, (torch.randn(1, 3, 224, 224),))).tensors


def arrays_of(tensors: Mapping[str, Tensor], forms: Mapping[str, Callable[[Tensor], Form]]) -> dict[str, Tensor]:
    return {part: array for name, tensor in tensors.items() for part, array in stored(name, tensor, forms).items()}


def read(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor from the file, in full."""
    with safetensors.safe_open(path, framework="pt") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    return {
        name: restored(arrays, name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }


def unzipped(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load(gzip.decompress(path.read_bytes()))


def row(network: str, sparsity: float, folder: Path) -> str:
    tensors = tensors_of(network, sparsity)
    files = {"dense": arrays_of(tensors, {})}
    files |= {name: arrays_of(tensors, {name: form}) for name, form in FORMS.items()}
    files["smallest"] = arrays_of(tensors, FORMS)
    files["smallest, fp16"] = arrays_of({name: tensor.half().float() for name, tensor in tensors.items()}, FORMS)
    for name, arrays in files.items():
        safetensors.torch.save_file(arrays, folder / name)
    (folder / "gzip").write_bytes(gzip.compress((folder / "dense").read_bytes(), 6, mtime=0))

    timed: dict[str, Callable[[], dict[str, Tensor]]] = {
        "dense": lambda: read(folder / "dense", tensors),
        "gzip": lambda: unzipped(folder / "gzip"),
        "bitmask": lambda: read(folder / "bitmask", tensors),
        "smallest": lambda: read(folder / "smallest", tensors),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(READS):
        for name, call in timed.items():
            started = time.perf_counter()
            for tensor in call().values():
                tensor.sum()  # a dense file is mapped into memory: only this reads it
            seconds[name].append(time.perf_counter() - started)

    again = read(folder / "smallest", tensors)
    for name, tensor in tensors.items():
        assert torch.equal(again[name].view(torch.int32), tensor.contiguous().view(torch.int32)), name
    size = {path.name: path.stat().st_size for path in folder.iterdir()}
    cells = [f"{network} {sparsity:.0%}", f"{size['dense'] / 1e6:.2f}"]
    cells += [
        f"{size[name] / 1e6:.2f} ({size[name] / size['dense']:.1%})"
        for name in ("gzip", *FORMS, "smallest", "smallest, fp16")
    ]
    cells += [f"{statistics.median(seconds[name]) * 1e3:.0f}" for name in timed]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    torch.set_num_threads(1)
    head = ["MB (of dense)", "dense", "gzip -6", *FORMS, "smallest", "smallest, fp16"]
    head += [f"ms {name}" for name in ("dense", "gzip", "bitmask", "smallest")]
    print(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    for network in sys.argv[1:] or NETWORKS:
        for sparsity in SPARSITIES:
            with tempfile.TemporaryDirectory() as folder:
                print(row(network, sparsity, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
