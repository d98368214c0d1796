"""Layers with one configuration each, of every kind that a method with kernels of its own has: what it proposes for the
small layers of tests/contract are some of them only.

The same that run on the CPU, as C++ or in an interpreter of PTX, and others that want a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from methods import test_aspt, test_depthwise, test_escort_cuda, test_slab
from methods.jobs import GPU, Job
from methods.test_sparsert import FITTING, FLAT, sparse
from zeroskip.core.layer import ConvShape, Epilogue, Precision
from zeroskip.core.method import Candidate
from zeroskip.methods import registry
from zeroskip.methods.slab.method import METHOD as SLAB
from zeroskip.methods.sparsert.config import SparseRTConfig

TAIL = Epilogue(True, "relu", "before")


@dataclass(frozen=True)
class Kind:
    """Of ``method``: ``config`` for a layer of ``shape``."""

    method: str
    shape: ConvShape
    config: Any
    weight: Tensor
    precision: Precision = "fp32"
    epilogue: Epilogue = TAIL
    layer: Literal["conv2d", "linear"] = "conv2d"
    watched: bool = True
    """By compute-sanitizer, which takes seconds for each."""

    @property
    def copied(self) -> bool:
        """Whether the copy engine brings x."""
        return bool(self.method == "sparsert" and self.config.slab) or (
            self.method == "slab" and self.config.mode in ("boxes", "runs")
        )

    def job(self, device: str = "cuda") -> Job:
        return Job.of(self.shape, self.epilogue, self.precision, self.layer, self.weight, device)

    def candidate(self, job: Job) -> Candidate[Any]:
        """``config`` for the layer of ``job``."""
        return registry()[self.method].candidate(job.segment, self.config)


REAL, STRIPS = ConvShape(8, 256, 14, 14, 256, 1, 1), ConvShape(1, 256, 16, 64, 256, 1, 1)
SPARSERT = {
    **FITTING,
    "float16 sums": (replace(FLAT, n=3), SparseRTConfig(8, vector=4, warps=2, terms=8, registers=112)),
    "long walk": (REAL, SparseRTConfig(32, warps=7, registers=88, walk=3)),
    **{
        f"{mates} mates": (REAL, SparseRTConfig(32, warps=13, registers=72, slab=64, stages=2, mates=mates))
        for mates in (1, 2, 4, 8)
    },
    "more stages than slabs": (REAL, SparseRTConfig(32, warps=7, stack=2, registers=72, slab=64, stages=4, mates=2)),
    "many slabs": (STRIPS, SparseRTConfig(64, warps=8, registers=96, slab=16, stages=3, mates=4)),
    "pairs": (STRIPS, SparseRTConfig(32, vector=2, warps=8, registers=96, slab=32, stages=2, mates=8)),
}
SLABS = (
    test_slab.FLAT,
    test_slab.ODD,
    ConvShape(1, 64, 15, 14, 48, 1, 1, (2, 2)),
    ConvShape(2, 24, 4, 5, 18, 1, 1, groups=3),
    ConvShape(1, 512, 14, 14, 512, 1, 1),
    ConvShape(2, 256, 16, 16, 64, 1, 1),
    ConvShape(9, 256, 7, 7, 300, 1, 1),
)


def _sparsert() -> Iterator[tuple[str, Kind]]:
    for name, (shape, config) in SPARSERT.items():
        for precision in ("fp16",) if config.terms else ("fp32", "fp16", "bf16"):
            watched = precision == "fp32" or config.terms > 0
            yield f"{name}, {precision}", Kind("sparsert", shape, config, sparse(shape), precision, watched=watched)


def _slab() -> Iterator[tuple[str, Kind]]:
    """The likeliest configuration of each way to copy, split and share, with one and with several stages."""
    ways = set[tuple[object, ...]]()
    for shape in SLABS:
        for precision in ("fp32", "fp16"):
            weight, seen = sparse(shape), set[tuple[object, ...]]()
            for found in SLAB.configs(Job.of(shape, TAIL, precision, weight=weight).segment, GPU):
                one = found.config
                key = (one.mode, one.split, one.mates, one.stages > 1)
                way = (one.mode, one.split > 1, one.mates > 1, one.stages > 1, precision)
                if key not in seen:
                    name = f"{shape}, {precision}, {one.mode} split {one.split} mates {one.mates} stages {one.stages}"
                    yield name, Kind("slab", shape, one, weight, precision, watched=way not in ways)
                seen.add(key)
                ways.add(way)


def _escort() -> Iterator[tuple[str, Kind]]:
    for name, case in (test_escort_cuda.CASES | test_escort_cuda.SAMPLED).items():
        watched = name in test_escort_cuda.CASES
        yield (
            name,
            Kind("escort", case.shape, case.config, case.weight, case.precision, case.epilogue, "conv2d", watched),
        )


def _aspt() -> Iterator[tuple[str, Kind]]:
    for name, case in test_aspt.CASES.items():
        yield name, Kind("aspt", case.shape, case.config, case.weight, case.precision, case.epilogue, case.kind)


def _depthwise() -> Iterator[tuple[str, Kind]]:
    for name, case in test_depthwise.CASES.items():
        yield name, Kind("depthwise", case.shape, case.config, case.weight, case.precision, case.epilogue)


KINDS = {
    "sparsert": dict(_sparsert()),
    "escort": dict(_escort()),
    "slab": dict(_slab()),
    "aspt": dict(_aspt()),
    "depthwise": dict(_depthwise()),
}
"""By method and name."""
