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

    def seconds(self, device: Device, precision: str = "fp32") -> float:
        """The roofline floor: the larger of arithmetic and memory time.  0 where the peaks are unknown.

        Work that fits the GPU's L2 cache is held against the rate of that cache.
        """
        peak = device.peak_tflops.get(DENSE_PEAK.get(precision, precision), 0.0)
        moved = self.bytes_read + self.bytes_written
        cached = device.l2_gbps and moved < device.l2_bytes / 2
        rate = device.l2_gbps if cached else device.bandwidth_gbps
        return max(self.flops / (peak * 1e12) if peak else 0.0, moved / (rate * 1e9) if rate else 0.0)


DENSE_PEAK = {"bf16": "fp16"}
"""Precisions that share the peak of another."""
