"""Run a suite: case after case, records as they come."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from zeroskip.core import device as devices
from zeroskip.core.device import Device
from zeroskip.core.env import environment
from zeroskip.core.errors import ZeroskipError
from zeroskip.core.record import Record
from zeroskip.cpu.threads import torch_threads
from zeroskip.measure.peaks import this_cpu, this_gpu
from zeroskip.plan.planner import Progress, silent
from zeroskip.report.layers import bench_layer, first_line, status_of
from zeroskip.report.models import bench_load, bench_model
from zeroskip.report.records import Writer, read
from zeroskip.report.suite import LABEL, BenchCase, read_suite
from zeroskip.report.workload import missing_data

EVERY = "*"
"""Stands for all methods in the record of a case that failed as a whole."""
LEFT_OUT = "left out, there is no"
"""Said of a case whose trained weights are not here."""


def run_suite(
    path: Path,
    writer: Writer,
    budget_seconds: float | None = None,
    resume: Path | None = None,
    progress: Progress = silent,
    processes: int = 1,
) -> int:
    """Run the cases of the suite at ``path`` and write their records.

    A case that the GPU cannot run becomes a record of that, one whose trained weights are not here is left out, and the
    run goes on.

    Args:
        budget_seconds: start no further case that would end beyond this if it took as long as the longest so far.
        resume: a results file; its cases that were measured with the same sources are skipped.
        processes: so many cases of a GPU at once, each in a process of its own: they build side by side and take turns
            on the GPU (``measure/turns.py``).

    Returns:
        The number of cases run.

    Raises:
        ZeroskipError: a kernel has made the GPU unusable for its process, or there are cases for several processes
            that need one; the records so far are written.
    """
    suite = read_suite(path)
    if processes > 1 and any(case.device == "cpu" or case.kind != "layer" for case in suite.cases):
        raise ZeroskipError(
            f"{path.name} has cases of the CPU, or networks, whose calls from Python are timed by the wall clock; "
            "others would disturb them: use one process (tools/prebuild.py builds on all cores)"
        )
    known = _known(resume) if resume else {}
    started, longest, done = time.perf_counter(), 0.0, 0
    environments: dict[Device, dict[str, Any]] = {}

    def here(case: BenchCase) -> dict[str, Any]:
        """The environment of a case, without peaks."""
        device = devices.cuda() if case.device == "cuda" else devices.cpu(case.threads)
        if device not in environments:
            environments[device] = environment(device)
        return environments[device]

    def left() -> Iterator[tuple[int, BenchCase]]:
        """Cases to run, said as they are begun."""
        for index, case in enumerate(suite.cases):
            progress(index, len(suite.cases), _title(case))
            if missing := missing_data(case):
                progress(index, len(suite.cases), f"{_title(case)}: {LEFT_OUT} {missing}")
                continue
            source = here(case)["source"]
            if all(_complete(case, known.get((json.dumps(one), source))) for one in case.all_facts):
                continue
            if budget_seconds is not None and time.perf_counter() - started + longest > budget_seconds:
                return
            yield index, case

    for outcome in _outcomes(path, left(), processes):
        facts = here(outcome.case)
        writer.environment(facts | _peaks(outcome.device))
        for record in outcome.records:
            writer.record(replace(record, suite=suite.name, environment=facts["id"]))
        longest, done = max(longest, outcome.seconds), done + 1
    progress(len(suite.cases), len(suite.cases), "")
    return done


@dataclass(frozen=True)
class Outcome:
    """Of a case; ``dead``: why its process can measure nothing more."""

    case: BenchCase
    device: Device
    records: list[Record]
    seconds: float
    dead: str


def _outcomes(path: Path, left: Iterator[tuple[int, BenchCase]], processes: int) -> Iterator[Outcome]:
    """As the cases end.

    Raises:
        ZeroskipError: after the last one, if a process could not go on.
    """
    if processes == 1:
        for _, case in left:
            yield (found := _outcome(case, this_cpu(case.threads) if case.device == "cpu" else this_gpu()))
            if found.dead:
                raise ZeroskipError(found.dead)
        return
    running, dead = set[Future[Outcome]](), ""
    gone = f"a process that measured for {path.name} is gone: run the rest with --resume"
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        while True:
            for index, _ in itertools.islice(left, 0 if dead else processes - len(running)):
                device = this_gpu()
                torch.cuda.empty_cache()
                try:
                    running.add(pool.submit(_outcome_of, path, index, device))
                except BrokenProcessPool:
                    dead = gone
                    break
            if not running:
                break
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                try:
                    yield (found := future.result())
                    dead = dead or found.dead
                except BrokenProcessPool:
                    dead = gone
    if dead:
        raise ZeroskipError(dead)


def _outcome_of(path: Path, index: int, device: Device) -> Outcome:
    """In a process that was told nothing else."""
    return _outcome(read_suite(path).cases[index], device)


def _outcome(case: BenchCase, device: Device) -> Outcome:
    begun = time.perf_counter()
    with torch_threads(case.threads if case.device == "cpu" else torch.get_num_threads()):
        records = _measured(case, device)
    return Outcome(case, device, records, time.perf_counter() - begun, _dead(case))


def _measured(case: BenchCase, device: Device) -> list[Record]:
    run: dict[str, Callable[[BenchCase, Device], list[Record]]]
    run = {"layer": bench_layer, "model": bench_model, "load": bench_load}
    try:
        records = run[case.kind](case, device)
        if device.kind == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 -- the other cases are worth the machine's time
        reason = f"{type(error).__name__}: {first_line(error)}"
        records = [Record("", facts, EVERY, status_of(error), reason) for facts in case.all_facts]
    return records


def _dead(case: BenchCase) -> str:
    """After an illegal access every further call of the process fails: what to do then, or nothing."""
    if case.device == "cpu":
        return ""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what one case leaves behind is not the next one's lack of memory
    except RuntimeError as error:
        return (
            f"{case.name}: the GPU does not answer this process any more ({first_line(error)}): run the rest "
            "in a new one, with --resume"
        )
    return ""


def _title(case: BenchCase) -> str:
    parts = [case.name, f"batch {case.batch}" if case.batch > 1 else ""]
    parts += [case.precision, "" if case.mask == "random" else case.mask] if case.device == "cuda" else []
    return ", ".join(filter(None, parts))


def _peaks(device: Device) -> dict[str, Any]:
    """For the environment: what floors were computed from."""
    if device.kind == "cpu":
        return {"peak_gflops": device.peak_tflops["fp32"] * 1e3, "copy_gbps": device.bandwidth_gbps}
    return {"peak_tflops": device.peak_tflops, "copy_gbps": device.bandwidth_gbps, "l2_gbps": device.l2_gbps}


def _known(path: Path) -> dict[tuple[str, str], set[str]]:
    """By case and source: what was measured, undisturbed."""
    file, found = read(path), dict[tuple[str, str], set[str]]()
    for record in (one for one in file.records if not one.contended):
        key = json.dumps(record.case), file.environments[record.environment]["source"]
        found.setdefault(key, set()).add(record.method)
    return found


def _complete(case: BenchCase, measured: set[str] | None) -> bool:
    """Whether all that the case asks for by name was measured, or the whole case failed."""
    if measured is None:
        return False
    if EVERY in measured or case.kind == "load":
        return True
    labels = [f"{method}:{entry[LABEL]}" for method, entries in case.configs.items() for entry in entries]
    named = case.methods if case.kind == "layer" and case.methods else ()
    return measured >= {*named, *labels, *case.opponents}
