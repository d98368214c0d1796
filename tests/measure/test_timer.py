"""Timing on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from zeroskip.core.device import cpu
from zeroskip.core.record import Times
from zeroskip.measure.timer import disturbed, measure, once


@pytest.mark.parametrize("threads", [1, 2])
def test_operators_run_on_the_threads_of_the_device(threads: int) -> None:
    before, seen = torch.get_num_threads(), set[int]()
    torch.set_num_threads(3)
    try:
        device = replace(cpu(1), threads=threads)
        found = measure({"it": lambda: seen.add(torch.get_num_threads())}, 3, device).times["it"]
        once(lambda: seen.add(torch.get_num_threads()), device)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {threads}
    assert found.clock == ("cpu" if threads == 1 else "wall")
    assert len(found.samples_us) == 3


def test_what_a_call_raises_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        measure({"it": lambda: 1 // 0}, 3, replace(cpu(1), threads=before + 1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ((1.0,) * 8, (2.0,) * 8, False),
        ((1.0,) * 5 + (1.2,) * 3, (2.0,) * 8, False),  # one variant is uneven, the machine was quiet
        ((1.0,) * 5 + (1.2,) * 3, (2.0,) * 5 + (3.0,) * 3, True),
        ((1.0,) * 7 + (9.0,), (2.0,) * 7 + (9.0,), False),  # single samples say nothing
    ],
)
def test_samples_that_wait_for_somebody_else_are_seen(
    first: tuple[float, ...], second: tuple[float, ...], wanted: bool
) -> None:
    assert disturbed({"a": Times(first, "cuda"), "b": Times(second, "cuda")}) == wanted
