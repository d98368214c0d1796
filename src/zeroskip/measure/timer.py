"""Interleaved timing of variants in one process, on either kind of device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from zeroskip.core.device import Device
from zeroskip.core.record import Times
from zeroskip.cpu.threads import torch_threads
from zeroskip.measure import graphs

Variants = Mapping[str, Callable[[], object]]

LONG_ENOUGH_S = 1e-3
"""A sample repeats its call until it lasts this long."""
SHORT_S = 0.1
"""A call shorter than this is run once untimed before each sample: every variant then finds its own data in cache.
Without, the engine of a network of 7 ms took 7% longer behind ONNX Runtime than behind another engine, with 2%."""
BUSY_SHARE = 0.9
"""Below this share of the wall clock on the CPU, something else had it."""

DISTURBED = 1.1
"""Above this many medians, for a quarter of the samples of every variant, replays waited for somebody else's.  Of 694
cases measured on an H200 one was."""


@dataclass(frozen=True)
class Measurement:
    """Times by variant.  ``contended``: the machine did other work meanwhile, so ratios must not be quoted."""

    times: dict[str, Times]
    contended: bool


Timer = Callable[[Variants, int, Device], Measurement]
"""``timer(variants, rounds, device)``; plans take it as an argument, so that tests can bring their own clock."""


def measure(variants: Variants, rounds: int, device: Device) -> Measurement:
    """Time every variant once a round, ``rounds`` rounds, after a warm-up of each.

    On a CPU torch's operators run on the device's threads, too. With one thread the clock is the process's CPU time,
    which a busy neighbour disturbs less; with more it is the wall clock.  On a GPU see ``measure.graphs``.
    """
    if device.kind == "cuda":
        found = graphs.measure(variants, rounds)
        return Measurement(found, disturbed(found))
    with torch_threads(device.threads):
        return _measure(variants, rounds, device.threads)


def disturbed(times: Mapping[str, Times]) -> bool:
    """Whether another process seems to have used the GPU: no driver tells a container who else there is."""
    return all(
        sorted(one.samples_us)[3 * len(one.samples_us) // 4] > DISTURBED * one.median_us for one in times.values()
    )


def _measure(variants: Variants, rounds: int, threads: int) -> Measurement:
    """On a CPU."""
    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
    seconds = {name: _seconds(call) for name, call in variants.items()}
    repeats = {name: max(1, int(LONG_ENOUGH_S / one)) for name, one in seconds.items()}
    short = {name: one < SHORT_S for name, one in seconds.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    loaded = _load() > (os.cpu_count() or 1) + 0.5
    wall, busy = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        for name, call in variants.items():
            times = range(repeats[name])
            if short[name]:
                call()
            start = clock()
            for _ in times:
                call()
            samples[name].append((clock() - start) / 1e3 / repeats[name])
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    contended = loaded or busy < BUSY_SHARE * wall
    return Measurement(
        {name: Times(tuple(values), "cpu" if threads == 1 else "wall") for name, values in samples.items()}, contended
    )


def once(call: Callable[[], object], device: Device) -> float:
    """The faster of two single calls, in seconds: enough to drop hopeless candidates."""
    if device.kind == "cuda":
        return graphs.once(call)
    clock = time.process_time if device.threads == 1 else time.perf_counter
    best = float("inf")
    with torch_threads(device.threads):
        for _ in range(2):
            start = clock()
            call()
            best = min(best, clock() - start)
    return best


def _seconds(call: Callable[[], object]) -> float:
    """Of the second call, the first being a warm-up."""
    call()
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-7)


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
