"""The same tests on the CPU and, marked ``gpu``, on the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from contract.cases import GPU_ONLY, on


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """What ``contract.cases.here`` is: modules that use this run every test on both."""
    with on(request.param):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the CPU for methods that refuse it whatever the layer."""

    def useless(item: pytest.Item) -> bool:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        return given.get("device") == "cpu" and given.get("name") in GPU_ONLY

    if out := [item for item in items if useless(item)]:
        items[:] = [item for item in items if not useless(item)]
        config.hook.pytest_deselected(items=out)
