"""What only the CPU side of a method has: vector widths and threads."""

from __future__ import annotations

import pytest
import torch

from contract.cases import METHODS, OURS, assert_right, bits, candidates, lanes, work
from contract.shapes import FEW, SHAPES
from zeroskip.core.device import cpu
from zeroskip.measure.bound import bind
from zeroskip.methods import registry


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("floats", [4, 8, 16])
@pytest.mark.parametrize("name", OURS)
def test_every_vector_width_is_within_the_bound(name: str, floats: int, shape: str) -> None:
    assert_right(name, work(SHAPES[shape], residual="after"), count=2, device=lanes(cpu(1), floats))


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("name", METHODS)
def test_two_threads_are_within_the_bound(name: str, shape: str) -> None:
    assert_right(name, work(SHAPES[shape]), count=3, device=cpu(2))


@pytest.mark.parametrize("pick", range(3))
@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("name", OURS)
def test_one_and_two_threads_give_the_same_bits(name: str, shape: str, pick: int) -> None:
    job = work(SHAPES[shape])
    method = registry()[name]
    segment = job.segment(method, cpu(2))
    found = candidates(method, segment, cpu(2))
    candidate, case = found[pick % len(found)], job.case()
    results = [bits(bind(method, segment, job.parameters, candidate, cpu(threads)), case) for threads in (1, 2, 3)]
    assert all(torch.equal(results[0], result) for result in results[1:])
