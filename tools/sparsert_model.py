"""Fit the model of methods/sparsert/estimate.py: many configurations of some layers, timed, and the constants that say
their times best.

    python -m tools.sparsert_model sample --out benchmarks/results/h200/sparsert_samples.jsonl
    python -m tools.sparsert_model fit benchmarks/results/h200/sparsert_samples.jsonl [--cache between]

Run it in the repository's folder, with `src` in PYTHONPATH.  Sampling wants a GPU and many cores, which assemble for
minutes; ``--build`` does only that, for the GPU that ``--device`` describes as ``zeroskip doctor --json`` does.  Half
of what is drawn is of what the model thinks best, half of anything that it thinks up to three times slower.  Fitting
wants neither.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from zeroskip.core import device as devices
from zeroskip.core.device import Device
from zeroskip.core.env import environment
from zeroskip.core.errors import ZeroskipError
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import Layer
from zeroskip.core.record import Record
from zeroskip.measure.bound import Case, Oracle, Prepared, Stage, bind, check
from zeroskip.measure.others import Timing
from zeroskip.measure.turns import turn
from zeroskip.methods.sparsert import estimate
from zeroskip.methods.sparsert.config import SparseRTConfig
from zeroskip.methods.sparsert.method import METHOD
from zeroskip.plan.search import prepared
from zeroskip.report.layers import layer_of
from zeroskip.report.records import Writer, read
from zeroskip.report.suite import BenchCase

from .kernels import DEVICES

SUITE = "sparsert_samples"
LAYERS = (
    (128, 64, 56, 1, 1),
    (128, 128, 56, 1, 1),
    (256, 256, 28, 1, 1),
    (512, 256, 14, 1, 1),
    (512, 512, 14, 1, 1),
    (1024, 512, 7, 1, 1),
    (512, 256, 14, 1, 8),
    (512, 512, 14, 1, 8),
    (1024, 512, 7, 1, 8),
    (512, 512, 14, 1, 32),
    (128, 128, 56, 1, 8),
    (64, 64, 56, 3, 1),
    (128, 128, 28, 3, 1),
    (256, 256, 14, 3, 1),
    (256, 256, 14, 3, 8),
)
"""Output and input channels, side of the image and of the kernel, images; 90% zeros."""
MOST_BUILD_SECONDS, WITHIN, BEST = 15.0, 3.0, 40
"""What would take longer to assemble is left out; how many times slower than the best may be drawn; what counts as the
best."""
ROUNDS = 7
FITTED = ("LAUNCH", "WAVE", "SPLIT", "ISSUE", "WAITING", "L1", "GPC", "SM", "X", "GLOBAL")
STEPS, STEP = 1500, 0.25


def cases() -> Iterator[BenchCase]:
    for k, c, side, kernel, batch in LAYERS:
        name = f"{k},{c},{kernel}x{kernel} @{side}"
        yield BenchCase(
            "layer", name, k=k, c=c, h=side, w=side, kernel=kernel, padding=kernel // 2, batch=batch, device="cuda"
        )


def drawn(case: BenchCase, device: Device, count: int) -> list[SparseRTConfig]:
    """Half of the likeliest, half of the others."""
    layer = layer_of(case)[0].layer
    found = sorted(
        (estimate.estimated(layer, config, device) for config in dict.fromkeys(estimate.menu(layer, device))),
        key=lambda one: one.seconds,
    )
    found = [one for one in found if one.build_seconds < MOST_BUILD_SECONDS]
    others = [one for one in found[BEST:] if one.seconds < WITHIN * found[0].seconds]
    draw = random.Random(case.name)
    chosen = draw.sample(found[:BEST], min(count // 2, len(found[:BEST])))
    chosen += draw.sample(others, min(count - count // 2, len(others)))
    return [one.config for one in chosen]


def built(case: BenchCase, device: Device, count: int) -> list[tuple[SparseRTConfig, Prepared]]:
    """Packed and assembled, on all cores."""
    segment, parameters = layer_of(case)
    candidates = [METHOD.candidate(segment, config) for config in drawn(case, device, count)]
    found = prepared(segment, {METHOD.name: METHOD}, parameters, device, {METHOD.name: candidates})[METHOD.name]
    return [(one.config, ready()) for one, ready in zip(candidates, found, strict=True)]


def sampled(case: BenchCase, device: Device, count: int) -> Iterator[Record]:
    """Times of those that are right, warm and between others' code."""
    segment, parameters = layer_of(case)
    ready = {str(index): one for index, one in enumerate(built(case, device, count))}
    with torch.no_grad(), turn(device):
        data = Case.random(segment, device=device.torch)
        oracle, stages = Oracle(segment, parameters, data), dict[str, Stage]()
        for name, (config, own) in ready.items():
            try:
                candidate = METHOD.candidate(segment, config)
                stage = Stage(bind(METHOD, segment, parameters, candidate, device, own), data)
                right = check(stage, oracle).right
            except (ZeroskipError, RuntimeError) as error:
                print(f"{case.name}: {type(error).__name__}: {error} with {config}", flush=True)
                continue
            if not right:
                raise SystemExit(f"{case.name} is wrong with {config}")
            stages[name] = stage
        for cache, timing in (("warm", Timing(device)), ("between", Timing(device, between=True))):
            for name, times in timing.measure(stages, ROUNDS).times.items():
                config = to_json(ready[name][0])
                yield Record(SUITE, case.facts | {"cache": cache}, METHOD.name, "OK", config=config, times=times)


