"""Compile CUDA kernels for every architecture; a table, and exit code 1 beyond a budget.

    python -m tools.kernels [METHOD ...]                                    # what the methods list, as CI does
    python -m tools.kernels [METHOD ...] --suites benchmarks/suites/*.toml  # and what they propose for these cases

Run it in the repository's folder, with `src` in PYTHONPATH.  Needs no GPU.  Nothing comes from the user's cache or goes
there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zeroskip import methods
from zeroskip.core.device import Device
from zeroskip.core.errors import CompileError, Unsupported
from zeroskip.core.graph import Segment
from zeroskip.core.method import AnyMethod, Candidate, Parameters
from zeroskip.cuda.compile import Instance, Resources, build, ready, resources, unpack
from zeroskip.plan.search import MOST_CANDIDATES
from zeroskip.report.suite import read_suite
from zeroskip.report.workload import missing_data

from .prebuild import searches

DEVICES = {
    "sm_80": Device("cuda", "A100", 40 << 20, arch="sm_80", num_sms=108, shared_bytes=163 * 1024),
    "sm_90a": Device("cuda", "H100", 50 << 20, arch="sm_90a", num_sms=132, shared_bytes=227 * 1024),
    "sm_100": Device("cuda", "B200", 126 << 20, arch="sm_100", num_sms=148, shared_bytes=227 * 1024),
}
"""One GPU of each architecture, to propose for."""
ARCHITECTURES = tuple(DEVICES)


def instances() -> Iterator[tuple[str, Instance]]:
    """(method, instance), of every method whose ``cuda.py`` lists its kernels."""
    for found in pkgutil.iter_modules(methods.__path__):
        module = f"{methods.__name__}.{found.name}.cuda"
        if found.ispkg and find_spec(module) is not None:
            for instance in getattr(importlib.import_module(module), "instances", tuple)():
                yield found.name, instance


def _compile(instance: Instance, arch: str) -> tuple[Resources | str, float]:
    """What it takes, or why it did not compile; seconds."""
    start = time.perf_counter()
    try:
        found: Resources | str = resources(build(instance.source, instance.expression, arch))
    except CompileError as error:
        found = str(error)
    return found, time.perf_counter() - start


def _proposed(
    suites: Sequence[Path], loosest: Mapping[str, Instance], pool: ThreadPoolExecutor
) -> tuple[int, list[str]]:
    """Compile what methods with kernels propose for the cases of suites: how many kernels, and what is wrong."""
    found, wrong = dict[bytes, str](), list[str]()
    for case in (case for path in suites for case in read_suite(path).cases):
        if missing_data(case) is not None:
            continue
        for arch, device in DEVICES.items():
            for segment, able, parameters in searches(case, device):
                for name in (name for name in able if name in loosest):
                    built = partial(_built, able[name], segment, parameters, device)
                    for binary in pool.map(built, _configs(able[name], segment, device)):
                        if binary is not None and binary not in found:
                            objection = loosest[name].objection(resources(binary))
                            found[binary] = f"{unpack(binary).symbol} ({arch}): {objection}" if objection else ""
        wrong = [objection for objection in found.values() if objection]
        name = f"{case.name}, batch {case.batch}, {case.precision}"
        print(f"{len(found):6} kernels after {name}: {len(wrong)} not as they should be", flush=True)
    return len(found), wrong


def _built(
    method: AnyMethod, segment: Segment, parameters: Parameters, device: Device, candidate: Candidate[Any]
) -> bytes | None:
    return method.build(method.pack(segment, parameters, candidate.config), device)


def _configs(method: AnyMethod, segment: Segment, device: Device) -> Sequence[Candidate[Any]]:
    """As many as a planner takes."""
    try:
        return list(method.configs(segment, device))[: MOST_CANDIDATES[device.kind]]
    except Unsupported:
        return []


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser("python -m tools.kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--suites", nargs="+", type=Path, default=[])
    args = parser.parse_args(words)
    if reason := ready():
        print(reason, file=sys.stderr)
        return 2
    listed = [(method, instance) for method, instance in instances() if not args.methods or method in args.methods]
    jobs = [(method, instance, arch) for method, instance in listed for arch in ARCHITECTURES]
    loosest = dict(sorted(listed, key=lambda one: one[1].spill_budget))
    print("registers  spills  stack  shared  seconds  arch    kernel")
    objections = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        os.environ["XDG_CACHE_HOME"] = folder
        for (_, instance, arch), (found, seconds) in zip(
            jobs, pool.map(lambda job: _compile(job[1], job[2]), jobs), strict=True
        ):
            if isinstance(found, str):
                figures, objection = f"{'-':>9}  {'-':>6}  {'-':>5}  {'-':>6}", found
            else:
                objection = instance.objection(found) or ""
                figures = f"{found.registers:9}  {found.spill_bytes:6}  {found.stack_bytes:5}  {found.shared_bytes:6}"
            print(f"{figures}  {seconds:7.2f}  {arch:6}  {instance.expression}{'  <--' if objection else ''}")
            if objection:
                objections.append(f"{instance.expression} ({arch}): {objection}")
        count, more = _proposed(args.suites, loosest, pool)
    objections += more
    print(
        "\n".join(["", *objections, f"{len(jobs) + count} kernels compiled, {len(objections)} not as they should be"])
    )
    return 1 if objections else 0


if __name__ == "__main__":
    sys.exit(main())
