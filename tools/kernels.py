"""Compile every CUDA kernel that the methods list, for every architecture; a table, and exit code 1 beyond a budget.

``python tools/kernels.py [METHOD ...]``.  Needs no GPU.  Nothing comes from the user's cache or goes there.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from zeroskip import methods
from zeroskip.core.errors import CompileError
from zeroskip.cuda.compile import Instance, Resources, build, ready, resources

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")


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


def main(chosen: list[str]) -> int:
    """Print the table; the exit code."""
    if reason := ready():
        print(reason, file=sys.stderr)
        return 2
    jobs = [
        (method, instance, arch)
        for method, instance in instances()
        if not chosen or method in chosen
        for arch in ARCHITECTURES
    ]
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
    print("\n".join(["", *objections, f"{len(jobs)} kernels compiled, {len(objections)} not as they should be"]))
    return 1 if objections else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
