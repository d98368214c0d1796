"""Whole models against each other, also those that no graph can hold."""

from __future__ import annotations

import time

import torch

from zeroskip.core.device import Device
from zeroskip.core.record import Times
from zeroskip.measure.timer import Measurement, Variants, measure
from zeroskip.run.graphs import WARM_UPS, in_capture_thread


def compare(variants: Variants, rounds: int, device: Device, captured: bool = True) -> Measurement:
    """``measure.timer.measure``, on a GPU in the capture thread; the wall clock for calls that cannot be ``captured``.

    That goes from an idle GPU to an idle GPU, and so holds what launching from Python costs.
    """
    if device.kind == "cpu":
        return measure(variants, rounds, device)

    def there() -> Measurement:
        for _ in range(WARM_UPS):
            for call in variants.values():
                call()
        return measure(variants, rounds, device) if captured else _waiting(variants, rounds)

    return in_capture_thread(there)


def _waiting(variants: Variants, rounds: int) -> Measurement:
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            call()
            torch.cuda.synchronize()
            samples[name].append((time.perf_counter_ns() - start) / 1e3)
    return Measurement({name: Times(tuple(found), "wall") for name, found in samples.items()}, False)
