"""The photographs: decoded once, held on the device, cut and flipped there."""

from __future__ import annotations

import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in 0..1, by channel: what networks of the zoo usually expect."""
HELD_OUT = 10
"""Every tenth photograph of each class of the training part is held out, for choosing."""
AREA, RATIO = (0.35, 1.0), (3 / 4, 4 / 3)
"""Of a crop: its part of the photograph's area, and its width over its height."""


@dataclass(frozen=True)
class Part:
    """uint8 [n, 3, h, w] and labels, int64 [n], on one device."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Photos:
    """To train with, to choose by, and to look at once, at the end."""

    train: Part
    holdout: Part
    test: Part
    classes: int


def load(path: Path, device: torch.device, count: int | None = None) -> Photos:
    """Decode every photograph of an .npz of WebP files (`blob`, `off`, `label`, `is_val`).

    Its validation part becomes the test part. `count` takes as many of each part, evenly spaced, for a trial.

    Raises FileNotFoundError and KeyError where the file is missing or another one.
    """
    with np.load(path) as data:
        blob, offsets, labels, is_val = (data[name] for name in ("blob", "off", "label", "is_val"))
    train, held_out = split(np.flatnonzero(~is_val), labels)

    def decode(index: int) -> NDArray[np.uint8]:
        webp = blob[offsets[index] : offsets[index + 1]].tobytes()
        return np.asarray(Image.open(io.BytesIO(webp)).convert("RGB"))

    def part(indices: NDArray[np.int64]) -> Part:
        indices = thinned(indices, count)
        images = torch.from_numpy(np.stack(list(pool.map(decode, indices)))).permute(0, 3, 1, 2).contiguous()
        return Part(images.to(device), torch.from_numpy(labels[indices].astype(np.int64)).to(device))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without holding Python's lock
        return Photos(part(train), part(held_out), part(np.flatnonzero(is_val)), int(labels.max()) + 1)


def split(indices: NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What to train with and what to hold out: the last of every ten of a class, in the order of the file."""
    held_out = np.zeros(len(indices), bool)
    for label in np.unique(labels[indices]):
        places = np.flatnonzero(labels[indices] == label)
        held_out[places[HELD_OUT - 1 :: HELD_OUT]] = True
    return indices[~held_out], indices[held_out]


def thinned(indices: NDArray[np.int64], count: int | None) -> NDArray[np.int64]:
    if count is None or count >= len(indices):
        return indices
    places = np.linspace(0, len(indices) - 1, count).astype(int)
    thin: NDArray[np.int64] = indices[places]
    return thin


def normalized(images: Tensor) -> Tensor:
    """What a network takes, float [n, 3, h, w] with channels last in memory, from uint8."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """As `normalized`, of random crops stretched to the whole size, half of them mirrored.

    Crops have `AREA` of the photograph, drawn evenly, and a width over height within `RATIO`, drawn evenly on a
    logarithmic scale; what is too wide or high for the photograph is cut to it.

    Source: Szegedy et al. 2015, "Going Deeper with Convolutions" (arXiv 1409.4842), section 6.
    """

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), device=images.device, generator=generator)

    area, ratio = draw(*AREA), draw(math.log(RATIO[0]), math.log(RATIO[1])).exp()
    # Half sides and centre in the units of affine_grid, where the photograph reaches from -1 to 1.
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = draw(-1, 1) * (1 - width), draw(-1, 1) * (1 - height)
    mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(x)
    places = torch.stack([width * mirror, zero, x, zero, height, y], 1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(places, list(images.shape), align_corners=False)
    crops = nn.functional.grid_sample(normalized(images), grid, padding_mode="border", align_corners=False)
    return crops.contiguous(memory_format=torch.channels_last)
