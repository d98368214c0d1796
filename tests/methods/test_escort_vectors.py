"""Escort on CPUs with vectors of several lengths."""

from __future__ import annotations

import pytest

from contract.cases import lanes
from methods.jobs import Job
from zeroskip.core.device import cpu
from zeroskip.core.layer import ConvShape
from zeroskip.methods.escort.cpu import configs
from zeroskip.plan.search import MOST_CANDIDATES


@pytest.mark.parametrize(("floats", "wanted"), [(4, {4}), (8, {8}), (16, {8, 16})])
def test_short_vectors_are_tried_beside_long_ones(floats: int, wanted: set[int]) -> None:
    layer = Job.of(ConvShape(1, 12, 14, 14, 20, 3, 3, padding=(1, 1))).layer
    found = [config for _, config in configs(layer, lanes(cpu(1), floats))]
    assert {config.lanes for config in found[: MOST_CANDIDATES["cpu"]]} == wanted
    assert len(set(found)) == len(found)
