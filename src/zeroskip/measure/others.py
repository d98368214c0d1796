"""What a layer takes between other layers: with instruction caches that hold the code of others.

A kernel that is replayed again and again finds its instructions where it left them.  In a network every other layer ran
meanwhile, and they come from L2 again, 128 bytes after the other: on an H200 2 KB of straight code take 0.7 us longer
the first time and 8 KB 2.0 us (`tools/instructions.py`), as much as a small layer takes altogether.

So each call is timed behind a kernel that does nothing but fill the instruction caches, and that kernel's own time,
measured in turns with the others, is taken off.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from zeroskip.core.device import Device, cuda
from zeroskip.core.errors import Unsupported
from zeroskip.core.record import Times
from zeroskip.cuda.assemble import build
from zeroskip.cuda.launch import load
from zeroskip.measure.timer import Measurement, Timer, Variants, measure, once

log = logging.getLogger(__name__)

FUNCTIONS, LENGTH, SUMS = 8, 2048, 8
"""Pieces of code, 32 KB each: what one multiprocessor runs fills its own cache, what eight neighbours run the 128 KB
that those of a GPC share.  Multiply-adds of each, and how many of them do not wait for another."""
SYMBOL, ALONE = "others", "others alone"


@dataclass(frozen=True)
class Behind:
    """``call`` behind ``others``."""

    others: Callable[[], object]
    call: Callable[[], object]

    def __call__(self) -> object:
        self.others()
        return self.call()


def text() -> str:
    """PTX of a kernel with one warp to a block, which runs the piece of code that its multiprocessor's number says."""
    lines = [
        ".version 8.1",
        ".target sm_80",
        ".address_size 64",
        f".visible .entry {SYMBOL}(.param .u64 y)",
        "{",
        f".reg .pred %p; .reg .b32 %r<3>; .reg .b64 %d<3>; .reg .f32 %f<{SUMS + 1}>;",
        "ld.param.u64 %d0, [y];",
        "cvta.to.global.u64 %d0, %d0;",
        "mov.u32 %r0, %tid.x;",
        f"cvt.rn.f32.u32 %f{SUMS}, %r0;",
        *(f"mov.f32 %f{at}, %f{SUMS};" for at in range(SUMS)),
        "mov.u32 %r1, %smid;",
        f"rem.u32 %r1, %r1, {FUNCTIONS};",
    ]
    for piece in range(FUNCTIONS):
        lines += [f"setp.eq.u32 %p, %r1, {piece};", f"@%p bra CODE_{piece};"]
    for piece in range(FUNCTIONS):
        lines.append(f"CODE_{piece}:")
        for at in range(LENGTH):
            total, weight = f"%f{at % SUMS}", 0x3F800000 + piece * LENGTH + at  # 1 and a little, no two the same
            lines.append(f"fma.rn.f32 {total}, %f{SUMS}, 0f{weight:08X}, {total};")
        lines.append("bra.uni END;")
    lines.append("END:")
    lines += [f"add.rn.f32 %f0, %f0, %f{at};" for at in range(1, SUMS)]
    lines += [
        "mov.u32 %r2, %ctaid.x;",
        "mad.lo.u32 %r0, %r2, 32, %r0;",
        "mad.wide.u32 %d1, %r0, 4, %d0;",
        "st.global.f32 [%d1], %f0;",
        "ret;",
        "}",
    ]
    return "\n".join([*lines, ""])


@functools.cache
def _others(index: int) -> Callable[[], object] | None:
    """A launch on GPU ``index``, which has run once: every multiprocessor has one block.  None without nvJitLink, where
    layers are timed alone."""
    device = cuda()
    try:
        kernel = load(build(text(), SYMBOL, device.arch))
    except Unsupported as reason:
        log.warning("layers are timed with their instructions in the caches, as no network finds them: %s", reason)
        return None
    y = torch.empty(32 * device.num_sms, device="cuda")
    shared = device.shared_bytes // 2 + 1024  # of two blocks a multiprocessor has not enough

    def others() -> None:
        kernel.launch((device.num_sms, 1, 1), (32, 1, 1), (y,), shared_bytes=shared)

    others()
    return others


def _of(device: Device) -> Callable[[], object] | None:
    return None if device.kind == "cpu" else _others(torch.cuda.current_device())


@dataclass(frozen=True)
class Timing:
    """How calls are timed on ``device``: alone, or ``between`` others' code, which on a CPU is the same."""

    device: Device
    timer: Timer = measure
    between: bool = False

    def measure(self, variants: Variants, rounds: int) -> Measurement:
        """In turns, by the timer."""
        others = _of(self.device) if self.between else None
        if others is None:
            return self.timer(variants, rounds, self.device)
        behind = {name: Behind(others, call) for name, call in variants.items()}
        measured = self.timer({**behind, ALONE: others}, rounds, self.device)
        return Measurement(_without(measured.times, ALONE), measured.contended)

    def once(self, call: Callable[[], object]) -> float:
        """Seconds, at a first look."""
        others = _of(self.device) if self.between else None
        if others is None:
            return once(call, self.device)
        return max(once(Behind(others, call), self.device) - once(others, self.device), 0.0)


def _without(times: dict[str, Times], alone: str) -> dict[str, Times]:
    """Of every other variant, sample by sample, what it takes beyond the one that is ``alone``."""
    own = times[alone]
    return {
        name: Times(tuple(both - one for both, one in zip(found.samples_us, own.samples_us, strict=True)), found.clock)
        for name, found in times.items()
        if name != alone
    }
