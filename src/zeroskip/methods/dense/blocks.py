"""Which blocks a Triton matrix product is likely fastest with: a rough model of one GPU, only to order the tries."""

from __future__ import annotations

import math
from dataclasses import replace

from zeroskip.core.device import Device
from zeroskip.core.layer import PRECISION_BYTES, Layer, Precision
from zeroskip.methods.dense.config import Blocks

BLOCKS = (
    Blocks(128, 128, 32, 8, 3),
    Blocks(128, 64, 32, 4, 4),
    Blocks(64, 128, 32, 4, 4),
    Blocks(64, 64, 32, 4, 4),
    Blocks(64, 32, 64, 4, 4),
    Blocks(32, 64, 64, 4, 4),
    Blocks(32, 32, 64, 4, 4),
    Blocks(16, 64, 64, 4, 4),
    Blocks(32, 16, 128, 4, 4),
    Blocks(16, 32, 128, 4, 4),
    Blocks(16, 16, 128, 2, 4),
)
"""With numbers of four bytes; numbers of two take steps twice as deep."""

FLOPS_PER_CLOCK: dict[Precision, float] = {"fp32": 350.0, "tf32": 1200.0, "fp16": 2500.0, "bf16": 2500.0}
"""Of one multiprocessor through Triton, about half of an H100's peak; fp32 is three TF32 products."""
LOAD_BYTES_PER_CLOCK = 48.0
"""From the L2 cache into one multiprocessor, about."""
LATENCY_CLOCKS = 700.0
"""Of one load."""
REGISTERS = 65536
DEFAULT_SHARED_BYTES = 99 * 1024
DEFAULT_SMS = 100


def tile_columns(layer: Layer, folded: bool) -> tuple[int, int]:
    """How many pixels one matrix product has, and how many products there are: images side by side, or one each."""
    shape = layer.shape
    pixels = shape.p * shape.q
    return (shape.n * pixels, 1) if folded else (pixels, shape.n)


def likely(layer: Layer, device: Device) -> list[Blocks]:
    """Every block that fits the device's shared memory, with an eighth to spare for what the compiler adds, likeliest
    fastest first."""
    item = PRECISION_BYTES[layer.precision]
    most = device.shared_bytes or DEFAULT_SHARED_BYTES
    found = [replace(blocks, k=blocks.k * 4 // item) for blocks in BLOCKS]
    found = [blocks for blocks in found if 9 * blocks.shared_bytes(item) <= 8 * most]
    return sorted(found, key=lambda blocks: _clocks(layer, blocks, device.num_sms or DEFAULT_SMS, most))


def _clocks(layer: Layer, blocks: Blocks, sms: int, shared_bytes: int) -> float:
    item, shape = PRECISION_BYTES[layer.precision], layer.shape
    columns, products = tile_columns(layer, folded=layer.kind == "linear")
    programs = math.ceil(shape.k / blocks.m) * math.ceil(columns / blocks.n) * products
    lanes = 32 * blocks.warps
    registers = lanes * (blocks.m * blocks.n // lanes + 64)
    resident = max(1, min(shared_bytes // blocks.shared_bytes(item), REGISTERS // registers))
    together = min(resident, math.ceil(programs / sms))
    arithmetic = 2 * blocks.m * blocks.n * blocks.k / FLOPS_PER_CLOCK[layer.precision]
    loads = (blocks.m + blocks.n) * blocks.k * item / LOAD_BYTES_PER_CLOCK
    step = max(together * arithmetic, together * loads, LATENCY_CLOCKS / max(1, blocks.stages - 1))
    steps = math.ceil(shape.c / blocks.k)
    fill_and_drain = 2 * LATENCY_CLOCKS + together * blocks.m * blocks.n * item / LOAD_BYTES_PER_CLOCK
    return math.ceil(programs / (sms * resident)) * (steps * step + fill_and_drain)
