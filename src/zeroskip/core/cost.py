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

    @property
    def moved(self) -> int:
        """Bytes, either way."""
        return self.bytes_read + self.bytes_written

    def seconds(self, device: Device, precision: str = "fp32") -> float:
        """The roofline floor: the larger of arithmetic and memory time.  0 where the peaks are unknown.

        On a GPU every byte passes the L2 cache, and only what that cannot hold has to come from memory.
        """
        peak = device.peak_tflops.get(DENSE_PEAK.get(precision, precision), 0.0)
        missed = max(0, self.moved - device.l2_bytes) if device.l2_gbps else self.moved
        return max(
            self.flops / (peak * 1e12) if peak else 0.0,
            self.moved / (device.l2_gbps * 1e9) if device.l2_gbps else 0.0,
            missed / (device.bandwidth_gbps * 1e9) if device.bandwidth_gbps else 0.0,
        )


DENSE_PEAK = {"bf16": "fp16"}
"""Precisions that share the peak of another."""
