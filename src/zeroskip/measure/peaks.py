"""What this machine can do at best: the roof that every time is held against."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from zeroskip.core import precision
from zeroskip.core.device import Device, cpu, cuda
from zeroskip.core.layer import PRECISION_DTYPES, Precision
from zeroskip.cpu.threads import torch_threads
from zeroskip.measure import graphs
from zeroskip.measure.turns import turn

SIDE = {"cpu": 1024, "cuda": 8192}
COPY_FLOATS = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
L2_READS, L2_FLOATS = 64, 2**20
"""The cache's rate: every block reads the same 4 MiB again and again, past its own L1."""


def _fastest(call: Callable[[], object], tries: int) -> float:
    call()
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def _cpu_peaks(threads: int) -> tuple[float, float]:
    """TFLOP/s of a float32 matrix product and GB/s of a copy (read plus written), with ``threads`` threads."""
    side = SIDE["cpu"]
    with torch_threads(threads):
        a, b = torch.randn(side, side), torch.randn(side, side)
        product = torch.empty(side, side)
        matmul = _fastest(lambda: torch.mm(a, b, out=product), 7)
        source = torch.randn(COPY_FLOATS["cpu"])
        target = torch.empty_like(source)
        copy = _fastest(lambda: target.copy_(source), 5)
    return 2 * side**3 / matmul / 1e12, 2 * 4 * COPY_FLOATS["cpu"] / copy / 1e9


@functools.cache
def _cuda_peaks() -> tuple[dict[str, float], float, float]:
    """TFLOP/s of matrix products by precision, GB/s of a copy (read plus written), GB/s out of the L2 cache."""
    with turn(cuda()):
        side = SIDE["cuda"]
        tflops: dict[str, float] = {}
        precisions: tuple[Precision, ...] = ("fp32", "tf32", "fp16")
        for name in precisions:
            a = torch.randn(side, side, device="cuda").to(PRECISION_DTYPES[name])
            b, product = a.t().contiguous(), torch.empty_like(a)
            with precision.held(name):
                multiply = functools.partial(torch.mm, a, b, out=product)
                multiply()
                tflops[name] = 2 * side**3 / graphs.once(multiply) / 1e12
        source = torch.randn(COPY_FLOATS["cuda"], device="cuda")
        target = torch.empty_like(source)
        # A kernel that reads and writes: in a graph a copy is another kind of node, which ran at 2.4 instead of 3.0
        # TB/s.
        negate = functools.partial(torch.neg, source, out=target)
        negate()
        copy = graphs.once(negate)
        return tflops, 2 * 4 * COPY_FLOATS["cuda"] / copy / 1e9, _l2_gbps(cuda())


def _l2_gbps(device: Device) -> float:
    from zeroskip.cuda.compile import build
    from zeroskip.cuda.launch import load

    kernel = load(build(Path(__file__).with_name("l2.cuh"), "zeroskip::read_again", device.arch))
    source, sums = torch.randn(L2_FLOATS, device="cuda"), torch.empty(8 * device.num_sms, device="cuda")
    grid, block = (8 * device.num_sms, 1, 1), (256, 1, 1)

    def read() -> None:
        kernel.launch(grid, block, (source, sums, L2_FLOATS // 4, L2_READS))

    read()
    return grid[0] * L2_READS * 4 * L2_FLOATS / graphs.once(read) / 1e9


def this_cpu(threads: int) -> Device:
    """This CPU with its measured peaks."""
    tflops, gbps = _cpu_peaks(threads)
    return replace(cpu(threads), peak_tflops={"fp32": tflops}, bandwidth_gbps=gbps)


def this_gpu() -> Device:
    """The current GPU with its measured peaks."""
    tflops, gbps, l2 = _cuda_peaks()
    return replace(cuda(), peak_tflops=tflops, bandwidth_gbps=gbps, l2_gbps=l2)
