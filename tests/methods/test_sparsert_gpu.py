"""SparseRT on a GPU in configurations that it does not propose: x in slabs, brought once for a cluster."""

from __future__ import annotations

import pytest
import torch

from methods.jobs import Job
from methods.test_sparsert import FITTING, sparse
from zeroskip.core.device import cuda
from zeroskip.core.layer import ConvShape, Epilogue, Precision
from zeroskip.measure.bound import moved
from zeroskip.methods.sparsert.config import SparseRTConfig
from zeroskip.methods.sparsert.method import METHOD

pytestmark = pytest.mark.gpu

REAL = ConvShape(8, 256, 14, 14, 256, 1, 1)
STRIPS = ConvShape(1, 256, 16, 64, 256, 1, 1)
SLABS = {
    **{kind: fitting for kind, fitting in FITTING.items() if fitting[1].slab},
    **{
        f"{mates} mates": (REAL, SparseRTConfig(32, warps=13, registers=72, slab=64, stages=2, mates=mates))
        for mates in (1, 2, 4, 8)
    },
    "more stages than slabs": (REAL, SparseRTConfig(32, warps=7, stack=2, registers=72, slab=64, stages=4, mates=2)),
    "many slabs": (STRIPS, SparseRTConfig(64, warps=8, registers=96, slab=16, stages=3, mates=4)),
    "pairs": (STRIPS, SparseRTConfig(32, vector=2, warps=8, registers=96, slab=32, stages=2, mates=8)),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", SLABS)
def test_slabs_are_within_the_bound(kind: str, precision: Precision) -> None:
    shape, config = SLABS[kind]
    epilogue = Epilogue(True, "relu", "before")
    job = Job.of(shape, epilogue, precision, weight=sparse(shape), device="cuda")
    assert job.bound_share(METHOD, METHOD.candidate(job.segment, config), cuda()) <= 1


@pytest.mark.parametrize("kind", SLABS)
def test_slabs_give_the_same_bits_on_four_streams(kind: str) -> None:
    shape, config = SLABS[kind]
    job = Job.of(shape, weight=sparse(shape), device="cuda")
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
    assert all(torch.equal(result.view(torch.int32), want.view(torch.int32)) for result in results)
