"""One layer: every method with its best configuration, and every dense opponent, in turns."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zeroskip.core.cost import Cost
from zeroskip.core.device import Device
from zeroskip.core.errors import CompileError, FileFormatError, Unsupported, ZeroskipError
from zeroskip.core.graph import Segment
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import Epilogue, Layer, Sparsity
from zeroskip.core.method import AnyMethod, Candidate, LayerMethod, config_types
from zeroskip.core.oracle import TOLERANCE
from zeroskip.core.record import Record, Status
from zeroskip.measure.bound import Bound, Case, Oracle, Stage, bind, check, packed_bytes
from zeroskip.measure.graphs import Rotation
from zeroskip.measure.others import Timing
from zeroskip.measure.timer import Timer, measure
from zeroskip.measure.turns import turn
from zeroskip.methods import registry
from zeroskip.plan.search import MOST_CANDIDATES
from zeroskip.plan.tune import FINALISTS, tune
from zeroskip.report.baselines import baseline
from zeroskip.report.plausible import objection
from zeroskip.report.suite import LABEL, BenchCase, Cache
from zeroskip.report.vendors import Column, column, triton_candidates
from zeroskip.report.workload import layer_bias, layer_weight

COLD_CACHES = 3
"""A rotation goes through this many times the L2 cache: the two thirds that cannot be in it are what makes it cold."""

BETWEEN: Cache = "between"
FINAL_ROUNDS = 15
"""Between a library's quickest forms, where there are many."""

Call = Callable[[], object]
FAILED: tuple[tuple[type[Exception], Status], ...] = (
    (Unsupported, "UNSUPPORTED"),
    (CompileError, "COMPILE_ERROR"),
    (torch.OutOfMemoryError, "OUT_OF_MEMORY"),
    (RuntimeError, "LAUNCH_ERROR"),
)


def first_line(error: Exception) -> str:
    """Of what it says."""
    return (str(error).strip().splitlines() or [""])[0]


def status_of(error: Exception) -> Status:
    """What a record says of a case or method that failed with ``error``."""
    return next((status for kind, status in FAILED if isinstance(error, kind)), "LAUNCH_ERROR")


@dataclass(frozen=True)
class Contender:
    """Something that computed the right values and waits to be timed; ``on`` makes a call with memory of its own for
    a set of inputs."""

    draft: Record
    on: Callable[[Case], Call]


@dataclass(frozen=True)
class Work:
    """The layer of a case with what it computes on."""

    case: BenchCase
    timing: Timing
    segment: Segment
    parameters: Mapping[str, Tensor]
    """On the CPU."""
    data: Case
    oracle: Oracle
    cost: Cost

    @staticmethod
    def of(case: BenchCase, timing: Timing) -> Work:
        segment, parameters = layer_of(case)
        data = Case.random(segment, device=timing.device.torch)
        cost = registry()["dense"].cost(segment)
        return Work(case, timing, segment, parameters, data, Oracle(segment, parameters, data), cost)

    @property
    def device(self) -> Device:
        return self.timing.device

    @property
    def layer(self) -> Layer:
        return self.segment.layer

    def draft(self, method: str, status: Status, reason: str = "", **more: Any) -> Record:
        """A record without times.  The floor is that of the layer, whatever runs it."""
        return Record(
            "",
            self.case.facts,
            method,
            status,
            reason,
            floor_us=self.cost.seconds(self.device, self.layer.precision) * 1e6,
            flops=self.cost.flops,
            bytes=self.cost.moved,
            **more,
        )

    def sets(self) -> list[Case]:
        """Inputs for a cold cache: with the outputs written, more than it holds, several times over."""
        need = COLD_CACHES * self.device.l2_bytes
        count = max(2, math.ceil(need / (self.data.bytes + self.output_bytes)))
        return [Case.random(self.segment, seed, self.device.torch) for seed in range(count)]

    @property
    def output_bytes(self) -> int:
        return math.prod(self.layer.shape.output_shape) * self.data.x.element_size()


