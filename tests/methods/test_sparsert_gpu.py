"""SparseRT on a GPU in every kind of configuration: tests/contract has what it proposes for small layers only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods.jobs import Job
from methods.test_sparsert import FITTING, FLAT, sparse
from zeroskip.core.device import cuda
from zeroskip.core.layer import ConvShape, Epilogue, Precision
from zeroskip.measure.bound import moved
from zeroskip.methods.sparsert.config import SparseRTConfig
from zeroskip.methods.sparsert.method import METHOD

pytestmark = pytest.mark.gpu

REAL = ConvShape(8, 256, 14, 14, 256, 1, 1)
STRIPS = ConvShape(1, 256, 16, 64, 256, 1, 1)
KINDS = {
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


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_within_its_bound(kind: str, precision: Precision) -> None:
    shape, config = KINDS[kind]
    if config.terms and precision != "fp16":
        pytest.skip("adds in float16")
    epilogue = Epilogue(True, "relu", "before")
    job = Job.of(shape, epilogue, precision, weight=sparse(shape), device="cuda")
    assert job.bound_share(METHOD, METHOD.candidate(job.segment, config), cuda()) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_bits_on_four_streams(kind: str) -> None:
    shape, config = KINDS[kind]
    job = Job.of(shape, precision="fp16" if config.terms else "fp32", weight=sparse(shape), device="cuda")
    packed = moved(METHOD.pack(job.segment, job.parameters, config), job.x.device)
    run = METHOD.bind(job.segment, packed, METHOD.build(packed, cuda()), cuda())
    candidate = METHOD.candidate(job.segment, config)
    want = job.run(run, candidate)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(job.run(run, candidate))
    torch.cuda.synchronize()
    assert all(torch.equal(result.view(torch.uint8), want.view(torch.uint8)) for result in results)
