"""Suites: which cases a benchmark runs, as data."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from zeroskip.core.env import data_folder
from zeroskip.core.errors import FileFormatError
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import ConvShape
from zeroskip.model.zoo import BUILDERS
from zeroskip.pruning import prune

BASELINES = ("torch", "torch_channels_last", "inductor", "onnxruntime")


@dataclass(frozen=True)
class BenchCase:
    """One row of a suite.

    A ``layer`` is a convolution with bias and ReLU, ``c`` to ``k`` channels on ``h x w``; a ``model`` a zoo network (or
    ``denoiser``, which ships with the package) on ``image``; a ``load`` the time to open that model's ``.zsk`` file.

    ``mask``: "random" (uniform), "clustered" (whole 4x4 blocks of output x input channels), or "trained:FILE:KEY" of
    the data folder (for models "trained:FILE", a state dict).  ``density`` is ignored for trained masks.
    """

    kind: Literal["layer", "model", "load"]
    name: str
    density: float = 0.1
    mask: str = "random"
    batch: int = 1
    threads: int = 1
    c: int = 0
    k: int = 0
    h: int = 0
    w: int = 0
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    model: str = ""
    image: tuple[int, ...] = (3, 224, 224)
    baselines: tuple[str, ...] = BASELINES
    rounds: int = 31

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if unknown := set(self.baselines) - set(BASELINES):
            raise ValueError(f"unknown baselines {sorted(unknown)}; there are {BASELINES}")
        if self.kind != "layer" and self.model not in (*BUILDERS, "denoiser"):
            raise ValueError(f"no model is called {self.model!r}; there are {sorted(BUILDERS)} and denoiser")

    @property
    def facts(self) -> dict[str, Any]:
        """The case as it is written into a record."""
        layer_only = {"c", "k", "h", "w", "kernel", "stride", "padding", "groups"}
        hidden = {"baselines", "rounds"} | ({"model", "image"} if self.kind == "layer" else layer_only)
        return {name: value for name, value in to_json(self).items() if name not in hidden}

    @property
    def shape(self) -> ConvShape:
        return ConvShape(
            self.batch,
            self.c,
            self.h,
            self.w,
            self.k,
            self.kernel,
            self.kernel,
            (self.stride, self.stride),
            (self.padding, self.padding),
            (1, 1),
            self.groups,
        )


@dataclass(frozen=True)
class Suite:
    name: str
    cases: tuple[BenchCase, ...] = field(default=())


def read_suite(path: Path) -> Suite:
    """The suite in a TOML file of ``[[case]]`` tables.

    Raises:
        FileFormatError: no TOML, no case, an unknown field or a bad value; the case is named by its number.
    """
    try:
        document = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise FileFormatError(f"{path} is no TOML: {error}") from error
    rows = document.get("case")
    if not isinstance(rows, list) or not rows:
        raise FileFormatError(f"{path} has no [[case]] table; see benchmarks/suites for examples")
    return Suite(
        path.stem, tuple(from_json(BenchCase, row, f"{path.name}: case {index + 1}") for index, row in enumerate(rows))
    )


def layer_weight(case: BenchCase) -> Tensor:
    """float32 ``[k, c / groups, r, s]`` with the case's mask; deterministic."""
    shape = case.shape.weight_shape
    generator = torch.Generator().manual_seed(1)
    if case.mask.startswith("trained:"):
        _, file, key = case.mask.split(":")
        with np.load(data_folder() / file) as data:
            weight = torch.from_numpy(data[key].astype(np.float32)).reshape(shape)
        return weight
    weight = torch.randn(shape, generator=generator)
    scores = torch.rand(shape, generator=generator)
    if case.mask == "clustered":
        k, c, r, s = shape
        blocks = torch.rand((-(-k // 4), -(-c // 4), r, s), generator=generator)
        scores = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)[:k, :c]
    elif case.mask != "random":
        raise ValueError(f"mask must be random, clustered or trained:FILE:KEY, got {case.mask!r}")
    keep = max(1, round(case.density * weight.numel()))
    threshold = scores.flatten().kthvalue(weight.numel() - keep + 1).values
    return torch.where(scores >= threshold, weight, 0.0)


def model_of(case: BenchCase) -> nn.Module:
    """The network of a ``model`` or ``load`` case, pruned as the case says, in evaluation mode."""
    torch.manual_seed(0)
    if case.model == "denoiser":
        from zeroskip.assets import sparse_denoiser

        return sparse_denoiser().eval()
    if case.mask.startswith("trained:"):
        options = {"classifier_padding": 1} if case.model == "squeezenet1_0" else {}
        model = BUILDERS[case.model](**options)
        with np.load(data_folder() / case.mask.split(":")[1]) as data:
            model.load_state_dict({key: torch.from_numpy(data[key].astype(np.float32)) for key in data.files})
        return model.eval()
    model = BUILDERS[case.model]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # As after training: statistics that are not the identity.
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.9, 1.1)  # type: ignore[arg-type]
    if case.density < 1:
        prune(model, 1 - case.density)
    return model.eval()


def example_of(case: BenchCase) -> Tensor:
    return torch.randn((case.batch, *case.image), generator=torch.Generator().manual_seed(2))
