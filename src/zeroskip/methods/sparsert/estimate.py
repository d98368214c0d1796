"""Which configurations to try for a layer, in which order, and how long they take to assemble and to run."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported
from zeroskip.core.layer import PRECISION_BYTES, ConvShape, Layer
from zeroskip.cuda.limits import CLOCK, CLUSTERS, reached
from zeroskip.methods.sparsert.config import (
    FLOAT,
    MOST_REGISTERS,
    OTHERS_OF_LOOP,
    SparseRTConfig,
    check,
    flat,
    room,
    tested,
)

ASSEMBLED = 9e-5
"""Seconds of one core for an instruction: 55 to 150 us on an EPYC (Zen 3) with nvJitLink 13.0, whatever the layer, from
2,000 to 460,000 instructions and 4 to 64 rows; proportional, since functions are assembled one by one."""
MOST_SECONDS = 60.0
"""Of one core: what would take longer to assemble is not tried."""
MOST_SECONDS_TOGETHER, CORES = 60.0, 4
"""Of all candidates of a layer but the one with gaps, for each so many cores.  Of 24 layers whose candidates would take
longer than 60 s of one core, the fastest was among the first five for 20 (records of fig10, H100)."""
MOST_CANDIDATES = 24
WRITING = 2
"""How many are proposed a second time, writing into a border."""
SIMILAR = 0.04
"""How much better a candidate must be for each one before it with the same rows, pixels or split, to come next."""


@dataclass(frozen=True)
class Estimate:
    """``seconds`` to run; ``build_seconds`` to assemble on one core."""

    config: SparseRTConfig
    seconds: float
    build_seconds: float


def refusal(layer: Layer) -> str | None:
    """Why the layer is not even looked at for its size, or None."""
    shape, item = layer.shape, PRECISION_BYTES[layer.precision]
    if max(shape.c * shape.h * shape.w, shape.k * shape.p * shape.q) * item >= 2**31:
        return "an image has 2 GiB or more, which its code does not reach"
    nonzeros, density = layer.weights.nnz, layer.weights.density
    if nonzeros:
        # A multiply-add for each, and the loads that the tallest row groups cannot do without.
        loads = (1 - (1 - density) ** ROWS[-1]) / (ROWS[-1] * density)
        seconds = nonzeros * (1 + loads) * ASSEMBLED
        if seconds > MOST_SECONDS:
            return f"not tried: {nonzeros} weights would assemble {seconds:.0f} s, more than {MOST_SECONDS:.0f} s"
    return None


def estimates(layer: Layer, device: Device) -> list[Estimate]:
    """What to try, the likeliest first, as far as there is time to assemble it.

    Raises:
        Unsupported: rows are too long for any number of parts.
    """
    found = [estimated(layer, config, device) for config in menu(layer, device)]
    if not found:
        raise Unsupported(f"every part of a row group would have more than {MOST} weights")
    quickest = min(found, key=lambda one: one.build_seconds)
    found = [one for one in found if one.build_seconds <= MOST_SECONDS] or [quickest]
    seen: Counter[tuple[str, int]] = Counter()
    order = []
    for one in sorted(found, key=lambda one: one.seconds):
        config = one.config
        kinds = [("rows", config.rows), ("tile", config.tile), ("split", config.split), ("halo", config.halo)]
        order.append((one.seconds * (1 + SIMILAR * sum(seen[kind] for kind in kinds)), one))
        seen.update(kinds)
    chosen: list[Estimate] = []
    together, most = 0.0, most_together()
    for _, one in sorted(order, key=lambda pair: pair[0]):
        together += one.build_seconds
        if chosen and (together > most or len(chosen) == MOST_CANDIDATES):
            break
        chosen.append(one)
    # The next layer may want its input in a border of zeros.
    writing = [one for one in chosen if one.config.vector == 1 and not one.config.slab][:WRITING]
    if len(chosen) > 1:
        chosen = chosen[: MOST_CANDIDATES - len(writing)]
        chosen += [estimated(layer, replace(one.config, gaps=True), device) for one in writing]
    return sorted(chosen, key=lambda one: one.seconds)


def most_together() -> float:
    """Seconds of a core that assembling a layer's candidates may take on this machine."""
    return MOST_SECONDS_TOGETHER * max(1, (os.cpu_count() or 1) // CORES)


# -- the menu -------------------------------------------------------------------------------------------
ROWS, WARPS, TEAMS = (2, 4, 8, 16, 32, 64), (1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 25, 32), (1, 2, 4, 8)
FULLEST = 0.6
"""Of a block's threads, how many have a pixel of their own."""
FEWEST, MOST = 16, 8000
"""Nonzeros of a team."""
MATES, SLAB, SLAB_ROWS, SLAB_BLOCKS, SLAB_BYTES = 2, 32, 32, 8, 8192
"""Blocks that x is brought to at once, and input channels of a slab; from how many rows of a thread, blocks of rows and
bytes of a copy on.  Measured for three layers in fp32 (benchmarks/suites/sparsert_slabs.toml, H200); in fp16, where
10% were gained, dense takes a third of the time, so that none are proposed."""
LEAST_OTHERS = 28
"""Registers of a thread beside its sums, in what is proposed."""
UNDER_WAY = 64
"""Registers that more loads under way are good for."""


def menu(layer: Layer, device: Device) -> Iterator[SparseRTConfig]:
    """Everything that might be worth trying."""
    shape = layer.shape
    count = shape.n * shape.p * shape.q
    halos = (False, True) if tested(shape, False) and shape.padding != (0, 0) else (False,)
    deep = shape.c // shape.groups * shape.r * shape.s * layer.weights.density
    for rows, (vector, pieces), warps, stack, groups, split in _sizes(layer, device):
        nonzeros = rows * deep / (groups * split)
        # A layer with few nonzeros has one part; so has the first entry of the menu, which fits any layer.
        few = nonzeros < FEWEST and (rows, groups, split) != (ROWS[0], 1, 1)
        idle = (stack - 1) * rows >= shape.k or (warps * stack * groups < 2 and count > 64)
        if few or idle or nonzeros > MOST:
            continue
        for halo in halos:
            registers = _registers(shape, rows, vector, pieces, halo, 32 * warps * stack * groups, split)
            try:
                config = SparseRTConfig(
                    rows, vector, pieces, warps, stack, groups, split, halo=halo, registers=registers
                )
            except ValueError:
                continue
            yield from _variants(layer, config, device)


def _sizes(layer: Layer, device: Device) -> Iterator[tuple[int, tuple[int, int], int, int, int, int]]:
    """Rows, vector and pieces, warps, stack, groups, split; rows of the menu, and as many as make one turn of blocks:
    128 of them in clusters of 4 or 8 would take two."""
    shape, item = layer.shape, PRECISION_BYTES[layer.precision]
    count, plane = shape.n * shape.p * shape.q, shape.p * shape.q
    pixels = [(1, 1), (1, 2)]
    if flat(shape):
        pixels += [(vector, 1) for vector in (2, 4, 8) if vector * item <= 16 and plane % vector == 0]
    splits = (1, 2, 4, 8) if device.generation >= CLUSTERS else (1,)
    for (vector, pieces), warps in itertools.product(pixels, WARPS):
        tile = 32 * warps * vector * pieces
        tiles = math.ceil(count / tile)
        if warps > 1 and count < FULLEST * tile * tiles:
            continue
        for stack, groups, split in itertools.product(TEAMS, TEAMS, splits):
            within = reached(device.num_sms, split) // (max(tiles, 1) * split)
            whole = math.ceil(shape.k / (within * stack)) if within else ROWS[0]
            for rows in dict.fromkeys((*ROWS, whole)):
                if rows <= max(2 * shape.k, ROWS[0]):
                    yield rows, (vector, pieces), warps, stack, groups, split


def _registers(shape: ConvShape, rows: int, vector: int, pieces: int, halo: bool, threads: int, split: int) -> int:
    """Enough for a thread; if it has one pixel, what there is for it in a large block, if that will just do.

    With fewer, ptxas moves what vector loads bring to other registers, and spills: of 544 configurations that were the
    fastest in a record none had several pixels and less than enough.  Vectors of sums for other blocks take some more.
    """
    sums = rows * vector * pieces
    least = sums + LEAST_OTHERS + (20 * pieces if tested(shape, halo) else 0)
    several = 1.25 * sums + 32 + (16 if split > 1 and vector > 1 else 0)
    enough = min(math.ceil(max(several, least) / 8) * 8, MOST_REGISTERS)
    return room(threads) if vector * pieces == 1 and least <= room(threads) < enough else enough


def _variants(layer: Layer, config: SparseRTConfig, device: Device) -> Iterator[SparseRTConfig]:
    """With more registers where nobody else needs them, and with blocks that walk where there are many tiles."""
    shape = layer.shape
    blocks, tiles = config.blocks(shape) * config.split, config.tiles(shape)
    found = [config]
    if blocks * tiles <= device.num_sms:
        found = [_alone(config)]
    elif config.split == 1 and config.registers + OTHERS_OF_LOOP <= config.room:
        looping = replace(config, registers=config.registers + OTHERS_OF_LOOP)
        walks = sorted({device.num_sms // blocks, device.num_sms * looping.resident // blocks})
        for walk in (walk for walk in walks if 0 < walk < tiles):
            walking = replace(looping, walk=walk)
            found.append(_alone(walking) if blocks * walk <= device.num_sms else walking)
    for one in found:
        try:
            check(layer, one)
        except ValueError:
            continue
        if one.shared_bytes(layer) <= device.shared_bytes:
            yield one
    yield from _slabs(layer, config, device)


def _alone(config: SparseRTConfig) -> SparseRTConfig:
    """With the registers that no other block of the multiprocessor needs."""
    return replace(config, registers=min(config.registers + UNDER_WAY, config.room))


def _slabs(layer: Layer, config: SparseRTConfig, device: Device) -> Iterator[SparseRTConfig]:
    """With x in slabs, each brought at once to two of many blocks of rows, which walk where there are many tiles: for
    (512,512,25088) in 82 us instead of 112 (H200)."""
    shape, least = layer.shape, config.sums + LEAST_OTHERS
    plane = shape.p * shape.q * PRECISION_BYTES[layer.precision]
    copied = SLAB // MATES * plane if config.tile >= shape.p * shape.q else 0
    registers = min(config.registers + UNDER_WAY, room(config.threads + 32))
    if device.generation < CLUSTERS or config.parts > 1 or config.pieces > 1 or registers < least:
        return
    # Shared memory leaves room for one block at a time: where there is one anyway.
    if config.resident > 1 or PRECISION_BYTES[layer.precision] != FLOAT:
        return
    if config.rows < SLAB_ROWS or config.blocks(shape) < SLAB_BLOCKS or copied < SLAB_BYTES:
        return
    try:
        staying = replace(config, registers=registers, slab=SLAB, mates=MATES)
    except ValueError:
        return
    for walk, stages in itertools.product((device.num_sms // staying.blocks(shape), 0), (4, 3, 2)):
        one = replace(staying, walk=walk, stages=stages)
        try:
            check(layer, one)
        except ValueError:
            continue
        if one.shared_bytes(layer) <= device.shared_bytes:
            yield one
            return


# -- the model ------------------------------------------------------------------------------------------
LAUNCH, WAVE, SPLIT = 600.0, 1650.0, 3500.0
"""Cycles: of any call, of each wave of blocks but the first, of the sums' way through a cluster.  These and the rates
below were fitted to configurations of 28 layers on an H100, which they miss by a fifth or so."""
ISSUE, WAITING, L1 = 2.7, 7.6, 0.2
"""Cycles for an instruction: of a scheduler for each of its warps; of a warp for each of its own, since instructions
arrive later than they could be issued; for 128 bytes of L1."""
GPC, SM, X, GLOBAL = 30.0, 5.4, 37.0, 12.0
"""Bytes a cycle: of instructions, for the multiprocessors of a GPC, which share what comes, and for each of them; for a
multiprocessor, of x from L2, and of what is read and written at least."""
GPCS = 8
SHARPNESS = 4
"""Of the norm by which the time is more than its longest part: infinite if parts never delayed each other."""
SLABBED, WALKED = 0.86, 0.78
"""Of what the model says without slabs, and where blocks walk besides.  On an H200 (512,512,6272) takes 19.7 us instead
of 22.6, (512,512,25088) walking 82 instead of 97, where the model says 102."""
INSTRUCTION_CACHE = 100e3
"""Bytes that stay from one tile to the next."""
ALIKE = 0.92
"""Of the columns that chance would make distinct, what is left by grouping rows that share them."""
MOVES = 0.4
"""Instructions that zero registers, for each load that is tested for the border."""


def estimated(layer: Layer, config: SparseRTConfig, device: Device) -> Estimate:
    """A rough model of one multiprocessor, meant to order candidates."""
    if config.slab:
        without = estimated(layer, replace(config, slab=0, stages=1, mates=1), device)
        return replace(without, config=config, seconds=(WALKED if config.walk else SLABBED) * without.seconds)
    shape, item = layer.shape, PRECISION_BYTES[layer.precision]
    work = _work(layer, config)
    blocks, beside = config.blocks(shape), config.walk or config.tiles(shape)
    total = blocks * beside * config.split
    per_sm = math.ceil(total / max(reached(device.num_sms, config.cluster), 1))
    resident = min(config.resident, device.shared_bytes // max(config.shared_bytes(layer), 1))
    waves = math.ceil(per_sm / max(resident, 1))
    per_turn = math.ceil(config.tiles(shape) / beside)
    code = 16 * work.instructions * config.teams
    codes, again = blocks * config.split, 1 if code < INSTRUCTION_CACHE else per_turn
    of_gpc = min(codes, total / GPCS) * code * again
    of_sm = min(codes, per_sm) * code * again
    x = per_sm * per_turn * work.columns * config.span(shape) * item
    least = item * shape.n * (shape.c * shape.h * shape.w + shape.k * shape.p * shape.q) / device.num_sms
    parts = (
        ISSUE * per_sm * per_turn * math.ceil(config.threads / 128) * work.instructions,
        WAITING * waves * per_turn * work.instructions,
        L1 * per_sm * per_turn * config.threads / 32 * work.wavefronts,
        of_gpc / GPC,
        of_sm / SM,
        x / X,
        least / GLOBAL,
    )
    cycles = LAUNCH + WAVE * (waves - 1) + (SPLIT * waves if config.split > 1 else 0)
    cycles += sum(part**SHARPNESS for part in parts) ** (1 / SHARPNESS)
    functions = blocks * config.split * config.teams
    build = 0.1 + ASSEMBLED * functions * (work.instructions + 20)
    return Estimate(config, cycles / CLOCK, build)


@dataclass(frozen=True)
class _Work:
    """Of a warp: instructions, and turns of the 128 bytes that L1 gives in a cycle; of a block: distinct columns."""

    instructions: float
    wavefronts: float
    columns: float


def _work(layer: Layer, config: SparseRTConfig) -> _Work:
    shape, item, density = layer.shape, PRECISION_BYTES[layer.precision], layer.weights.density
    rows = shape.k / (config.blocks(shape) * config.stack)
    deep = shape.c // shape.groups * shape.r * shape.s / config.parts
    sharing = min(rows, shape.k / shape.groups)
    loads = deep * rows / sharing * (1 - (1 - density) ** sharing) * ALIKE
    nonzeros = rows * deep * density
    span = 32 * config.vector * item * shape.stride[1] / 128
    each = max(1.0, span) + (0.9 if shape.h * shape.w * item % 128 or not flat(shape) else 0.0)
    own, sent = rows / config.parts, rows * (1 - 1 / config.parts)
    pieces, columns = config.pieces * -(-config.vector // 4), config.columns
    instructions = nonzeros * columns + loads * config.pieces + own * (pieces + 2.5 * columns) + 15
    if config.gaps:
        instructions += 3 * own * pieces
    if config.terms:
        instructions += nonzeros * columns * (2 / config.terms - 0.5)
    elif item != FLOAT:
        instructions += loads * columns
    if tested(shape, config.halo):
        instructions += MOVES * loads * config.pieces + 12
    if config.parts > 1:
        # Synchronizing costs a function what it knew to be common to the threads of a warp, too.
        instructions += (45 if config.split > 1 else 30) + sent * pieces * (4 if config.split > 1 else 2)
        instructions += sent * columns
    if layer.epilogue.residual != "none":
        instructions += own * (pieces + columns)
    wavefronts = loads * config.pieces * each + 2 * sent * columns + own * columns
    stacked = min(rows * config.stack, shape.k / shape.groups)
    union = deep * config.groups * rows * config.stack / stacked * (1 - (1 - density) ** stacked)
    return _Work(instructions, wavefronts, union)