def sample(out: Path, count: int) -> None:
    device = devices.cuda()
    with Writer(out) as writer:
        where = writer.environment(environment(device))
        for case in cases():
            found = [replace(record, environment=where) for record in sampled(case, device, count)]
            for record in found:
                writer.record(record)
            print(f"{len(found):5} times  {case.name}, batch {case.batch}", flush=True)


# -- fitting ------------------------------------------------------------------------------------------
def points(path: Path, cache: str) -> list[tuple[float, Callable[[], float]]]:
    """Microseconds measured, and a call that says what the model now thinks."""
    found, device = [], DEVICES["sm_90a"]
    for record in read(path).records:
        if record.times is None or record.case["cache"] != cache:
            continue
        layer = _layer(json.dumps({name: value for name, value in record.case.items() if name != "cache"}))
        config = from_json(SparseRTConfig, record.config)
        found.append((record.times.median_us, functools.partial(_model_us, layer, config, device)))
    return found


@functools.cache
def _layer(case: str) -> Layer:
    return layer_of(from_json(BenchCase, json.loads(case)))[0].layer


def _model_us(layer: Layer, config: SparseRTConfig, device: Device) -> float:
    return estimate.estimated(layer, config, device).seconds * 1e6


def off(found: Sequence[tuple[float, Callable[[], float]]]) -> tuple[float, float]:
    """Root mean square and mean of the logarithm of measured over estimated."""
    logs = [math.log(us / model()) for us, model in found]
    return statistics.pstdev(logs), statistics.mean(logs)


def fit(path: Path, cache: str) -> None:
    """Change one constant at a time and keep what brings the model nearer."""
    found = points(path, cache)
    draw = random.Random(0)
    spread, mean = off(found)
    print(f"{len(found)} times, off by {spread:.3f} (mean {mean:+.3f})")
    least = math.hypot(spread, mean)
    for _ in range(STEPS):
        name = draw.choice(FITTED)
        before = getattr(estimate, name)
        setattr(estimate, name, before * math.exp(draw.gauss(0, STEP)))
        now = math.hypot(*off(found))
        if now < least:
            least = now
        else:
            setattr(estimate, name, before)
    spread, mean = off(found)
    print(f"fitted: off by {spread:.3f} (mean {mean:+.3f})")
    print(", ".join(f"{name} = {getattr(estimate, name):.3g}" for name in FITTED))


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.sparsert_model", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("what", choices=("sample", "fit"))
    parser.add_argument("records", nargs="?", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=48, help="configurations of a layer")
    parser.add_argument("--build", action="store_true", help="only pack and assemble, into the build cache")
    parser.add_argument("--device", type=Path)
    parser.add_argument("--cache", choices=("warm", "between"), default="between")
    args = parser.parse_args()
    if args.build:
        device = from_json(Device, json.loads(args.device.read_text())) if args.device else devices.cuda()
        for case in cases():
            print(f"{len(built(case, device, args.count)):5} built  {case.name}, batch {case.batch}", flush=True)
    elif args.what == "sample":
        sample(args.out, args.count)
    else:
        fit(args.records, args.cache)


if __name__ == "__main__":
    main()
