"""What this machine can do at best: the roof that every time is held against."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from zeroskip.core.device import Device, cpu

SIDE = 1024
COPY_FLOATS = 16 * 2**20


def _fastest(call: Callable[[], object], tries: int) -> float:
    call()
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def peaks(threads: int) -> tuple[float, float]:
    """GFLOP/s of a float32 matrix product and GB/s of a copy (read plus written), with ``threads`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
        product = torch.empty(SIDE, SIDE)
        matmul = _fastest(lambda: torch.mm(a, b, out=product), 7)
        source = torch.randn(COPY_FLOATS)
        target = torch.empty_like(source)
        copy = _fastest(lambda: target.copy_(source), 5)
    finally:
        torch.set_num_threads(before)
    return 2 * SIDE**3 / matmul / 1e9, 2 * 4 * COPY_FLOATS / copy / 1e9


def this_device(threads: int) -> Device:
    """This CPU with its measured peaks."""
    gflops, gbps = peaks(threads)
    return replace(cpu(threads), peak_tflops=gflops / 1e3, bandwidth_gbps=gbps)
