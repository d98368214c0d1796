"""The machine a plan is made for."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

MOST_THREADS = 1024


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of the machine: a CPU with the number of threads it is used with, or one NVIDIA GPU.

    The peaks are measured by ``zeroskip doctor`` (a CPU's with ``threads`` threads); what was not measured is absent
    or 0.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    l2_bytes: int
    threads: int = 1
    vector_floats: int = 0
    """CPU: floats in one vector register."""
    vector_registers: int = 0
    l1_bytes: int = 0
    arch: str = ""
    """CUDA: what kernels are compiled for, such as "sm_90a"."""
    num_sms: int = 0
    shared_bytes: int = 0
    """CUDA: the most shared memory one block can ask for."""
    peak_tflops: dict[str, float] = field(default_factory=dict, hash=False)
    """Dense matrix products, by precision: "fp32", and on CUDA "tf32" and "fp16"."""
    bandwidth_gbps: float = 0.0
    l2_gbps: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads must be in 1..{MOST_THREADS}, got {self.threads}")

    @property
    def torch(self) -> torch.device:
        """Where its tensors live."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", torch.cuda.current_device())

    @property
    def generation(self) -> int:
        """The number in ``arch``: 80, 90, 100; from 90 on there are clusters and a copy engine.  0 on the CPU."""
        return generation(self.arch)


def generation(arch: str) -> int:
    """90 of "sm_90a"; 0 of the empty text."""
    return int(arch.removeprefix("sm_").rstrip("af") or 0)


@functools.cache
def _cpu_facts() -> tuple[str, int, int, int, int]:
    info = Path("/proc/cpuinfo")
    name, flags = _cpuinfo(info.read_text() if info.exists() else "")
    name = name or platform.processor() or platform.machine()
    lanes, registers = (16, 32) if "avx512f" in flags else (8, 16) if "avx2" in flags else (4, 16)
    if platform.machine() in ("arm64", "aarch64"):
        lanes, registers = 4, 32
    return name, lanes, registers, _cache_bytes("1", 32 * 1024), _cache_bytes("2", 512 * 1024)


def _cpuinfo(text: str) -> tuple[str, set[str]]:
    """Name and features of the first processor in Linux's /proc/cpuinfo; empty where it does not say."""
    fields: dict[str, str] = {}
    for line in text.partition("\n\n")[0].splitlines():
        field, _, value = line.partition(":")
        fields[field.strip()] = value.strip()
    name = fields.get("model name", "")
    if "cpu family" in fields and not any(character.isdigit() for character in name):
        # Virtual machines call generations that are twice as fast by one name, such as "AMD EPYC".
        name += f" family {fields['cpu family']} model {fields['model']}"
    return name.strip(), set(fields.get("flags", fields.get("Features", "")).split())


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
    return Device("cpu", model, l2, threads, lanes, registers, l1)


@functools.cache
def cuda() -> Device:
    """The current NVIDIA GPU.

    Raises:
        ValueError: torch finds none.
    """
    if not torch.cuda.is_available():
        raise ValueError("torch finds no NVIDIA GPU on this machine: use the cpu, or run `zeroskip doctor`")
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    # "a": with the instructions that this architecture alone has.
    arch = f"sm_{facts.major}{facts.minor}{'a' * (facts.major >= 9)}"
    return Device(
        "cuda",
        facts.name,
        facts.L2_cache_size,
        arch=arch,
        num_sms=facts.multi_processor_count,
        shared_bytes=facts.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )
