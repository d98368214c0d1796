"""The machine a plan is made for."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MOST_THREADS = 1024


@dataclass(frozen=True)
class Device:
    """A CPU with the number of threads it is used with.

    The peaks are those of ``threads`` threads together, as measured by ``zeroskip doctor``; 0 means not measured.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    threads: int
    vector_floats: int
    """Floats in one vector register."""
    vector_registers: int
    l1_bytes: int
    l2_bytes: int
    peak_tflops: float = 0.0
    bandwidth_gbps: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads must be in 1..{MOST_THREADS}, got {self.threads}")


@functools.cache
def _cpu_facts() -> tuple[str, int, int, int, int]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name":
                name = value.strip()
            elif field.strip() in ("flags", "Features"):
                flags = set(value.split())
            elif not line:
                break
    lanes, registers = (16, 32) if "avx512f" in flags else (8, 16) if "avx2" in flags else (4, 16)
    if platform.machine() in ("arm64", "aarch64"):
        lanes, registers = 4, 32
    return name, lanes, registers, _cache_bytes("1", 32 * 1024), _cache_bytes("2", 512 * 1024)


def _cache_bytes(level: str, fallback: int) -> int:
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "level").read_text().strip() == level and (index / "type").read_text().strip() != "Instruction":
            text = (index / "size").read_text().strip()
            return int(text[:-1]) * 1024 if text.endswith("K") else int(text)
    return fallback


def cpu(threads: int) -> Device:
    """This machine's CPU used with ``threads`` threads."""
    name, lanes, registers, l1, l2 = _cpu_facts()
    model = f"{name} ({os.cpu_count()} cores)"
    return Device("cpu", model, threads, lanes, registers, l1, l2)
