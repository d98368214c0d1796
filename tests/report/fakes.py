"""A GPU without a GPU: the libraries' side of a CUDA suite, on CPU tensors, with a clock that says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch

from zeroskip.core.device import Device
from zeroskip.core.record import Times
from zeroskip.measure import others
from zeroskip.measure.timer import Measurement, Variants

L2_BYTES = 50_000


class FakeGpu(Device):
    """Says it is an NVIDIA GPU; its tensors live on the CPU."""

    @property
    def torch(self) -> torch.device:
        return torch.device("cpu")


def fake_gpu() -> FakeGpu:
    return FakeGpu(
        "cuda",
        "a fake",
        L2_BYTES,
        arch="sm_90a",
        num_sms=132,
        shared_bytes=227 * 1024,
        peak_tflops={"fp32": 50.0, "tf32": 300.0, "fp16": 700.0},
        bandwidth_gbps=2500.0,
        l2_gbps=5500.0,
    )


@dataclass
class Clock:
    """A timer: every variant takes ``times_us`` of its name, others ``otherwise``.  Keeps what it was asked to time."""

    times_us: Mapping[str, float] = field(default_factory=dict)
    otherwise: float = 10.0
    seen: list[Variants] = field(default_factory=list)

    def __call__(self, variants: Variants, rounds: int, device: Device) -> Measurement:
        self.seen.append(dict(variants))
        for call in variants.values():
            call()
        return Measurement(
            {name: Times((self.times_us.get(name, self.otherwise),) * rounds, "cuda") for name in variants}, False
        )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """What touches CUDA is replaced."""
    once: Callable[..., float] = lambda call, device: 1e-5  # noqa: E731
    monkeypatch.setattr(others, "once", once)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return fake_gpu()