def layer_of(case: BenchCase) -> tuple[Segment, dict[str, Tensor]]:
    """The layer of a case and its parameters, on the CPU."""
    parameters = {"weight": layer_weight(case)}
    if case.epilogue:
        parameters["bias"] = layer_bias(case)
    epilogue = Epilogue(True, "relu") if case.epilogue else Epilogue()
    layer = Layer(case.name, "conv2d", case.shape, case.precision, Sparsity.of(parameters["weight"]), epilogue)
    return Segment((case.name,), ("x",), (case.name,), (layer,)), parameters


def bench_layer(case: BenchCase, device: Device, timer: Timer = measure) -> list[Record]:
    """Every method tuned and checked, then the best configuration of each and every opponent timed in turns; on a GPU
    once for each of the case's caches.  What cannot be timed is a record that says why."""
    with turn(device):
        work = Work.of(case, Timing(device, timer))
        if device.kind == "cpu":
            return _bench_layer(work, ())
        alone = tuple(cache for cache in case.caches if cache != BETWEEN)
        records = _bench_layer(work, alone) if alone else []
        if BETWEEN in case.caches:
            records += _bench_layer(replace(work, timing=replace(work.timing, between=True)), (BETWEEN,))
        return records


def _bench_layer(work: Work, caches: Sequence[Cache]) -> list[Record]:
    case, device = work.case, work.device
    entrants: list[Contender | Record] = []
    for name, method in registry().items():
        if case.methods is None or name in case.methods:
            entrants.append(_tuned(work, name, method))
        entrants += [_tuned(work, name, method, fields) for fields in case.configs.get(name, ())]
    entrants += [_opponent(work, name) for name in case.opponents]
    contenders: list[Contender] = []
    records: list[Record] = []
    for entrant in entrants:
        if isinstance(entrant, Contender):
            contenders.append(entrant)
        else:
            records.append(entrant)
    if device.kind == "cpu":
        return records + _timed(work, contenders, [work.data], None)
    found = [replace(record, case=case.facts | {"cache": cache}) for cache in caches for record in records]
    for cache in caches:
        sets = work.sets() if cache == "cold" else [work.data]
        found += _timed(work, contenders, sets, cache)
    return found


# -- who takes part -----------------------------------------------------------------------------------
def _tuned(work: Work, name: str, method: AnyMethod, fields: Mapping[str, Any] | None = None) -> Contender | Record:
    """The method's best configuration, with some ``fields`` of it fixed."""
    label = name if fields is None else f"{name}:{fields[LABEL]}"
    if not isinstance(method, LayerMethod):
        return work.draft(label, "UNSUPPORTED", "runs segments of several layers")
    if refusal := method.supports(work.layer, work.device):
        return work.draft(label, "UNSUPPORTED", refusal)
    if fields is None:
        return _best(work, label, method)
    fixed = {key: value for key, value in fields.items() if key != LABEL}
    try:
        candidates = restricted(method, work.segment, work.device, fixed)
    except Unsupported as reason:
        return work.draft(label, "UNSUPPORTED", str(reason))
    if not candidates:
        return work.draft(label, "UNSUPPORTED", f"no configuration with {fixed} fits this layer")
    return _best(work, label, method, candidates)


def _best(
    work: Work, label: str, method: AnyMethod, candidates: Sequence[Candidate[Any]] | None = None
) -> Contender | Record:
    """The fastest of the method's candidates, or of these, under a name."""
    started = time.perf_counter()
    among = None if candidates is None else {method.name: candidates}
    tuned = tune(work.segment, {method.name: method}, work.parameters, work.timing, among)
    seconds = time.perf_counter() - started
    if not tuned.options:
        return work.draft(label, _status(tuned.rejected[0].reason), tuned.rejected[0].reason)
    with torch.no_grad():
        bound = bind(method, work.segment, work.parameters, tuned.options[0].candidate, work.device)
        verdict = check(Stage(bound, work.data), work.oracle)
    draft = work.draft(
        label,
        "OK",
        config=to_json(bound.candidate.config),
        error={"relative": verdict.relative, "worst": verdict.worst},
        setup={
            "pack_seconds": bound.pack_seconds,
            "build_seconds": tuned.options[0].build_seconds,
            "tune_seconds": seconds,
            "packed_bytes": packed_bytes(bound.packed),
        },
    )
    # A dense library may round as often as its precision allows; what skips zeros is held to the bound.
    if not (verdict.right if method.exploits != "nothing" else verdict.relative <= TOLERANCE[work.layer.precision]):
        return replace(draft, status="WRONG", reason=f"an element is {verdict.worst:.3g} times its error bound away")
    return Contender(draft, lambda data: _stage(bound, data))


