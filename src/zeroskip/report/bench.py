"""Run a suite: case after case, records as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
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
) -> int:
    """Run the cases of the suite at ``path`` and write their records.

    A case that the GPU cannot run becomes a record of that, one whose trained weights are not here is left out, and the
    run goes on.

    Args:
        budget_seconds: start no further case that would end beyond this if it took as long as the longest so far.
        resume: a results file; its cases that were measured with the same sources are skipped.

    Returns:
        The number of cases run.

    Raises:
        ZeroskipError: a kernel has made the GPU unusable for this process; the records so far are written.
    """
    suite = read_suite(path)
    known = _known(resume) if resume else {}
    started, longest, done = time.perf_counter(), 0.0, 0
    environments: dict[Device, dict[str, Any]] = {}
    for index, case in enumerate(suite.cases):
        progress(index, len(suite.cases), _title(case))
        here = devices.cuda() if case.device == "cuda" else devices.cpu(case.threads)
        if missing := missing_data(case):
            progress(index, len(suite.cases), f"{_title(case)}: {LEFT_OUT} {missing}")
            continue
        if here not in environments:
            environments[here] = environment(here)
        facts = environments[here]
        if all(_complete(case, known.get((json.dumps(one), facts["source"]))) for one in case.all_facts):
            continue
        begun = time.perf_counter()
        if budget_seconds is not None and begun - started + longest > budget_seconds:
            break
        with torch_threads(case.threads if case.device == "cpu" else torch.get_num_threads()):
            device = this_cpu(case.threads) if case.device == "cpu" else this_gpu()
            writer.environment(facts | _peaks(device))
            for record in _measured(case, device):
                writer.record(replace(record, suite=suite.name, environment=facts["id"]))
            _check_alive(case)
        longest, done = max(longest, time.perf_counter() - begun), done + 1
    progress(len(suite.cases), len(suite.cases), "")
    return done


def _measured(case: BenchCase, device: Device) -> list[Record]:
    run: dict[str, Callable[[BenchCase, Device], list[Record]]]
    run = {"layer": bench_layer, "model": bench_model, "load": bench_load}
    if device.kind == "cpu":
        return run[case.kind](case, device)
    try:
        records = run[case.kind](case, device)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 -- the other cases are worth the machine's time
        reason = f"{type(error).__name__}: {first_line(error)}"
        records = [Record("", facts, EVERY, status_of(error), reason) for facts in case.all_facts]
    return records


def _check_alive(case: BenchCase) -> None:
    """After an illegal access every further call of the process fails."""
    if case.device == "cpu":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what one case leaves behind is not the next one's lack of memory
    except RuntimeError as error:
        raise ZeroskipError(
            f"{case.name}: the GPU does not answer this process any more ({first_line(error)}): run the rest "
            "in a new one, with --resume"
        ) from error


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
