"""Times that cannot be: faster than arithmetic or memory allow, so that a time, a count or a peak is wrong."""

from __future__ import annotations

from zeroskip.core.cost import DENSE_PEAK, Cost
from zeroskip.core.device import Device
from zeroskip.report.suite import Cache

MARGIN = 0.85
"""A time is called impossible below this share of a floor: peaks are measured on large work, where clocks are lower."""
TF32_PRODUCTS = 3
"""That a product of float32 accuracy takes on tensor cores."""


def objection(
    time_us: float,
    cost: Cost,
    device: Device,
    precision: str,
    cache: Cache | None = None,
    rotated: int = 0,
    own: int = 0,
) -> str | None:
    """None, or why a call cannot have taken ``time_us``.

    A cache of ``b`` bytes spares a call at most ``b`` bytes of what it moves, and a rotation through ``rotated`` bytes
    at most ``b`` bytes a turn, whichever lines the cache keeps: what is left must come from memory.

    Args:
        cost: of the layer, every zero skipped.
        rotated: cold: bytes of all sets of inputs and outputs together.
        own: cold: bytes of one set.
    """
    moved = cost.moved
    floors = {"nothing": 0.0}
    if peak := peak_tflops(device, precision):
        floors[f"{cost.flops / 1e6:.1f} MFLOP"] = cost.flops / (peak * 1e6)
    if device.l2_gbps:
        floors[f"{moved / 1e6:.2f} MB through the L2 cache"] = moved / (device.l2_gbps * 1e3)
    if device.bandwidth_gbps:
        missed = max(0, moved - device.l2_bytes)
        if cache == "cold":
            missed = max(missed, round(own * max(0.0, 1 - device.l2_bytes / rotated)))
        floors[f"{missed / 1e6:.2f} MB from memory"] = missed / (device.bandwidth_gbps * 1e3)
    what, most = max(floors.items(), key=lambda pair: pair[1])
    if time_us >= MARGIN * most:
        return None
    return f"a median of {time_us:.2f} us is impossible: {what} take {most:.2f} us at the measured peak"


def peak_tflops(device: Device, precision: str) -> float:
    """The most that any unit of ``device`` makes of numbers of this precision; 0 where it was not measured."""
    peaks = device.peak_tflops
    own = peaks.get(DENSE_PEAK.get(precision, precision), 0.0)
    return max(own, peaks.get("tf32", 0.0) / TF32_PRODUCTS) if precision == "fp32" else own
