"""The least work a layer can be: what a measured time is held against."""

from __future__ import annotations

from dataclasses import dataclass

from zeroskip.core.device import Device


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes that must move if every tensor is touched once."""

    flops: int
    bytes_read: int
    bytes_written: int

    def seconds(self, device: Device) -> float:
        """The roofline floor: the larger of arithmetic and memory time.  0 where the peaks are unknown."""
        arithmetic = self.flops / (device.peak_tflops * 1e12) if device.peak_tflops else 0.0
        memory = (
            (self.bytes_read + self.bytes_written) / (device.bandwidth_gbps * 1e9) if device.bandwidth_gbps else 0.0
        )
        return max(arithmetic, memory)