def _stage(bound: Bound, data: Case) -> Call:
    return Stage(bound, data)


def _status(reason: str) -> Status:
    """What a method's rejection was: ``tune`` puts the kind of the error in front."""
    kinds: dict[str, Status] = {
        "WRONG": "WRONG",
        "CompileError": "COMPILE_ERROR",
        "OutOfMemoryError": "OUT_OF_MEMORY",
        "RuntimeError": "LAUNCH_ERROR",
        "AcceleratorError": "LAUNCH_ERROR",
    }
    return kinds.get(reason.partition(":")[0], "UNSUPPORTED")


def restricted(method: AnyMethod, segment: Segment, device: Device, fixed: Mapping[str, Any]) -> list[Candidate[Any]]:
    """The method's candidates with some fields of their configuration fixed, those it would itself propose first.

    Raises:
        FileFormatError: all fields are given and make no configuration.
    """
    kind = method.config_type
    if any(set(fixed) == {item.name for item in dataclasses.fields(one)} for one in config_types(method)):
        return [method.candidate(segment, from_json(kind, dict(fixed)))]
    proposed = method.configs(segment, device)
    natural = [item for item in proposed if to_json(item.config) == to_json(item.config) | fixed]
    found = {repr(item.config): item for item in natural[: MOST_CANDIDATES[device.kind] // 2]}
    for item in proposed:
        try:
            changed = method.candidate(segment, from_json(kind, to_json(item.config) | fixed))
        except (FileFormatError, ValueError):
            continue
        found.setdefault(repr(changed.config), changed)
    return list(found.values())


def _opponent(work: Work, name: str) -> Contender | Record:
    started = time.perf_counter()
    try:
        if name == "triton":
            candidates = triton_candidates(work.segment, work.device)
            return _best(work, name, registry()["dense"], candidates)
        contender = _vendor(work, name) if work.device.kind == "cuda" else _torch(work, name)
    except Unsupported as reason:
        return work.draft(name, "UNSUPPORTED", str(reason))
    except (ZeroskipError, RuntimeError) as error:
        return work.draft(name, status_of(error), first_line(error))
    draft = replace(contender.draft, setup={"build_seconds": time.perf_counter() - started})
    wrong = draft.error["relative"]
    if not wrong <= TOLERANCE[work.layer.precision]:  # NaN is wrong too
        return replace(draft, status="WRONG", reason=f"a relative error of {wrong:.2g}")
    return replace(contender, draft=draft)


def _vendor(work: Work, name: str) -> Contender:
    """The fastest way to call a library of the GPU, of those that compute the right values.

    Raises:
        RuntimeError, ZeroskipError: every way failed.
    """
    there = work.device.torch
    bias = work.parameters.get("bias", torch.zeros(work.case.k, dtype=work.data.x.dtype))
    found = column(name, work.layer, work.parameters["weight"].to(there), bias.to(there))
    oracle = work.oracle
    if found.epilogue != work.layer.epilogue:
        bare = replace(work.segment, layers=(replace(work.layer, epilogue=found.epilogue),))
        oracle = Oracle(bare, {"weight": work.parameters["weight"]}, work.data)
    seconds: dict[str, float] = {}
    right: dict[str, float] = {}
    wrong: dict[str, float] = {}
    failed: list[Exception] = []
    for how, form in found.forms.items():
        try:
            call = form(work.data.x)
            error = oracle.judge(call()).relative
            if error <= TOLERANCE[work.layer.precision]:
                seconds[how], right[how] = work.timing.once(call), error
            else:
                wrong[how] = error
        except (ZeroskipError, RuntimeError) as problem:
            failed.append(problem)
    if not right and not wrong:
        raise failed[-1]
    best = _fastest(work, found, seconds) if right else next(iter(wrong))
    config: dict[str, Any] = {"form": best, "forms": len(found.forms)}
    if refused := len(found.forms) - len(right):
        config["refused"] = refused
    if len(seconds) > FINALISTS:
        config["tried_us"] = _by_way(seconds)
    said = f"{len(failed)} forms failed, the last one with: {first_line(failed[-1])}" if failed else ""
    draft = work.draft(name, "OK", said, config=config, error={"relative": (right or wrong)[best]})
    return Contender(draft, lambda data: found.forms[best](data.x))


def _by_way(seconds: Mapping[str, float]) -> dict[str, float]:
    """Microseconds of the quickest form of each way to lay out a product, as tried: a form is called ``way: which``."""
    found: dict[str, float] = {}
    for how, value in seconds.items():
        way = how.partition(":")[0]
        found[way] = min(found.get(way, value * 1e6), value * 1e6)
    return found


def _fastest(work: Work, found: Column, seconds: Mapping[str, float]) -> str:
    """The form with the least time; of many the quickest few are timed again, in turns."""
    ranked = sorted(seconds, key=lambda how: seconds[how])
    if len(ranked) <= FINALISTS:
        return ranked[0]
    calls: dict[str, Call] = {how: found.forms[how](work.data.x) for how in ranked[:FINALISTS]}
    for call in calls.values():
        call()
    times = work.timing.measure(calls, FINAL_ROUNDS).times
    return min(times, key=lambda how: times[how].median_us)


def _torch(work: Work, name: str) -> Contender:
    """The layer as a torch module on the CPU, in one of torch's ways or in ONNX Runtime."""
    case = work.case
    conv = nn.Conv2d(case.c, case.k, case.kernel, case.stride, case.padding, groups=case.groups, bias=case.epilogue)
    conv.weight = nn.Parameter(work.parameters["weight"])
    if case.epilogue:
        conv.bias = nn.Parameter(work.parameters["bias"])
    model = nn.Sequential(conv, nn.ReLU()) if case.epilogue else nn.Sequential(conv)
    call = baseline(name, model, work.data.x, work.device)
    draft = work.draft(name, "OK", error={"relative": work.oracle.judge(call()).relative})
    return Contender(draft, lambda data: call)


# -- times --------------------------------------------------------------------------------------------
def _timed(work: Work, contenders: Sequence[Contender], sets: Sequence[Case], cache: Cache | None) -> list[Record]:
    """A record for every contender, timed in turns with the others."""
    facts = work.case.facts if cache is None else work.case.facts | {"cache": cache}
    drafts: dict[str, Record] = {}
    calls: dict[str, Call] = {}
    failed: list[Record] = []
    with torch.no_grad():
        for contender in contenders:
            draft = replace(contender.draft, case=facts)
            try:
                calls[draft.method] = _ready(contender, sets, work.device)
            except RuntimeError as error:
                failed.append(replace(draft, status=status_of(error), reason=first_line(error)))
                continue
            drafts[draft.method] = draft
        if not calls:
            return failed
        measured = work.timing.measure(calls, work.case.rounds)
    own, found = work.data.bytes + work.output_bytes, []
    for name, times in measured.times.items():
        record = replace(drafts[name], times=times, contended=measured.contended)
        if cache is not None:
            if cache == "cold" and work.device.bandwidth_gbps:
                floor = own / (work.device.bandwidth_gbps * 1e3)
                record = replace(record, floor_us=max(record.floor_us, floor))
            why = objection(times.median_us, work.cost, work.device, work.layer.precision, cache, len(sets) * own, own)
            record = replace(record, status="IMPLAUSIBLE", reason=why) if why else record
        found.append(record)
    return failed + found


def _ready(contender: Contender, sets: Sequence[Case], device: Device) -> Call:
    """The call that is timed; on a GPU every part of it has run once, since a graph is captured of what is warm."""
    calls = [contender.on(data) for data in sets]
    if device.kind == "cpu":
        return calls[0]
    for call in calls:
        call()
    torch.cuda.synchronize()
    return calls[0] if len(calls) == 1 else Rotation(calls)
