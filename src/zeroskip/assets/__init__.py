"""Networks that come with the package: a denoiser, dense and with 90% zeros, and a classifier of photographs with 90%
zeros as an engine's file.  README.md says how they were trained.

Batch norm is folded into the convolutions.  Of the denoisers a tensor ``name`` with zeros is stored as ``name:mask``
and ``name:values``, as it may be in a ``.zsk`` file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from zeroskip.pack.bitmask import Bitmask

DENSE, SPARSE = "dncnn_dense.safetensors", "dncnn_sparse90.safetensors"
CLASSIFIER = "resnet18_sparse90.zsk"


class Denoiser(nn.Module):
    """DnCNN without batch norm: colour image [n, 3, h, w] in 0..1 with noise, to the same shape without.

    Source: Zhang et al. 2017, "Beyond a Gaussian Denoiser" (arXiv 1608.03981); ``zeroskip.model.zoo.dncnn`` is the
    network as it is trained.
    """

    def __init__(self, channels: int = 3, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        widths = [channels, *[width] * (depth - 1)]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        noise: Tensor = self.layers(x)
        return x - noise


def dense_denoiser() -> nn.Module:
    """The dense network, float32 (stored in half the bits), in evaluation mode."""
    return _load(DENSE)


def sparse_denoiser() -> nn.Module:
    """The network whose hidden convolutions are 90% zeros, float32, in evaluation mode."""
    return _load(SPARSE)


def classifier() -> Path:
    """The file of an engine, for ``zeroskip.load`` and ``zeroskip run``: a ResNet-18 with 90% zeros, for a CPU.

    It takes one RGB image [1, 3, 112, 112], float32 from 0 to 1, and returns the logits [1, 10] of Imagenette's
    classes, whose names the engine has as labels.
    """
    return Path(str(resources.files(__name__) / CLASSIFIER))


def about(name: str) -> dict[str, Any]:
    """What a file of this folder says about itself: training, PSNR, nonzeros per layer, licence."""
    with resources.as_file(resources.files(__name__) / name) as path, safetensors.safe_open(path, "pt") as file:
        facts: dict[str, Any] = json.loads((file.metadata() or {})["about"])
        return facts


def stored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` as it goes into a file; ``restored`` undoes it."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if bool((tensor == 0).any()):
            sparse = Bitmask.of(tensor)
            result |= {f"{name}:mask": sparse.mask, f"{name}:values": sparse.values}
        else:
            result[name] = tensor.contiguous()
    return result


def restored(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The float32 tensors of those shapes."""
    return {
        name: (
            tensors[name]
            if name in tensors
            else Bitmask(tensors[f"{name}:mask"], tensors[f"{name}:values"]).dense(shape)
        ).float()
        for name, shape in shapes.items()
    }


def _load(name: str) -> nn.Module:
    # On "meta", so that no random numbers are drawn for weights that are replaced at once.
    with torch.device("meta"):
        model = Denoiser()
    with resources.as_file(resources.files(__name__) / name) as path, safetensors.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a dict
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    model.load_state_dict(restored(tensors, shapes), assign=True)
    return model.eval()
