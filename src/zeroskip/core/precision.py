"""How vendor libraries compute on a GPU: torch's settings for TF32, sums and searches, read and held."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from zeroskip.core.layer import Precision

_HELD = threading.RLock()
"""torch's settings are the process's: two threads that hold and restore them in turns would leave each other's."""


def of_torch(kind: Literal["conv2d", "linear"]) -> Precision:
    """What torch does now to float32 operands of such a layer on a GPU: "fp32" (strict) or "tf32"."""
    return "tf32" if _level("conv" if kind == "conv2d" else "matmul") == "tf32" else "fp32"


@contextmanager
def held(precision: Precision) -> Iterator[None]:
    """torch's convolutions and matrix products on a GPU with ``precision``: "fp32" is strict, "tf32" allows TF32, and
    half precision sums in float32.  The caller's settings come back afterwards."""
    with _HELD:
        restore = _hold_sums() if precision in ("fp16", "bf16") else _hold_operands(precision == "tf32")
        try:
            yield
        finally:
            for function, *arguments in reversed(restore):
                function(*arguments)


@contextmanager
def searching() -> Iterator[None]:
    """cuDNN measures its algorithms when it first meets a shape, and remembers; the caller's setting comes back.

    Not while a graph is captured: a search waits for the GPU, and what it found before is used all the same.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        cudnn.benchmark = before


def _hold_operands(allow: bool) -> list[tuple[Any, ...]]:
    """Let float32 operands be rounded or not; the calls that undo it, last first.

    torch tells what holds, not whether it was set here or inherited from the setting above: so that one is changed
    first, and convolutions and products only where they do not follow it.
    """
    restore: list[tuple[Any, ...]] = []
    if all((_level(name) == "tf32") == allow for name in ("matmul", "conv")):
        return restore
    for name in ("all", "matmul", "conv"):
        value = _level(name)
        if name == "all" or (value == "tf32") != allow:
            inherited = name == "all" and value == torch.backends.fp32_precision  # type: ignore[attr-defined]
            restore.append((_set, name, "none" if inherited else value))
            _set(name, "tf32" if allow else "ieee")
    return restore


def _hold_sums() -> list[tuple[Any, ...]]:
    """Sum half precision in float32; the calls that undo it, last first."""
    matmul, restore = torch.backends.cuda.matmul, list[tuple[Any, ...]]()
    for setting in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
        split_k = getattr(matmul, f"{setting}_split_k")
        if getattr(matmul, setting):
            restore.append((setattr, matmul, setting, (True, split_k)))
            setattr(matmul, setting, (False, split_k))
    if matmul.allow_fp16_accumulation:
        restore.append((setattr, matmul, "allow_fp16_accumulation", True))
        matmul.allow_fp16_accumulation = False
    return restore


def _level(name: str) -> str:
    """The effective setting for "matmul", "conv" or, above both, "all": "none", "ieee" or "tf32"."""
    return str(torch._C._get_fp32_precision_getter("cuda", name))  # what torch.backends.*.fp32_precision calls


def _set(name: str, value: str) -> None:
    torch._C._set_fp32_precision_setter("cuda", name, value)
