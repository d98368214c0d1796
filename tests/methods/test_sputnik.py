"""Sputnik: configurations that cannot exist, refusals, row swizzle and packing (values need a GPU: tests/contract)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods.jobs import GPU, Job
from zeroskip.core.device import cpu, cuda
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import PRECISION_DTYPES, ConvShape, Epilogue, Precision
from zeroskip.methods.sputnik.cuda import SputnikConfig, configs
from zeroskip.methods.sputnik.method import METHOD

FLAT, LINEAR = ConvShape(1, 64, 14, 14, 48, 1, 1), ConvShape(9, 64, 1, 1, 48, 1, 1)
GOOD = SputnikConfig(8, 4, 1, 4, 4)


def sparse(shape: ConvShape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.weight_shape, generator=generator)
    return torch.where(torch.rand(weight.shape, generator=generator) < 0.2, weight, 0.0)


def test_refusals_say_why() -> None:
    assert METHOD.supports(Job.of(FLAT).layer, cpu(1)) == "runs on NVIDIA GPUs only"
    assert METHOD.supports(Job.of(FLAT).layer, GPU) is None
    assert METHOD.supports(Job.of(LINEAR, kind="linear").layer, GPU) is None
    assert "1x1" in str(METHOD.supports(Job.of(ConvShape(1, 8, 9, 9, 8, 3, 3)).layer, GPU))
    assert "empty" in str(METHOD.supports(Job.of(ConvShape(0, 8, 9, 9, 8, 1, 1)).layer, GPU))


@pytest.mark.parametrize(
    "change", [{"subwarp": 4}, {"vector": 3}, {"sparse": 8}, {"pieces": 9}, {"rows": 0}, {"subwarp": 32}]
)
def test_a_configuration_checks_itself(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"subwarp|pieces|nonzeros"):
        replace(GOOD, **change)


@pytest.mark.parametrize(
    ("job", "config"),
    [
        (Job.of(ConvShape(1, 64, 7, 7, 48, 1, 1)), GOOD),
        (Job.of(ConvShape(1, 64, 14, 14, 48, 1, 1, (2, 2))), GOOD),
        (Job.of(FLAT), SputnikConfig(8, 8, 1, 4, 4)),
        (Job.of(LINEAR, kind="linear"), GOOD),
        (Job.of(ConvShape(1, 2, 1200, 1200, 2, 1, 1)), SputnikConfig(8, 1, 1, 4, 4)),
    ],
    ids=["odd image", "stride", "32 bytes", "linear", "grid"],
)
def test_a_configuration_that_does_not_fit_the_layer_is_refused(job: Job, config: SputnikConfig) -> None:
    with pytest.raises(ValueError, match=r"do not lie together|more than|one element"):
        METHOD.candidate(job.segment, config)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ["conv2d", "linear", "groups", "strided"])
def test_packing_is_exact(kind: str, precision: Precision) -> None:
    shape = {
        "groups": ConvShape(2, 24, 4, 5, 18, 1, 1, groups=3),
        "linear": LINEAR,
        "strided": ConvShape(1, 64, 15, 14, 48, 1, 1, (2, 2)),
    }.get(kind, FLAT)
    job = Job.of(shape, Epilogue(bias=True), precision, "linear" if kind == "linear" else "conv2d", sparse(shape))
    found = METHOD.configs(job.segment, GPU)
    assert found
    for candidate in found[:4]:
        assert from_json(SputnikConfig, to_json(candidate.config)) == candidate.config
        packed = METHOD.pack(job.segment, job.parameters, candidate.config)
        assert packed.values.dtype == PRECISION_DTYPES[precision]
        assert torch.equal(METHOD.unpack(packed).reshape(job.weight.shape), job.weight)


def test_rows_are_swizzled_where_blocks_wait_for_others() -> None:
    def swizzled(shape: ConvShape, tile: SputnikConfig) -> bool:
        layer = replace(Job.of(replace(shape, h=1, w=1)).layer, shape=shape)
        (found,) = [one for one in configs(layer, GPU) if replace(one, swizzle=True) == tile]
        return found.swizzle

    assert not swizzled(ConvShape(1, 512, 14, 14, 512, 1, 1), SputnikConfig(32, 2, 1, 1, 4))
    assert swizzled(ConvShape(1, 2048, 1, 2048, 2048, 1, 1), SputnikConfig(32, 4, 2, 1, 8))


def test_swizzle_sorts_rows_by_length_and_its_absence_does_not() -> None:
    job = Job.of(FLAT, weight=sparse(FLAT))
    lengths = (job.weight != 0).flatten(1).sum(1)
    swizzled = METHOD.pack(job.segment, job.parameters, GOOD).row_order.long()
    assert lengths[swizzled].tolist() == sorted(lengths.tolist(), reverse=True)
    plain = METHOD.pack(job.segment, job.parameters, replace(GOOD, swizzle=False)).row_order
    assert plain.tolist() == list(range(48))
    assert sorted(swizzled.tolist()) == list(range(48))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("swizzle", [True, False])
def test_rows_of_any_order_are_within_the_bound(swizzle: bool, precision: Precision) -> None:
    """Small layers are proposed without swizzled rows, so tests/contract has none."""
    shape = replace(FLAT, n=2, k=43)
    job = Job.of(shape, Epilogue(True, "relu", "before"), precision, weight=sparse(shape), device="cuda")
    for config in (replace(GOOD, swizzle=swizzle), SputnikConfig(32, 2, 1, 1, 8, swizzle=swizzle)):
        assert job.bound_share(METHOD, METHOD.candidate(job.segment, config), cuda()) <= 1


def test_vector_loads_of_nonzeros_may_read_behind_the_last_one() -> None:
    job = Job.of(FLAT, weight=sparse(FLAT))
    packed = METHOD.pack(job.segment, job.parameters, GOOD)
    assert len(packed.values) == len(packed.columns) == int(packed.row_offsets[-1]) + 4
