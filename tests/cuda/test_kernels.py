"""Every kernel that a method ships compiles for every architecture, within its budget of spills.  Needs no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import kernels
from zeroskip import measure, methods
from zeroskip.cuda.compile import INCLUDE, Instance, build, resources

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the compiler's wheels are for Linux")

ROOT = Path(__file__).parents[2]
ARCHITECTURES = kernels.ARCHITECTURES
FOUND = list(kernels.instances())
KERNELS = Path(__file__).with_name("kernels.cuh")
OURS = [
    "add<float, 1>",
    "add<float, 4>",
    "add<float, 8>",
    "add<__half, 8>",
    "add<__nv_bfloat16, 16>",
    "end<float, zeroskip::Activation::relu, zeroskip::Residual::before>",
    "end<__half, zeroskip::Activation::relu6, zeroskip::Residual::after>",
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("instance", [pytest.param(one, id=f"{name}-{one.expression}") for name, one in FOUND])
def test_what_a_method_ships_compiles_within_its_budget(instance: Instance, arch: str) -> None:
    found = resources(build(instance.source, instance.expression, arch))
    assert instance.objection(found) is None


def test_no_methods_kernels_are_forgotten() -> None:
    sources = {path.parent.name for path in Path(methods.__path__[0]).glob("*/*.cuh")}
    assert sources <= {name for name, _ in FOUND}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", OURS)
def test_shared_headers_cost_no_local_memory(kernel: str, arch: str) -> None:
    instance = Instance(KERNELS, f"zeroskip::testing::{kernel}")
    assert instance.objection(resources(build(KERNELS, instance.expression, arch))) is None


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("source", "kernel"),
    [
        (Path(measure.__path__[0]) / "l2.cuh", "read_again"),
        (ROOT / "tools" / "fault.cuh", "write_behind<float>"),
        (ROOT / "tools" / "fault.cuh", "race<float>"),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_kernels_that_are_no_methods_compile_too(source: Path, kernel: str, arch: str) -> None:
    instance = Instance(source, f"zeroskip::{kernel}")
    assert instance.objection(resources(build(source, instance.expression, arch))) is None


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_shared_header_compiles_by_itself(tmp_path: Path, arch: str) -> None:
    """Without anything included before it, and twice."""
    source = tmp_path / "kernel.cuh"
    for header in sorted(INCLUDE.rglob("*.cuh")):
        include = f"#include <{header.relative_to(INCLUDE).as_posix()}>\n"
        source.write_text(f"{include}{include}template <typename T> __global__ void nothing(T* y) {{}}")
        assert not resources(build(source, "nothing<float>", arch)).warnings


def test_objections_name_what_is_wrong() -> None:
    def objection(kernel: str, budget: int = 0) -> str | None:
        instance = Instance(KERNELS, f"zeroskip::testing::{kernel}", budget)
        return instance.objection(resources(build(KERNELS, instance.expression, "sm_90a")))

    assert objection("add<float, 4>") is None
    assert "stack frame of 128 bytes" in str(objection("indexed<float>"))
    assert "the budget is 0" in str(objection("spilling<64>"))
    assert objection("spilling<64>", 1000) is None
    assert "was declared but never referenced" in str(objection("careless<int>"))
