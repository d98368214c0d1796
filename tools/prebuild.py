"""Build what the cases of a suite will try on a GPU, on all cores, without measuring: a full cache to measure with.

    python tools/prebuild.py benchmarks/suites/networks_cuda.toml [--processes 8] [--device gpu.json] [--cases 0 1 2]

Packing and assembling take most of the time that planning a network takes, and nothing is measured meanwhile.
Here every case is planned as if each candidate took as long as its method estimates, so that about the same candidates
are built as a planner on the GPU would ask for; those that it asks for besides, it builds itself.  ``--device`` is
the ``cuda.device`` of ``zeroskip doctor --json``, for a machine without that GPU; by default the GPU here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from zeroskip.core import device as devices
from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported, ZeroskipError
from zeroskip.core.graph import CONV, LINEAR, Segment
from zeroskip.core.jsonable import from_json
from zeroskip.core.layer import PRECISION_DTYPES
from zeroskip.core.method import AnyMethod, Candidate, LayerMethod, Parameters, layer_parameters
from zeroskip.measure.bound import Prepared
from zeroskip.methods import registry
from zeroskip.plan.planner import claims
from zeroskip.plan.search import Search
from zeroskip.report.layers import layer_of
from zeroskip.report.suite import BenchCase, read_suite
from zeroskip.report.workload import example_of, missing_data, model_of

OVERHEAD_SECONDS, DENSE_SHARE = 3e-6, 0.5
"""Of a dense call, and what it reaches of the peak: only to tell which estimates are hopeless."""
PEAK_TFLOPS = {"fp32": 50.0, "tf32": 400.0, "fp16": 750.0, "bf16": 750.0}
"""Of an H100 or H200, where the device does not say."""


class Estimated(Search):
    """A search that builds, and takes estimates for times."""

    built = 0

    def measure(self, name: str, candidate: Candidate[Any], ready: Callable[[], Prepared]) -> float:
        ready()
        self.built += 1
        if self.methods[name].exploits == "nothing":
            layer = self.segment.layer
            peak = self.device.peak_tflops.get(layer.precision) or PEAK_TFLOPS[layer.precision]
            return OVERHEAD_SECONDS + 2 * layer.shape.macs / (DENSE_SHARE * peak * 1e12)
        return candidate.run_seconds or math.inf


def searches(case: BenchCase, device: Device) -> Iterator[tuple[Segment, dict[str, AnyMethod], Parameters]]:
    """What a planner tunes for the case: of a network its distinct layers, of a layer each method for itself."""
    from zeroskip.model.passes import simplify
    from zeroskip.model.trace import trace

    methods = {name: one for name, one in registry().items() if one.reproducible}
    methods = {name: one for name, one in methods.items() if case.methods is None or name in (*case.methods, "dense")}
    if case.kind == "layer":
        segment, parameters = layer_of(case)
        for name, method in methods.items():
            if isinstance(method, LayerMethod) and method.supports(segment.layer, device) is None:
                yield segment, {name: method}, parameters
        return
    dtype = PRECISION_DTYPES[case.precision]
    program = simplify(trace(model_of(case).to(dtype), (example_of(case).to(dtype),)))
    if case.precision == "tf32":
        program = program.with_tf32(frozenset((CONV, LINEAR)))
    layers, seen = program.layers(), set()
    for name in layers:
        for segment, able in claims(program.graph, layers, name, methods, device)[0].items():
            key = tuple(layer.key for layer in segment.layers)
            if len(segment.layers) == 1 and key not in seen:
                seen.add(key)
                yield segment, able, layer_parameters(program.graph, segment, program.tensors)


def build(path: Path, index: int, device: Device) -> tuple[str, int, float]:
    """The case's name, how many candidates were built (or found in the cache), seconds."""
    case, started, built = read_suite(path).cases[index], time.perf_counter(), 0
    title = f"{case.name}, batch {case.batch}, {case.precision}"
    if missing_data(case) is None:
        with torch.no_grad():
            for segment, methods, parameters in searches(case, device):
                search = Estimated(segment, methods, parameters, device)
                try:
                    search.all({})
                except (Unsupported, ZeroskipError) as reason:
                    title += f" ({reason})"
                built += search.built
    return title, built, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser("python tools/prebuild.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suites", nargs="+", type=Path)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--device", type=Path)
    parser.add_argument("--cases", nargs="+", type=int)
    args = parser.parse_args()
    device = from_json(Device, json.loads(args.device.read_text())) if args.device else devices.cuda()
    jobs = [
        (path, index)
        for path in args.suites
        for index in (args.cases if args.cases is not None else range(len(read_suite(path).cases)))
    ]
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for done in [pool.submit(build, path, index, device) for path, index in jobs]:
            title, built, seconds = done.result()
            print(f"{seconds:7.1f} s {built:5} built  {title}", flush=True)


if __name__ == "__main__":
    main()
