"""The bound holds where results are too small for normal numbers, and is not much wider than rounding needs."""

from __future__ import annotations

import pytest

from methods.jobs import Job
from zeroskip.core.layer import PRECISION_DTYPES, ConvShape, Precision
from zeroskip.core.oracle import UNDERFLOW


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_products_below_the_normal_numbers_lie_within_the_bound(precision: Precision) -> None:
    dtype = PRECISION_DTYPES[precision]
    smallest, tiny = 2 * UNDERFLOW[dtype], {"fp32": 2.0**-75, "fp16": 2.0**-12, "bf16": 2.0**-67}[precision]
    job = Job.of(ConvShape(1, 1, 64, 64, 8, 1, 1), precision=precision)
    job.x.mul_(8 * tiny)
    job.weight.mul_(tiny)
    want = job.expected
    y = want.value.to(dtype).double()
    assert (y == 0).any()
    assert (y.abs() == smallest).any()
    share = (y - want.value).abs() / want.bound
    assert 0.4 < share.max() <= 1
    wrong = (y + 2 * smallest - want.value).abs()
    assert (wrong > want.bound).all()
