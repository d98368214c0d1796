"""Why does a kernel take as long as it does?  What Nsight Compute counts of configurations that records hold.

    python -m tools.counters benchmarks/results/h200 --out benchmarks/results/h200/counters.json

Run it in the repository's folder, with `src` in PYTHONPATH, on a machine with the GPU and `ncu`, which must be allowed
to read counters.  Each kernel runs with warm caches; what is counted is its last run.  What it says: the methods'
READMEs.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zeroskip.core.device import cuda
from zeroskip.core.env import environment
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.record import Record
from zeroskip.measure.bound import Case, Oracle, Stage, bind, check
from zeroskip.measure.turns import turn
from zeroskip.methods import registry
from zeroskip.report.layers import layer_of
from zeroskip.report.records import read
from zeroskip.report.rivals import NINE, TRAINED
from zeroskip.report.suite import BenchCase

FP32 = NINE | {"precision": "fp32"}
WATCHED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("squares", "sparsert", {"name": "2048,2048,2048", **FP32}),
    ("squares", "slab", {"name": "2048,2048,2048", **FP32}),
    ("fig10", "sparsert", {"name": "512,512,196", **FP32, "batch": 32}),
    ("fig10", "sparsert", {"name": "256,256,784", **FP32}),
    ("fig10", "sparsert", {"name": "512,512,196", **FP32}),
    ("fig10", "sparsert", {"name": "512,512,196", **FP32, "precision": "fp16"}),
    ("fig10", "slab", {"name": "1024,1024,49", **FP32}),
    ("conv3x3", "sparsert", {"name": "256,256,3x3 @14", "mask": TRAINED, "batch": 1, "precision": "fp32"}),
    ("conv3x3", "escort", {"name": "256,256,3x3 @14", "mask": TRAINED, "batch": 1, "precision": "fp32"}),
    ("escort_ablation", "escort:windows", {"name": "512,512,3x3 @28", "batch": 32, "precision": "fp32"}),
)
"""Suite, method and case of what the goals are about, or of what takes longer than its arithmetic says."""
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "InstructionStats",
    "LaunchStats",
)
KEPT = ("dram", "gpc", "gpu", "idc", "l1tex", "launch", "lts", "sm", "smsp")
"""Units whose counters are kept; the others are facts of the machine."""
NAMES = ("Kernel Name", "Block Size", "Grid Size")
"""What is kept of a kernel beside its counters."""
RUNS = 3
ONE = "--one"


def recorded(folder: Path, suite: str, method: str, facts: dict[str, Any]) -> Record:
    """The last record of the case, warm."""
    wanted = {**facts, "cache": "warm"}
    found = [
        record
        for record in read(folder / f"{suite}.jsonl").records
        if record.method == method and record.status == "OK" and record.case | wanted == record.case
    ]
    if not found:
        raise SystemExit(f"{folder}/{suite}.jsonl has no time of {method} for {wanted}")
    return found[-1]


def run(record: Record) -> None:
    """The configuration, checked, with the profiler on for the last run."""
    case = from_json(BenchCase, {name: value for name, value in record.case.items() if name != "cache"})
    method, device = registry()[record.method.partition(":")[0]], cuda()
    segment, parameters = layer_of(case)
    data = Case.random(segment, device=device.torch)
    candidate = method.candidate(segment, from_json(method.config_type, record.config))
    with torch.no_grad():
        stage = Stage(bind(method, segment, parameters, candidate, device), data)
        if not check(stage, Oracle(segment, parameters, data)).right:
            raise SystemExit(f"wrong: {record.method} with {record.config}")
        for _ in range(RUNS - 1):
            stage()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()  # type: ignore[no-untyped-call]
        stage()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()  # type: ignore[no-untyped-call]


def counted(record: Record) -> list[dict[str, list[str]]]:
    """Of each kernel of the last run: value and unit by the counter's name."""
    ncu = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"]
    ncu += ["--cache-control", "none", "--clock-control", "none"]
    ncu += [word for section in SECTIONS for word in ("--section", section)]
    done = subprocess.run(
        [*ncu, sys.executable, "-m", "tools.counters", ONE, json.dumps(to_json(record))],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        raise RuntimeError(f"ncu counted nothing:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    names, units, *rows = csv.reader(io.StringIO("\n".join(lines)))
    return [
        {
            name: [value, unit]
            for name, unit, value in zip(names, units, row, strict=True)
            if name.partition("__")[0] in (*KEPT, *NAMES) and value not in ("", "no data")
        }
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.counters", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument(ONE, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        return run(from_json(Record, json.loads(args.one)))
    if args.folder is None or args.out is None:
        parser.error("say where the records are, and with --out where to write")
    found = []
    with turn(cuda()):
        for suite, method, facts in WATCHED:
            record = recorded(args.folder, suite, method, facts)
            try:
                kernels = counted(record)
            except RuntimeError as error:
                print(f"{method}, {facts['name']}: {error}", flush=True)
                continue
            found.append({"case": record.case, "method": method, "config": record.config, "kernels": kernels})
            args.out.write_text(json.dumps({"environment": environment(cuda()), "counted": found}) + "\n")
            print(f"{method}, {facts['name']}: {len(kernels)} kernels", flush=True)


if __name__ == "__main__":
    main()
