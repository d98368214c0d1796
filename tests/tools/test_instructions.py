"""The kernels that measure how instructions arrive hold the instructions they are said to."""

from __future__ import annotations

import numpy as np
import pytest

from tools import instructions
from zeroskip.core.device import cuda
from zeroskip.cuda.assemble import build
from zeroskip.cuda.compile import unpack


def test_every_multiply_add_is_an_instruction() -> None:
    pytest.importorskip("cuda.core")
    weights = np.random.default_rng(0).uniform(-1, 1, (3, 256)).astype(np.float32)
    sizes = []
    for count in (128, 256):
        built = unpack(build(instructions.text(weights[:, :count]), instructions.SYMBOL, "sm_90a"))
        assert built.resources.spill_bytes == 0
        sizes.append(len(built.cubin))
    assert 3 * 128 * instructions.BYTES <= sizes[1] - sizes[0] < 3 * 160 * instructions.BYTES


def test_totals_are_those_of_one_multiply_add_after_the_other() -> None:
    weights = np.random.default_rng(0).uniform(-1, 1, (2, 24)).astype(np.float32)
    for function, found in zip(weights, instructions.totals(weights, 3), strict=True):
        sums = [np.float32(1)] * 8
        for _ in range(3):
            for at, weight in enumerate(function):
                sums[at % 8] = sums[at % 8] + weight
        while len(sums) > 1:
            sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
        assert found == sums[0]


@pytest.mark.gpu
@pytest.mark.parametrize("own", [True, False])
def test_functions_run_as_often_as_they_are_told(own: bool) -> None:
    found = list(instructions.records(32, cuda().arch, own, 128))
    assert len(found) == len(list(instructions.launches(32, own)))
