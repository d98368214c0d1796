"""torch's settings are held during a call and come back, also what is inherited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from zeroskip.core.layer import Precision
from zeroskip.core.precision import held, of_torch

GENERIC, MATMUL, CUDNN = torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn
CONV: Any = CUDNN.conv  # type: ignore[attr-defined]
SETTINGS: dict[str, Callable[[], object]] = {
    "as torch starts": lambda: None,
    "all on": lambda: setattr(GENERIC, "fp32_precision", "tf32"),
    "cuda on": lambda: setattr(CUDNN, "fp32_precision", "tf32"),
    "cuda off": lambda: setattr(CUDNN, "fp32_precision", "ieee"),
    "products on": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "sums in half precision, in one piece": lambda: setattr(MATMUL, "allow_fp16_accumulation", True),
    "no split sums": lambda: setattr(MATMUL, "allow_fp16_reduced_precision_reduction", (False, False)),
}


def settings() -> list[object]:
    """Everything that ``held`` may change, and how it answers to a change of the most general setting."""
    before, found = GENERIC.fp32_precision, list[object]()
    for value in (before, "tf32", "ieee", "none"):
        GENERIC.fp32_precision = value
        found += [MATMUL.fp32_precision, CONV.fp32_precision, CUDNN.fp32_precision, GENERIC.fp32_precision]
    GENERIC.fp32_precision = before
    for name in ("fp16", "bf16"):
        setting = f"allow_{name}_reduced_precision_reduction"
        found += [getattr(MATMUL, setting), getattr(MATMUL, f"{setting}_split_k")]
    return [*found, MATMUL.allow_fp16_accumulation]


@pytest.fixture(autouse=True)
def _settings_of_the_session() -> Iterator[None]:
    """A process of its own would be cleaner; what is set explicitly stays explicit, with the value it had."""
    levels = [(one, one.fp32_precision) for one in (GENERIC, CUDNN, MATMUL, CONV)]
    half = MATMUL.allow_fp16_reduced_precision_reduction, MATMUL.allow_fp16_reduced_precision_reduction_split_k
    accumulation = MATMUL.allow_fp16_accumulation
    yield
    for one, value in levels:
        one.fp32_precision = value
    MATMUL.allow_fp16_reduced_precision_reduction = half
    MATMUL.allow_fp16_accumulation = accumulation


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_held_and_come_back(name: str, precision: Precision) -> None:
    SETTINGS[name]()
    before = settings()
    with held(precision):
        if precision in ("fp32", "tf32"):
            assert of_torch("conv2d") == of_torch("linear") == precision
        else:
            assert not MATMUL.allow_fp16_reduced_precision_reduction
            assert not MATMUL.allow_bf16_reduced_precision_reduction
            assert not MATMUL.allow_fp16_accumulation
    assert settings() == before


def test_settings_come_back_after_an_error() -> None:
    before = settings()
    with pytest.raises(RuntimeError), held("tf32"):
        raise RuntimeError
    assert settings() == before
