"""Whole networks: the engine, the engine with dense kernels only, and every dense opponent, in turns."""

from __future__ import annotations

import os
import statistics
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

from zeroskip.core.cost import Cost
from zeroskip.core.device import Device
from zeroskip.core.errors import Unsupported, ZeroskipError
from zeroskip.core.layer import PRECISION_DTYPES
from zeroskip.core.oracle import TOLERANCE
from zeroskip.core.record import Record, Times
from zeroskip.measure.timer import Timer, measure
from zeroskip.measure.turns import turn
from zeroskip.methods import registry
from zeroskip.model.bake import bake
from zeroskip.plan.tune import remembering
from zeroskip.report.baselines import baseline
from zeroskip.report.layers import first_line, status_of
from zeroskip.report.plausible import objection
from zeroskip.report.suite import BenchCase
from zeroskip.report.workload import example_of, model_of
from zeroskip.run.compile import compile, distance
from zeroskip.run.engine import Engine, executor
from zeroskip.run.graphs import WARM_UPS, in_capture_thread

LOADS = 7
CALLS = 31
"""Of the engine with its copies, by the wall clock."""
Call = Callable[[], Any]


def bench_model(case: BenchCase, device: Device, timer: Timer = measure) -> list[Record]:
    """Both engines and every opponent, each checked against the same network in float64, timed in turns.

    On a GPU what is timed is a captured graph of everything between input and output, on both sides; ``call_us`` in
    ``setup`` is a call of the engine from Python with its copies in and out.
    """
    if device.kind == "cpu":
        return _bench_model(case, device, timer)
    # cuDNN remembers per thread what it found, and engines are tuned for one.
    return in_capture_thread(lambda: _bench_model(case, device, timer))


def _bench_model(case: BenchCase, device: Device, timer: Timer) -> list[Record]:
    model, x = prepared(case, device)
    with torch.no_grad(), turn(device):
        reference = bake(model).double()(x.double())
    calls: dict[str, Call] = {}
    drafts: dict[str, Record] = {}
    records: list[Record] = []
    moved = Cost(0, 0, 0)

    def enter(draft: Record, call: Call, y: Any) -> None:
        wrong = distance(y, reference)
        draft = replace(draft, error={"relative": wrong})
        if wrong <= TOLERANCE[case.precision]:
            calls[draft.method], drafts[draft.method] = call, draft
        else:
            reason = f"the outputs are {wrong:.2g} of the largest away from float64"
            records.append(replace(draft, status="WRONG", reason=reason))

    with remembering():
        # The second shows what fusion and graph gain without any zero skipped.
        for name, skip_zeros in (("zeroskip", True), ("zeroskip_dense", False)):
            started = time.perf_counter()
            engine = compiled(case, model, x, device, skip_zeros)
            if skip_zeros:
                moved = Cost(0, sum(step.bytes for step in engine.plan.steps), 0)
            draft = Record(
                "",
                case.facts,
                name,
                "OK",
                config={"steps": {step.name: step.method for step in engine.plan.steps}},
                setup={
                    "compile_seconds": time.perf_counter() - started,
                    "packed_bytes": float(sum(step.packed_bytes for step in engine.plan.steps)),
                },
            )
            with turn(device):
                y = engine(x)
                if device.kind == "cuda":
                    draft.setup["call_us"] = _call_us(engine, x)
                enter(draft, timed_call(engine, x, device), y)
    with torch.no_grad(), turn(device):
        for name in case.opponents:
            started = time.perf_counter()
            try:
                call = baseline(name, model, x, device, case.precision)
            except Unsupported as reason:
                records.append(Record("", case.facts, name, "UNSUPPORTED", str(reason)))
                continue
            except RuntimeError as error:
                records.append(Record("", case.facts, name, status_of(error), first_line(error)))
                continue
            draft = Record("", case.facts, name, "OK", setup={"build_seconds": time.perf_counter() - started})
            enter(draft, call, call())
        if not calls:
            return records
        measured = timer(calls, case.rounds, device)
    return records + [
        _judged(replace(drafts[name], times=times, contended=measured.contended), moved, device)
        for name, times in measured.times.items()
    ]


def _judged(record: Record, moved: Cost, device: Device) -> Record:
    """With its floor on a GPU: what the layers of the network read and write, zeros left out, passes the L2 cache.  It
    need not come from memory, as one layer may find what another left; operations are not counted, since cuDNN has
    ways to make a layer of fewer."""
    assert record.times is not None
    if device.kind == "cpu":
        return record
    cache = replace(device, bandwidth_gbps=0.0)
    why = objection(record.times.median_us, moved, cache, "fp32")
    record = replace(record, floor_us=moved.seconds(cache) * 1e6)
    return replace(record, status="IMPLAUSIBLE", reason=why) if why else record


def prepared(case: BenchCase, device: Device) -> tuple[nn.Module, Tensor]:
    """The case's network and image on the device, in its precision: what the opponents and the reference share."""
    dtype, model, x = PRECISION_DTYPES[case.precision], model_of(case), example_of(case)
    with turn(device):
        return model.to(device.torch, dtype), x.to(device.torch, dtype)


def compiled(case: BenchCase, model: nn.Module, x: Tensor, device: Device, skip_zeros: bool = True) -> Engine:
    """The case's engine, of what ``prepared`` gave."""
    if device.kind == "cpu":
        return compile(model, x, threads=case.threads, methods=case.methods, skip_zeros=skip_zeros)
    # Half precision is what the model has.
    precision = case.precision if case.precision == "fp32" or case.precision == "tf32" else None
    return compile(model, x, methods=case.methods, skip_zeros=skip_zeros, precision=precision)


def timed_call(engine: Engine, x: Tensor, device: Device) -> Call:
    """What is timed of an engine, warm."""
    if device.kind == "cpu":
        return lambda: engine(x)
    # The engine replays a graph of its own, which cannot be captured in another.  This is what that graph holds; the
    # image lies as the first layer wants it, for the engine as for its opponents.
    run = executor(engine.variants[0], registry())
    call = run.on((x.contiguous(memory_format=run.input_format(0)),))
    for _ in range(WARM_UPS):
        call()
    return call


def _call_us(engine: Engine, x: Tensor) -> float:
    """Median microseconds of a call from Python until its result is there."""
    samples = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine(x)
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - started) * 1e6)
    return statistics.median(samples)


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
    model, x = prepared(case, device)
    engine = compiled(case, model, x, device)
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
