"""Tables of what tools/instructions.py and tools/counters.py measured, for the pages of tools/figures.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zeroskip.report.records import read
from zeroskip.report.tables import Table

CLOCK = 1980.0
"""Cycles in a microsecond, at which an H200 runs what is this short."""
SHOWN = (("all", 1, 8), ("all", 1, 32), ("eight", 1, 8), ("two", 1, 8), ("each its own", 1, 8), ("each its own", 1, 32))
"""Who has the same code, blocks of a cluster, warps of a multiprocessor."""
SHARING = {1: "each its own", 2: "two", 4: "four", 8: "eight"}
CLUSTERS = (("two", 2, 8), ("four", 4, 8), ("eight", 8, 8))


def instructions_table(path: Path) -> Table:
    """Straight multiply-adds: microseconds of a launch that finds its code where the last one left it, and of one that
    does not, and bytes a cycle for each multiprocessor where the code runs again and again."""
    if not path.exists():
        return Table((), (), frozenset())
    times: dict[tuple[str, int, int, int, int, bool], float] = {}
    for record in read(path).records:
        case = record.case
        assert record.times is not None
        who = SHARING.get(case["sharing"], "all")
        key = (who, case["cluster"], case["warps"], case["code_bytes"], case["turns"], case["again"])
        times[key] = record.times.median_us
    rows = []
    for who, cluster, warps in (*SHOWN, *CLUSTERS):
        for size in sorted({key[3] for key in times if key[:3] == (who, cluster, warps)}):
            first, fifth = (times[who, cluster, warps, size, turns, True] for turns in (1, 5))
            new = times[who, cluster, warps, size, 1, False]
            rate = size / ((fifth - first) / 4 * CLOCK)
            shared = who if cluster == 1 else f"{who}, a cluster"
            rows.append((shared, f"{warps}", f"{size // 1024}", f"{first:.2f}", f"{new:.2f}", f"{rate:.1f}"))
    head = ("who has the same code", "warps", "KB", "found, us", "not found, us", "looping, bytes a cycle")
    return Table(head, tuple(rows), frozenset(range(1, len(head))))


def counters_table(path: Path) -> Table:
    """Of each kernel that Nsight Compute counted: what its warps wait for, and how busy L1 and L2 are."""
    if not path.exists():
        return Table((), (), frozenset())
    head = (
        "layer",
        "method",
        "instructions of a multiprocessor",
        "issue slots used",
        "cycles from one instruction of a warp to the next",
        "for loads",
        "for room to load",
        "for instructions",
        "L1 busy",
        "L2's output busy",
    )
    return Table(head, tuple(_counted(json.loads(path.read_text()))), frozenset(range(2, len(head))))


def _counted(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for one in found["counted"]:
        case = one["case"]
        for kernel in one["kernels"]:

            def count(name: str, kernel: dict[str, list[str]] = kernel) -> float:
                return float(kernel[name][0].replace(",", ""))

            def stalled(why: str) -> str:
                return f"{count(f'smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio'):.1f}"

            active = count("sm__cycles_active.avg") / count("gpc__cycles_elapsed.avg")
            l2 = count("lts__lts2xbar_cycles_active.avg.pct_of_peak_sustained_elapsed") / active
            yield (
                f"{case['name']}, batch {case['batch']}, {case['precision']}",
                one["method"],
                f"{count('smsp__inst_executed.sum') / count('launch__sm_count'):,.0f}",
                f"{count('smsp__issue_active.avg.pct_of_peak_sustained_active'):.0f}%",
                f"{count('smsp__average_warp_latency_per_inst_issued.ratio'):.1f}",
                stalled("long_scoreboard"),
                stalled("lg_throttle"),
                stalled("no_instruction"),
                f"{count('l1tex__throughput.avg.pct_of_peak_sustained_active'):.0f}%",
                f"{l2:.0f}%",
            )
