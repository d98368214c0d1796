"""How fast do instructions reach the multiprocessors of a GPU?  Straight multiply-adds, and how long they take.

    python -m tools.instructions --out benchmarks/results/h200/instructions.jsonl

Run it in the repository's folder, with `src` in PYTHONPATH, on a machine with the GPU.  A multiprocessor has one block
at most, whose warps all run the same function: multiply-adds with immediates, as SparseRT's code is, without a load.
Blocks have functions of their own, or share one in clusters or all together; a function runs once, or again and again;
and a launch finds the functions where the last one left them, or every block runs another one than in the last few.
What the times say of SparseRT: `src/zeroskip/methods/sparsert/README.md`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from zeroskip.core.device import cuda
from zeroskip.core.env import environment
from zeroskip.core.record import Record
from zeroskip.cuda.assemble import build
from zeroskip.cuda.launch import Kernel, load
from zeroskip.measure.graphs import Call, Rotation, measure
from zeroskip.measure.turns import turn
from zeroskip.methods.sparsert.ptx import Body, singles
from zeroskip.report.records import Writer

SYMBOL = "instructions"
BYTES, SUMS = 16, 8
"""Of an instruction; sums of a thread, so that none waits for the one before it."""
OWN, SHARED = (128, 512, 2048), (128, 512, 2048, 8192, 32768)
"""Multiply-adds of a function: where every block has its own, where all have one."""
FUNCTIONS = 8
"""Where all have one, so that the next launch can have another."""
WARPS, CLUSTERS, TURNS, ROUNDS = (1, 4, 8, 16, 32), (2, 4, 8), (1, 5), 15
ALL = 1 << 16
ALONE = 200 * 1024
"""Bytes of shared memory that let a multiprocessor have one block only."""


@dataclass(frozen=True)
class Launch:
    """``sharing`` neighbouring blocks run the same function ``turns`` times; ``cluster``: blocks of one; ``again``: the
    same function in every launch."""

    blocks: int
    warps: int
    sharing: int
    cluster: int
    turns: int
    again: bool

    def call(self, kernel: Kernel, y: torch.Tensor, functions: int) -> Call:
        """On ``y`` [blocks, threads]; in turns with block 0 at one of ``FUNCTIONS`` functions, or at the first."""
        cluster = None if self.cluster == 1 else (self.cluster, 1, 1)
        grid, size = (self.blocks, 1, 1), (32 * self.warps, 1, 1)

        def shifted(shift: int) -> Call:
            arguments = (y, self.sharing, self.turns, shift)
            return lambda: kernel.launch(grid, size, arguments, shared_bytes=ALONE, cluster=cluster)

        if self.again:
            return shifted(0)
        return Rotation([shifted(shift) for shift in range(0, functions, functions // FUNCTIONS)])


def text(weights: npt.NDArray[np.float32]) -> str:
    """PTX of a kernel with a function for each row of ``weights`` [functions, multiply-adds]."""
    functions = [_function(index, singles(row)) for index, row in enumerate(weights)]
    body = Body()
    y = body.to("d", "ld.param.u64", "[y]")
    sharing, turns, shift = (body.to("r", "ld.param.u32", f"[{name}]") for name in ("sharing", "turns", "shift"))
    index = body.to("r", "div.u32", f"{body.to('r', 'mov.u32', '%ctaid.x')}, {sharing}")
    index = body.to("r", "rem.u32", f"{body.to('r', 'add.u32', f'{index}, {shift}')}, {len(weights)}")
    body.enter(index, len(weights), [(".b64", y), (".b32", turns)])
    entry = f".visible .entry {SYMBOL}(.param .u64 y, .param .u32 sharing, .param .u32 turns, .param .u32 shift)"
    head = (".version 8.1", ".target sm_90", ".address_size 64")
    return "\n".join([*head, *functions, entry, "{", body.text(), "}", ""])


def _function(index: int, weights: list[str]) -> str:
    """Sums begin as 1 and grow by the weights in turns; their total is stored."""
    body = Body()
    y, turns = body.to("d", "ld.param.u64", "[to]"), body.to("r", "ld.param.u32", "[many]")
    sums = [body.to("f", "mov.f32", "0f3F800000") for _ in range(SUMS)]
    one = body.to("f", "cvt.rn.f32.u32", body.to("r", "min.u32", f"{turns}, 1"))
    body.label("AGAIN")
    for at, weight in enumerate(weights):
        total = sums[at % SUMS]
        body.put(f"fma.rn.f32 {total}, {one}, {weight}, {total}")
    body.put(f"sub.u32 {turns}, {turns}, 1")
    body.put(f"@{body.to('p', 'setp.ne.u32', f'{turns}, 0')} bra AGAIN")
    while len(sums) > 1:
        sums = body.plus(sums[::2], sums[1::2])
    block, threads, thread = (body.to("r", "mov.u32", name) for name in ("%ctaid.x", "%ntid.x", "%tid.x"))
    place = body.to("r", "mad.lo.u32", f"{block}, {threads}, {thread}")
    address = body.to("d", "mad.wide.u32", f"{place}, 4, {body.to('d', 'cvta.to.global.u64', y)}")
    body.put(f"st.global.f32 [{address}], {sums[0]}")
    body.put("exit")
    return "\n".join([f".func code_{index}(.param .b64 to, .param .b32 many)", ".noreturn", "{", body.text(), "}"])


def launches(blocks: int, own: bool) -> Iterator[Launch]:
    """What to time of a kernel with functions for all ``blocks``, or of one where all blocks have the same."""
    for warps, turns, again in itertools.product(WARPS, TURNS, (True, False)):
        yield Launch(blocks, warps, 1 if own else ALL, 1, turns, again)
        for cluster in CLUSTERS if own else ():
            yield Launch(blocks, warps, cluster, cluster, turns, again)
            yield Launch(blocks, warps, cluster, 1, turns, again)


def records(blocks: int, arch: str, own: bool, count: int) -> Iterator[Record]:
    """Times of a kernel whose functions have ``count`` multiply-adds each, checked before."""
    functions = blocks if own else FUNCTIONS
    weights = np.random.default_rng(count).uniform(-1, 1, (functions, count)).astype(np.float32)
    kernel = load(build(text(weights), SYMBOL, arch))
    y = torch.empty(blocks * 32 * max(WARPS), device="cuda")
    calls: dict[str, Call] = {}
    facts: dict[str, Launch] = {}
    for launch in launches(blocks, own):
        call = launch.call(kernel, y, functions)
        y.fill_(torch.nan)
        call()
        _check(y, weights, launch)
        calls[str(launch)], facts[str(launch)] = call, launch
    for name, times in measure(calls, ROUNDS).items():
        case = {"kind": SYMBOL, "own": own, "code_bytes": BYTES * count, **vars(facts[name])}
        yield Record(SYMBOL, case, "multiply-adds", "OK", times=times)


def totals(weights: npt.NDArray[np.float32], turns: int) -> npt.NDArray[np.float32]:
    """What a thread of each function stores, to the bit."""
    steps = np.tile(weights.reshape(len(weights), -1, SUMS), (1, turns, 1))
    start = np.ones((len(weights), 1, SUMS), np.float32)
    sums = np.add.accumulate(np.concatenate([start, steps], 1), axis=1)[:, -1]
    while sums.shape[1] > 1:
        sums = sums[:, ::2] + sums[:, 1::2]
    return sums[:, 0]


def _check(y: torch.Tensor, weights: npt.NDArray[np.float32], launch: Launch) -> None:
    """Every block ran its function, as often as it was told."""
    found = y[: launch.blocks * 32 * launch.warps].view(launch.blocks, -1).cpu().numpy()
    own = np.arange(launch.blocks) // launch.sharing % len(weights)
    if not (found == totals(weights, launch.turns)[own][:, None]).all():
        raise SystemExit(f"wrong sums with {launch}")


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.instructions", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = cuda()
    blocks = device.num_sms - device.num_sms % (2 * max(CLUSTERS))  # 128 of 132; in clusters of 4 or 8 two turns
    with Writer(args.out) as writer, turn(device):
        where = writer.environment(environment(device))
        for own, counts in ((False, SHARED), (True, OWN)):
            for count in counts:
                for record in records(blocks, device.arch, own, count):
                    assert record.times is not None
                    writer.record(replace(record, environment=where))
                    print(f"{record.times.median_us:9.2f} us  {record.case}", flush=True)


if __name__ == "__main__":
    main()
