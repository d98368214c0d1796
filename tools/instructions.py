"""How fast do instructions reach the multiprocessors of a GPU?  Straight multiply-adds, and how long they take.

    python -m tools.instructions --out benchmarks/results/h200/instructions.jsonl

Run it in the repository's folder, with `src` in PYTHONPATH, on a machine with the GPU.  Every multiprocessor has one
block, whose warps all run the same function: multiply-adds with immediates, as SparseRT's code is, without a load.
Blocks have functions of their own, or share one in clusters or all together; a function runs once, or again and again.
What the times say of SparseRT: `src/zeroskip/methods/sparsert/README.md`.
"""

from __future__ import annotations

import argparse
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
from zeroskip.measure.graphs import Call, measure
from zeroskip.measure.turns import turn
from zeroskip.methods.sparsert.ptx import Body, singles
from zeroskip.report.records import Writer

SYMBOL = "instructions"
BYTES, SUMS = 16, 8
"""Of an instruction; sums of a thread, so that none waits for the one before it."""
OWN, SHARED = (128, 512, 2048), (128, 512, 2048, 8192, 32768)
"""Multiply-adds of a function: where every block has its own, where all have one."""
WARPS, CLUSTERS, TURNS, ROUNDS = (1, 4, 8, 16, 32), (2, 4, 8), (1, 5), 15
ALONE = 200 * 1024
"""Bytes of shared memory that let a multiprocessor have one block only."""


@dataclass(frozen=True)
class Launch:
    """``sharing`` neighbouring blocks run the same function ``turns`` times; blocks of a cluster, where it is not 1."""

    warps: int
    sharing: int
    cluster: int
    turns: int

    def call(self, kernel: Kernel, y: torch.Tensor, blocks: int) -> Call:
        """On ``y`` [blocks, threads]; blocks that fill no cluster are left out."""
        blocks -= blocks % self.cluster
        cluster = None if self.cluster == 1 else (self.cluster, 1, 1)
        arguments = (y, self.sharing, self.turns)
        size = (32 * self.warps, 1, 1)
        return lambda: kernel.launch((blocks, 1, 1), size, arguments, shared_bytes=ALONE, cluster=cluster)


def text(weights: npt.NDArray[np.float32]) -> str:
    """PTX of a kernel with a function for each row of ``weights`` [functions, multiply-adds]."""
    functions = [_function(index, singles(row)) for index, row in enumerate(weights)]
    body = Body()
    y, sharing, turns = (
        body.to("d", "ld.param.u64", "[y]"),
        *(body.to("r", "ld.param.u32", f"[{name}]") for name in ("sharing", "turns")),
    )
    index = body.to("r", "div.u32", f"{body.to('r', 'mov.u32', '%ctaid.x')}, {sharing}")
    if len(weights) > 1:
        body.put(f"TABLE: .branchtargets {', '.join(f'TO_{code}' for code in range(len(weights)))}")
        body.put(f"brx.idx.uni {index}, TABLE")
    for code in range(len(weights)):
        body.label(f"TO_{code}")
        body.lines.append("\t{")
        body.put(".param .b64 to")
        body.put(".param .b32 many")
        body.put(f"st.param.b64 [to], {y}")
        body.put(f"st.param.b32 [many], {turns}")
        body.put(f"call.uni code_{code}, (to, many)")
        body.put("exit")
        body.lines.append("\t}")
    entry = f".visible .entry {SYMBOL}(.param .u64 y, .param .u32 sharing, .param .u32 turns)"
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


def launches(functions: int) -> Iterator[Launch]:
    """What to time of a kernel with so many functions, one for each block or one for all."""
    for warps in WARPS:
        for turns in TURNS:
            yield Launch(warps, 1 if functions > 1 else 1 << 16, 1, turns)
            for cluster in CLUSTERS if functions > 1 else ():
                yield Launch(warps, cluster, cluster, turns)
                yield Launch(warps, cluster, 1, turns)


def records(blocks: int, arch: str, functions: int, count: int) -> Iterator[Record]:
    """Times of a kernel of ``functions`` functions with ``count`` multiply-adds each, checked before."""
    weights = np.random.default_rng(count).uniform(-1, 1, (functions, count)).astype(np.float32)
    kernel = load(build(text(weights), SYMBOL, arch))
    y = torch.empty(blocks * 32 * max(WARPS), device="cuda")
    calls: dict[str, Call] = {}
    facts: dict[str, Launch] = {}
    for launch in launches(functions):
        call = launch.call(kernel, y, blocks)
        y.fill_(torch.nan)
        call()
        _check(y, weights, launch, blocks)
        calls[str(launch)], facts[str(launch)] = call, launch
    for name, times in measure(calls, ROUNDS).items():
        case = {"kind": SYMBOL, "functions": functions, "code_bytes": BYTES * count, **vars(facts[name])}
        yield Record(SYMBOL, case, "multiply-adds", "OK", times=times)


def totals(weights: npt.NDArray[np.float32], turns: int) -> npt.NDArray[np.float32]:
    """What a thread of each function stores, to the bit."""
    steps = np.tile(weights.reshape(len(weights), -1, SUMS), (1, turns, 1))
    start = np.ones((len(weights), 1, SUMS), np.float32)
    sums = np.add.accumulate(np.concatenate([start, steps], 1), axis=1)[:, -1]
    while sums.shape[1] > 1:
        sums = sums[:, ::2] + sums[:, 1::2]
    return sums[:, 0]


def _check(y: torch.Tensor, weights: npt.NDArray[np.float32], launch: Launch, blocks: int) -> None:
    """Every block ran its function, as often as it was told."""
    blocks -= blocks % launch.cluster
    found = y[: blocks * 32 * launch.warps].view(blocks, -1).cpu().numpy()
    if not (found == totals(weights, launch.turns)[np.arange(blocks) // launch.sharing][:, None]).all():
        raise SystemExit(f"wrong sums with {launch}")


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.instructions", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = cuda()
    with Writer(args.out) as writer, turn(device):
        where = writer.environment(environment(device))
        for functions, counts in ((1, SHARED), (device.num_sms, OWN)):
            for count in counts:
                for record in records(device.num_sms, device.arch, functions, count):
                    assert record.times is not None
                    writer.record(replace(record, environment=where))
                    print(f"{record.times.median_us:9.2f} us  {record.case}", flush=True)


if __name__ == "__main__":
    main()
