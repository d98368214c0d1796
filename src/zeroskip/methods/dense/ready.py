"""Whether Triton can be used here."""

from __future__ import annotations

import functools
import importlib.util
import subprocess

import torch


@functools.cache
def triton_runs() -> bool:
    """Whether there is a GPU that Triton compiles for and launches on: tried once, as it needs a C compiler too."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    try:
        from zeroskip.methods.dense import pointwise

        tried = torch.full((1,), -1.0, device="cuda")
        pointwise.apply(tried, None, "relu", "none", None, 1)
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError):
        return False
    return not tried.item()
