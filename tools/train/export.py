"""Make an engine of a trained network, which `zeroskip run` classifies photographs with.

    python -m tools.train.export out/train/networks/resnet18-unstructured-90-s0.safetensors --out resnet18.zsk
    zeroskip run resnet18.zsk --input photo.jpg

Run it in the repository's folder, with `src` in PYTHONPATH. The engine is for a CPU and one thread, takes one image
[1, 3, 112, 112] with values from 0 to 1, and knows the names of Imagenette's ten classes. Its weights are float16
numbers once more: folding batch norm has changed them. It is planned for vectors of 8 floats (AVX2), also where the CPU
has longer ones: on other machines those would be slow. With --data the accuracy of the file is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

import zeroskip
from zeroskip.core import device
from zeroskip.core.atomic import replace_file
from zeroskip.core.errors import SaveError, ZeroskipError
from zeroskip.model.zoo.files import build_network, load_network
from zeroskip.run.file import contents
from zeroskip.run.rounding import rounded

from . import photos

LABELS = (
    "tench",
    "English springer",
    "cassette player",
    "chain saw",
    "church",
    "French horn",
    "garbage truck",
    "gas pump",
    "golf ball",
    "parachute",
)
"""Of Imagenette, by label."""
IMAGE = (1, 3, 112, 112)
LANES, REGISTERS = 8, 16
"""Of AVX2."""
MOST_BYTES = 16_000_000


class OfPixels(nn.Module):
    """A network that takes pixels as they are, from 0 to 1.

    Mean and deviation are not folded into the first convolution: its zero padding stands for the mean.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # In float64 until here: (x - mean) / std in two operations instead of three.
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (photos.MEAN, photos.STD))
        self.register_buffer("scale", (1 / std).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x * self.scale + self.shift)
        return y


@contextmanager
def portable() -> Iterator[None]:
    """Plan for vectors as AVX2 has them, whatever this CPU has."""
    name, lanes, registers, *caches = device._cpu_facts()
    facts = (name, min(lanes, LANES), min(registers, REGISTERS), *caches)
    with patch.object(device, "_cpu_facts", lambda: facts):
        yield


def export(source: Path, to: Path, labels: Sequence[str] = LABELS) -> None:
    """Write the engine of a network file, and say how large it is.

    Raises:
        FileFormatError: `source` holds no network.
        ValueError: it has another number of classes than there are labels.
        SaveError: the file would be larger than `MOST_BYTES`; it is not written.
    """
    saved = load_network(source)
    with portable():
        engine = zeroskip.compile(OfPixels(saved.model).eval(), torch.rand(IMAGE), threads=1, labels=labels)
    to.parent.mkdir(parents=True, exist_ok=True)
    data = contents([rounded(variant) for variant in engine.variants], engine.labels)
    if (size := len(data)) > MOST_BYTES:
        raise SaveError(f"{to} would have {size:,} bytes, at most {MOST_BYTES:,} are wanted: prune more")
    replace_file(to, data)
    with torch.device("meta"):
        dense = sum(tensor.nbytes for tensor in build_network(saved.network, saved.classes).state_dict().values())
    print(f"{to}: {size / 1e6:.2f} MB, {size / dense:.1%} of the {dense / 1e6:.2f} MB of dense fp32")
    print("\n".join(engine.plan.summary()))


@torch.no_grad()
def accuracy(engine: nn.Module, part: photos.Part) -> float:
    """Top-1, a fraction, one image after the other."""
    guesses = [int(engine(image[None].float() / 255).argmax()) for image in part.images]
    return float((torch.tensor(guesses) == part.labels).double().mean())


def main(words: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m tools.train.export",
        description=about[0],
        epilog=about[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("network", type=Path, help="NETWORK.safetensors of tools.train")
    parser.add_argument("--out", type=Path, required=True, help="where the engine goes: model.zsk")
    parser.add_argument("--data", type=Path, help="imagenette112_webp80.npz, to measure the test accuracy of the file")
    parser.add_argument("--photos", type=int, help="take so many of its photographs, for a trial")
    args = parser.parse_args(words)
    try:
        export(args.network, args.out)
        if args.data is not None:
            test = photos.load(args.data, torch.device("cpu"), args.photos).test
            found = accuracy(zeroskip.load(args.out), test)
            print(f"test accuracy {found:.2%} of {len(test.labels):,} photographs")
    except (ZeroskipError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
