"""Every kind of configuration on a GPU (``kinds.py``)."""

from __future__ import annotations

import pytest
import torch

from methods.kinds import KINDS
from zeroskip.core.device import cuda
from zeroskip.measure.bound import moved
from zeroskip.methods import registry

EVERY = [(method, name) for method, kinds in KINDS.items() for name in kinds]


@pytest.mark.parametrize("method", KINDS)
def test_there_are_many_kinds_and_each_fits_its_layer(method: str) -> None:
    assert len(KINDS[method]) > 20
    for kind in KINDS[method].values():
        assert kind.candidate(kind.job("cpu")).config == kind.config


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "name"), EVERY)
def test_every_kind_is_within_its_bound(method: str, name: str) -> None:
    kind = KINDS[method][name]
    job = kind.job()
    assert job.bound_share(registry()[method], kind.candidate(job), cuda()) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "name"), EVERY)
def test_every_kind_gives_the_same_bits_on_four_streams(method: str, name: str) -> None:
    kind, one = KINDS[method][name], registry()[method]
    job = kind.job()
    packed = moved(one.pack(job.segment, job.parameters, kind.config), job.x.device)
    run = one.bind(job.segment, packed, one.build(packed, cuda()), cuda())
    candidate = kind.candidate(job)
    want = job.run(run, candidate)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(job.run(run, candidate))
    torch.cuda.synchronize()
    assert all(torch.equal(result.view(torch.uint8), want.view(torch.uint8)) for result in results)
