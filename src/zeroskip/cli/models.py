"""Networks and weights by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zeroskip.core.errors import FileFormatError

if TYPE_CHECKING:
    import torch
    from torch import nn


def build(name: str, weights: Path | None) -> nn.Module:
    """The zoo's network ``name`` in evaluation mode, with ``weights`` (a safetensors state dict) or random ones.

    Raises:
        ValueError: no such network, or the weights are another network's.
        FileFormatError: not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from zeroskip.model.zoo import BUILDERS

    if name not in BUILDERS:
        raise ValueError(f"no network is called {name!r}; there are {', '.join(BUILDERS)}")
    model = BUILDERS[name]().eval()
    if weights is not None:
        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise FileFormatError(
                f"{weights}: not a safetensors file ({error}); save one with "
                "safetensors.torch.save_file(model.state_dict(), path)"
            ) from error
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{weights}: not the weights of {name}: {error}") from error
    return model


def place(device: str) -> torch.device:
    """The device "cpu" or "cuda".

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    from zeroskip.core.device import cuda

    return torch.device("cpu") if device == "cpu" else cuda().torch
