"""What a grid and a multiprocessor hold, for checks of configurations and estimates of their time."""

from __future__ import annotations

CLUSTERS = 90
"""The first generation (``Device.generation``) with clusters of blocks, the copy engine and dependent launches."""
MOST_BLOCKS = 65535
"""Of a grid, in its second and in its third dimension."""
REGISTERS, SHARED_BYTES, BLOCKS, WARPS = 65536, 228 * 1024, 32, 64
"""Of a multiprocessor."""
RESERVED = 1024
"""Bytes of shared memory that every block takes beside its own."""
CLOCK = 1.7e9
"""Cycles a second that estimates count with: about what an H100 keeps up."""


def resident(shared_bytes: int, warps: int, registers: int) -> int:
    """Blocks that a multiprocessor has room for at once.

    Args:
        shared_bytes: of a block.
        warps: of a block.
        registers: of a thread.
    """
    return min(SHARED_BYTES // (shared_bytes + RESERVED), WARPS // warps, BLOCKS, REGISTERS // (registers * 32 * warps))
