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


def reached(sms: int, cluster: int) -> int:
    """Of so many multiprocessors, those that clusters of so many blocks use at once, one block each.

    A cluster lies in one part (GPC) of the GPU, and the parts are no multiples of it: an H200 with 132 of them has room
    for 30 clusters of 4 or 15 of 8 (cuOccupancyMaxActiveClusters), so that 128 blocks in such clusters take two turns.
    """
    return sms if cluster <= 2 else max(sms * 10 // 11 // cluster, 1) * cluster
