"""Where does the time of a network go?  Every kernel of its graph in order, beside what its layers took alone.

    python -m tools.timeline benchmarks/suites/networks_cuda.toml --case 3 --out benchmarks/results/h200/timeline.json

Run it in the repository's folder, with `src` in PYTHONPATH, on a machine with the GPU.  The network is compiled as
`zeroskip bench` does; the profiler sees its graph replayed.  A kernel's microseconds are the profiler's, which lasts a
little longer itself; the gap before it is from the end of the one before, negative where they overlap.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from zeroskip.core.device import cuda
from zeroskip.core.env import environment
from zeroskip.measure.graphs import Replay, measure
from zeroskip.measure.turns import turn
from zeroskip.report.models import compiled, prepared, timed_call
from zeroskip.report.suite import read_suite
from zeroskip.run.graphs import in_capture_thread

REPLAYS, ROUNDS = 20, 15


@dataclass(frozen=True)
class Kernel:
    """Microseconds, medians over the replays."""

    name: str
    gap_us: float
    us: float


def kernels(replay: Replay) -> Iterator[Kernel]:
    """Those of one replay, in order."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    events = seen.profiler.kineto_results.events()
    found = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    found.sort(key=lambda event: event.start_ns())
    if not found or len(found) % REPLAYS:
        raise SystemExit(f"the profiler saw {len(found)} kernels of {REPLAYS} replays")
    each = len(found) // REPLAYS
    for place in range(each):
        same, gap = found[place::each], 0.0
        if place:
            pairs = zip(found[place - 1 :: each], same, strict=True)
            gap = statistics.median(one.start_ns() - last.start_ns() - last.duration_ns() for last, one in pairs)
        yield Kernel(same[0].name(), gap / 1e3, statistics.median(one.duration_ns() for one in same) / 1e3)


def timeline(suite: Path, index: int, out: Path) -> None:
    case, device = read_suite(suite).cases[index], cuda()
    model, x = prepared(case, device)
    engine = compiled(case, model, x, device)
    with turn(device), torch.no_grad():
        call = timed_call(engine, x, device)
        whole = measure({"it": call}, ROUNDS)["it"].median_us
        found = list(kernels(Replay(call)))
    steps = [(step.name, step.method, step.time_us) for step in engine.plan.steps]
    for kernel in found:
        print(f"{kernel.gap_us:8.2f} {kernel.us:8.2f}  {kernel.name[:90]}")
    alone = sum(us for _, _, us in steps if us is not None)
    busy, gaps = sum(one.us for one in found), sum(one.gap_us for one in found)
    print(f"{whole:.1f} us a replay; {len(found)} kernels: {busy:.1f} us, gaps {gaps:.1f}")
    print(f"{len(steps)} layers alone: {alone:.1f} us")
    facts = {"case": case.facts, "whole_us": whole, "steps": steps, "kernels": [vars(one) for one in found]}
    out.write_text(json.dumps({"environment": environment(device), **facts}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.timeline", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("--case", type=int, required=True, help="its number in the suite, from 0")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    in_capture_thread(lambda: timeline(args.suite, args.case, args.out))


if __name__ == "__main__":
    main()
