"""The same tests on the CPU and, marked ``gpu``, on the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from contract.cases import on


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """What ``contract.cases.here`` is: modules that use this run every test on both."""
    with on(request.param):
        yield
