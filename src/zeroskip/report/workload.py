"""What a case of a suite runs on: weights, networks, images; deterministic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zeroskip.core.env import data_folder
from zeroskip.core.layer import PRECISION_DTYPES
from zeroskip.model.zoo import BUILDERS
from zeroskip.model.zoo.files import load_network
from zeroskip.pruning import prune
from zeroskip.pruning.masks import select
from zeroskip.report.suite import NETWORK_FILE, BenchCase


def missing_data(case: BenchCase) -> Path | None:
    """The file of trained weights that the case names, where it does not exist."""
    if not case.mask.startswith("trained:"):
        return None
    path = data_folder() / case.mask.split(":")[1]
    return None if path.is_file() else path


def layer_weight(case: BenchCase) -> Tensor:
    """``[k, c / groups, r, s]`` on the CPU with the case's mask, rounded to the case's precision."""
    shape, dtype = case.shape.weight_shape, PRECISION_DTYPES[case.precision]
    generator = torch.Generator().manual_seed(1)
    if case.mask.startswith("trained:"):
        _, file, key = case.mask.split(":")
        with np.load(data_folder() / file) as data:
            weight = torch.from_numpy(data[key].astype(np.float32)).reshape(shape)
        return weight.to(dtype)
    weight = torch.randn(shape, generator=generator)
    scores = torch.rand(shape, generator=generator)
    if case.mask == "clustered":
        k, c, r, s = shape
        blocks = torch.rand((-(-k // 4), -(-c // 4), r, s), generator=generator)
        scores = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)[:k, :c]
    elif case.mask == "2:4":
        (kept,) = select([case.name], [scores], case.mask, 0.5, "layer")
        return torch.where(kept, weight, 0.0).to(dtype)
    elif case.mask != "random":
        raise ValueError(f"mask must be random, clustered, 2:4 or trained:FILE:KEY, got {case.mask!r}")
    keep = max(1, round(case.density * weight.numel()))
    threshold = scores.flatten().kthvalue(weight.numel() - keep + 1).values
    return torch.where(scores >= threshold, weight, 0.0).to(dtype)


def layer_bias(case: BenchCase) -> Tensor:
    """``[k]`` in the case's precision."""
    bias = torch.randn(case.k, generator=torch.Generator().manual_seed(3))
    return bias.to(PRECISION_DTYPES[case.precision])


def model_of(case: BenchCase) -> nn.Module:
    """The network of a ``model`` or ``load`` case, float32 on the CPU, pruned as the case says, in evaluation mode."""
    torch.manual_seed(0)
    if case.model == "denoiser":
        from zeroskip.assets import sparse_denoiser

        return sparse_denoiser().eval()
    if case.mask.startswith("trained:") and case.mask.endswith(NETWORK_FILE):
        path = data_folder() / case.mask.removeprefix("trained:")
        saved = load_network(path)
        if saved.network != case.model:
            raise ValueError(f"{path} holds {saved.network}, the case {case.name} is about {case.model}")
        return saved.model
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
    """float32 on the CPU."""
    return torch.randn((case.batch, *case.image), generator=torch.Generator().manual_seed(2))
