"""Escort on CPUs with vectors of several lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods.jobs import Job
from zeroskip.core.device import Device, cpu
from zeroskip.core.layer import ConvShape
from zeroskip.measure.bound import Case, Oracle, Stage, bind, check
from zeroskip.methods.escort.cpu import configs
from zeroskip.methods.escort.method import METHOD
from zeroskip.plan.search import MOST_CANDIDATES

SHAPE = ConvShape(1, 12, 14, 14, 20, 3, 3, padding=(1, 1))


def device(lanes: int) -> Device:
    return replace(cpu(1), vector_floats=lanes, vector_registers=2 * lanes)


@pytest.mark.parametrize(("lanes", "wanted"), [(4, {4}), (8, {8}), (16, {8, 16})])
def test_short_vectors_are_tried_beside_long_ones(lanes: int, wanted: set[int]) -> None:
    found = [config for _, config in configs(Job.of(SHAPE).layer, device(lanes))]
    assert {config.lanes for config in found[: MOST_CANDIDATES["cpu"]]} == wanted
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_vectors_of_any_length_are_within_the_bound(lanes: int) -> None:
    """Also those that this CPU has none of: the compiler cuts them."""
    weight = torch.randn(SHAPE.weight_shape, generator=torch.Generator().manual_seed(0))
    job = Job.of(SHAPE, weight=torch.where(weight.abs() > 1.5, weight, 0.0))
    (first, *_) = [config for _, config in configs(job.layer, device(lanes)) if config.lanes == lanes]
    case = Case.random(job.segment)
    stage = Stage(bind(METHOD, job.segment, job.parameters, METHOD.candidate(job.segment, first), cpu(1)), case)
    assert check(stage, Oracle(job.segment, job.parameters, case)).right
