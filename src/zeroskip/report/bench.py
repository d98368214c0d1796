"""Run a suite: check, time in turns, write records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.core.device import Device
from zeroskip.core.env import environment
from zeroskip.core.errors import Unsupported, ZeroskipError
from zeroskip.core.graph import Segment
from zeroskip.core.jsonable import to_json
from zeroskip.core.layer import Epilogue, Layer, Sparsity
from zeroskip.core.record import Record, Times
from zeroskip.measure.bound import Case, Oracle, Stage, bind, check, packed_bytes
from zeroskip.measure.peaks import this_device
from zeroskip.measure.timer import measure
from zeroskip.methods import registry
from zeroskip.plan.planner import Progress, silent
from zeroskip.plan.tune import tune
from zeroskip.report.baselines import baseline
from zeroskip.report.records import Writer, read
from zeroskip.report.suite import BenchCase, example_of, layer_weight, model_of, read_suite
from zeroskip.run.compile import compile, distance

BASELINE_ERROR = 1e-4
"""Largest relative distance from the reference at which a dense opponent counts as right."""
LOADS = 7


def run_suite(
    path: Path,
    writer: Writer,
    budget_seconds: float | None = None,
    resume: Path | None = None,
    progress: Progress = silent,
) -> int:
    """Run the cases of the suite at ``path`` and write their records.

    Args:
        budget_seconds: start no further case once this is spent.
        resume: a results file; its cases that were measured with the same sources are skipped.

    Returns:
        The number of cases run.
    """
    suite = read_suite(path)
    known = _known(resume) if resume else set()
    started, done = time.perf_counter(), 0
    for index, case in enumerate(suite.cases):
        progress(index, len(suite.cases), case.name)
        facts = environment(case.threads)
        if (json.dumps(case.facts), facts["source"]) in known:
            continue
        if budget_seconds is not None and time.perf_counter() - started > budget_seconds:
            break
        before = torch.get_num_threads()
        torch.set_num_threads(case.threads)
        try:
            device = this_device(case.threads)
            facts |= {"peak_gflops": device.peak_tflops * 1e3, "copy_gbps": device.bandwidth_gbps}
            writer.environment(facts)
            for record in {"layer": bench_layer, "model": bench_model, "load": bench_load}[case.kind](case, device):
                writer.record(replace(record, suite=suite.name, environment=facts["id"]))
        finally:
            torch.set_num_threads(before)
        done += 1
    progress(len(suite.cases), len(suite.cases), "")
    return done


def _known(path: Path) -> set[tuple[str, str]]:
    file = read(path)
    return {(json.dumps(record.case), file.environments[record.environment]["source"]) for record in file.records}


# -- layers ---------------------------------------------------------------------------------------------
def bench_layer(case: BenchCase, device: Device) -> list[Record]:
    """Every method with its best configuration, and every dense opponent, in turns."""
    weight = layer_weight(case)
    bias = torch.randn(case.k, generator=torch.Generator().manual_seed(3))
    layer = Layer(case.name, "conv2d", case.shape, "fp32", Sparsity.of(weight), Epilogue(True, "relu"))
    segment, parameters = Segment((case.name,), ("x",), (case.name,), (layer,)), {"weight": weight, "bias": bias}
    data = Case.random(segment)
    oracle = Oracle(segment, parameters, data)
    records: list[Record] = []
    calls: dict[str, Callable[[], object]] = {}
    drafts: dict[str, Record] = {}

    for name, method in registry().items():
        started = time.perf_counter()
        tuned = tune(segment, {name: method}, parameters, device, measure)
        tune_seconds = time.perf_counter() - started
        if not tuned.options:
            records.append(Record("", case.facts, name, "UNSUPPORTED", tuned.rejected[0].reason))
            continue
        bound = bind(method, segment, parameters, tuned.options[0].candidate, device)
        stage = Stage(bound, data)
        verdict = check(stage, oracle)
        cost = method.cost(segment)
        draft = Record(
            "",
            case.facts,
            name,
            "OK" if verdict.right else "WRONG",
            config=to_json(bound.candidate.config),
            floor_us=cost.seconds(device) * 1e6,
            flops=cost.flops,
            bytes=cost.bytes_read + cost.bytes_written,
            error={"relative": verdict.relative, "worst": verdict.worst},
            setup={
                "pack_seconds": bound.pack_seconds,
                "build_seconds": bound.build_seconds,
                "tune_seconds": tune_seconds,
                "packed_bytes": packed_bytes(bound.packed),
            },
        )
        if not verdict.right:
            records.append(draft)
            continue
        calls[name], drafts[name] = stage, draft

    conv = nn.Conv2d(case.c, case.k, case.kernel, case.stride, case.padding, groups=case.groups)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    reference = oracle.expected.value
    _add_baselines(
        case,
        nn.Sequential(conv, nn.ReLU()),
        data.x,
        lambda y: _relative(y[oracle.images], reference),
        calls,
        drafts,
        records,
    )
    return records + _timed(case, calls, drafts)


def _relative(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())


def _add_baselines(
    case: BenchCase,
    model: nn.Module,
    x: Tensor,
    error: Callable[[Any], float],
    calls: dict[str, Callable[[], object]],
    drafts: dict[str, Record],
    records: list[Record],
) -> None:
    for name in case.baselines:
        started = time.perf_counter()
        try:
            call = baseline(name, model, x, case.threads)
        except Unsupported as reason:
            records.append(Record("", case.facts, name, "UNSUPPORTED", str(reason)))
            continue
        wrong = error(call())
        draft = Record(
            "",
            case.facts,
            name,
            "OK",
            error={"relative": wrong},
            setup={"build_seconds": time.perf_counter() - started},
        )
        if wrong > BASELINE_ERROR:
            records.append(replace(draft, status="WRONG"))
        else:
            calls[name], drafts[name] = call, draft


def _timed(case: BenchCase, calls: dict[str, Callable[[], object]], drafts: dict[str, Record]) -> list[Record]:
    with torch.no_grad():
        measured = measure(calls, case.rounds, case.threads)
    return [replace(drafts[name], times=times, contended=measured.contended) for name, times in measured.times.items()]


# -- models -------------------------------------------------------------------------------------------
def bench_model(case: BenchCase, device: Device) -> list[Record]:
    """The engine, the same engine with dense kernels only, and every dense opponent, in turns."""
    model, x = model_of(case), example_of(case)
    with torch.no_grad():
        # float64, so that the engine and its opponents are held to the same truth.
        reference = model.double()(x.double())
        model = model.float()
    calls: dict[str, Callable[[], object]] = {}
    drafts: dict[str, Record] = {}
    records: list[Record] = []
    for name, methods in (("zeroskip", None), ("zeroskip_dense", ("dense",))):
        started = time.perf_counter()
        engine = compile(model, x, threads=case.threads, methods=methods)
        seconds = time.perf_counter() - started
        steps = engine.plan.steps
        drafts[name] = Record(
            "",
            case.facts,
            name,
            "OK",
            error={"relative": distance(engine(x), reference)},
            config={"steps": {step.name: step.method for step in steps}},
            setup={"compile_seconds": seconds, "packed_bytes": float(sum(step.packed_bytes for step in steps))},
        )
        calls[name] = lambda engine=engine: engine(x)  # type: ignore[misc]
    _add_baselines(case, model, x, lambda y: distance(y, reference), calls, drafts, records)
    return records + _timed(case, calls, drafts)


# -- loading ------------------------------------------------------------------------------------------
_LOAD = """
import sys, time
import torch
torch.set_num_threads({threads})
import zeroskip
start = time.perf_counter()
zeroskip.load({path!r})
print(time.perf_counter() - start, "torch._dynamo.convert_frame" in sys.modules)
"""


def bench_load(case: BenchCase, device: Device) -> list[Record]:
    """``zeroskip.load`` in fresh processes, after ``import torch`` and ``import zeroskip``; the first fills the build
    cache and is not counted."""
    engine = compile(model_of(case), example_of(case), threads=case.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.zsk"
        engine.save(path)
        size = path.stat().st_size
        samples = []
        for _ in range(LOADS + 1):
            done = subprocess.run(
                [sys.executable, "-c", _LOAD.format(threads=case.threads, path=str(path))],
                capture_output=True,
                text=True,
                check=False,
                env=dict(os.environ, PYTHONPATH=":".join(sys.path)),
            )
            if done.returncode:
                raise ZeroskipError(f"loading in a fresh process failed:\n{done.stderr}")
            seconds, dynamo = done.stdout.split()
            assert dynamo == "False", "load must not import dynamo"
            samples.append(float(seconds) * 1e6)
    return [
        Record(
            "", case.facts, "zeroskip", "OK", times=Times(tuple(samples[1:]), "wall"), setup={"file_bytes": float(size)}
        )
    ]
