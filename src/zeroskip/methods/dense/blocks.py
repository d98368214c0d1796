"""Which blocks a Triton matrix product is likely fastest with: a rough model of one GPU, only to order the tries."""

from __future__ import annotations

import math
from dataclasses import replace

from zeroskip.core.device import Device
from zeroskip.core.layer import PRECISION_BYTES, Layer, Precision
from zeroskip.cuda.limits import MOST_BLOCKS, REGISTERS
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

FLOPS_PER_CLOCK: dict[Precision, float] = {"fp32": 200.0, "tf32": 1200.0, "fp16": 2500.0, "bf16": 2500.0}
"""Of one multiprocessor through Triton, about; fp32 is three TF32 products and the splitting of both operands."""
LOAD_BYTES_PER_CLOCK = 48.0
"""From the L2 cache into one multiprocessor, about."""
LATENCY_CLOCKS = 700.0
"""Of one load."""
ALONE = 1.25
"""Loads, splits and products of a program that has its multiprocessor for itself overlap less."""
HOPPER, WGMMA_ROWS = 90, 64
"""There Triton uses the wide products (``wgmma``) for blocks of so many output channels, ``mma.sync`` for others."""
SYNC_RATE = 0.4
"""Of ``mma.sync`` on Hopper, as part of the rate of ``wgmma``."""
TURNED_SPLIT_RATE = 0.65
"""Of fp32 products from NCHW by ``wgmma``, which wants TF32 numbers of one pixel side by side: splits are turned."""
TURNED_BYTES_PER_CLOCK = 5.0
"""Of tf32 numbers for the same, which are copied into shared memory one by one."""
DEFAULT_SHARED_BYTES = 99 * 1024
DEFAULT_SMS = 100


def folds(images: int, pixels: int, blocks: Blocks) -> bool:
    """Whether images are laid side by side: where one alone would leave much of its last block empty, or its rows are
    too crooked for vector loads anyway, or there are more images than a grid has second coordinates."""
    return images > 1 and (pixels % 4 != 0 or pixels < 2 * blocks.n or images > MOST_BLOCKS)


def likely(layer: Layer, device: Device, by_rows: bool) -> list[Blocks]:
    """Every block that fits the device's shared memory, with an eighth to spare for what the compiler adds, likeliest
    fastest first.

    Args:
        by_rows: the numbers of one pixel lie side by side, as in channels-last images and rows of features.
    """
    item = PRECISION_BYTES[layer.precision]
    most = device.shared_bytes or DEFAULT_SHARED_BYTES
    found = [replace(blocks, k=blocks.k * 4 // item) for blocks in BLOCKS]
    found = [blocks for blocks in found if 9 * blocks.shared_bytes(item) <= 8 * most]
    return sorted(found, key=lambda blocks: clocks(layer, blocks, device, by_rows))


def clocks(layer: Layer, blocks: Blocks, device: Device, by_rows: bool) -> float:
    """A rough guess of how long the product takes.  The rates are fitted to an H100 (128 -> 128 channels, 56x56)."""
    item, shape, pixels = PRECISION_BYTES[layer.precision], layer.shape, layer.shape.p * layer.shape.q
    folded = by_rows or folds(shape.n, pixels, blocks)
    columns, products = (shape.n * pixels, 1) if folded else (pixels, shape.n)
    programs = math.ceil(shape.k / blocks.m) * math.ceil(columns / blocks.n) * products
    each = math.ceil(programs / (device.num_sms or DEFAULT_SMS))
    lanes = 32 * blocks.warps
    registers = lanes * (blocks.m * blocks.n // lanes + 64)
    shared_bytes = device.shared_bytes or DEFAULT_SHARED_BYTES
    resident = max(1, min(shared_bytes // blocks.shared_bytes(item), REGISTERS // registers))

    rate, x_bytes_per_clock = FLOPS_PER_CLOCK[layer.precision], LOAD_BYTES_PER_CLOCK
    if device.generation == HOPPER:
        if blocks.m < WGMMA_ROWS:
            rate *= SYNC_RATE
        elif not by_rows and layer.precision == "fp32":
            rate *= TURNED_SPLIT_RATE
        elif not by_rows and layer.precision == "tf32":
            x_bytes_per_clock = TURNED_BYTES_PER_CLOCK
    arithmetic = 2 * blocks.m * blocks.n * blocks.k / rate
    loads = blocks.k * item * (blocks.m / LOAD_BYTES_PER_CLOCK + blocks.n / x_bytes_per_clock)
    alone = ALONE if min(resident, each) == 1 else 1.0
    store = blocks.m * blocks.n * item / LOAD_BYTES_PER_CLOCK
    steps, rounds = math.ceil(shape.c / blocks.k), math.ceil(each / resident)
    busy = each * (steps * alone * max(arithmetic, loads) + store)
    waiting = rounds * steps * LATENCY_CLOCKS / max(1, blocks.stages - 1)
    return max(busy, waiting) + rounds * 2 * LATENCY_CLOCKS
