"""One measured case as data: the line that is written, committed, plotted and argued about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal[
    "OK", "UNSUPPORTED", "WRONG", "IMPLAUSIBLE", "COMPILE_ERROR", "LAUNCH_ERROR", "TIMEOUT", "OUT_OF_MEMORY"
]
"""IMPLAUSIBLE: right values, but faster than the machine can be, so that no ratio is to be taken from its times."""


@dataclass(frozen=True)
class Times:
    """Samples of one variant, in microseconds, in the order taken."""

    samples_us: tuple[float, ...]
    clock: Literal["wall", "cpu", "cuda"]

    @property
    def median_us(self) -> float:
        ordered = sorted(self.samples_us)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        ordered = sorted(self.samples_us)
        quarter = len(ordered) // 4
        return (ordered[-1 - quarter] - ordered[quarter]) / self.median_us


@dataclass(frozen=True)
class Record:
    """Times exist only where the result was checked in the same process and lay within the bound."""

    suite: str
    case: dict[str, Any]
    method: str
    status: Status
    reason: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    times: Times | None = None
    floor_us: float = 0.0
    flops: int = 0
    bytes: int = 0
    error: dict[str, float] = field(default_factory=dict)
    """``relative`` Frobenius distance to float64 and the worst element's share of its ``bound``."""
    setup: dict[str, float] = field(default_factory=dict)
    """Pack, build and tune seconds, and bytes of the packed weights: reported, and not run time."""
    environment: str = ""
    """Id of the environment line of the same file."""
    contended: bool = False
