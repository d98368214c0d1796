"""cuSPARSELt: refusals with their reasons and the packed form; values need a GPU."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from methods.jobs import GPU, PLAIN, Job
from zeroskip.core.device import cpu, cuda
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import Activation, ConvShape, Epilogue, Precision
from zeroskip.methods.cusparselt.method import METHOD, CusparseltConfig

FLAT, LINEAR = ConvShape(1, 64, 4, 6, 48, 1, 1), ConvShape(9, 64, 1, 1, 48, 1, 1)
CASES = (
    (FLAT, "conv2d"),
    (ConvShape(3, 64, 7, 7, 48, 1, 1), "conv2d"),
    (LINEAR, "linear"),
    (ConvShape(1, 512, 1, 1, 1024, 1, 1), "linear"),
)


def two_in_four(shape: ConvShape, seed: int = 0) -> torch.Tensor:
    """Random weights with two nonzeros in every four input channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape.k, shape.c // 4, 4, generator=generator)
    order = torch.rand(weight.shape, generator=generator).argsort(-1)
    return torch.where(order < 2, weight, 0.0).reshape(shape.weight_shape)


def job_of(shape: ConvShape = FLAT, epilogue: Epilogue = PLAIN, precision: Precision = "fp16", **others: object) -> Job:
    weight = two_in_four(shape) if (shape.r, shape.groups) == (1, 1) else None
    return Job.of(shape, epilogue, precision, **{"weight": weight, **others})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (job_of(ConvShape(1, 64, 9, 9, 48, 3, 3)), "kernel is 3x3"),
        (job_of(ConvShape(1, 64, 9, 9, 48, 1, 1, (2, 2))), r"stride \(2, 2\)"),
        (job_of(precision="fp32"), "fp16 and bf16, the layer is fp32"),
        (job_of(weight=torch.randn(FLAT.weight_shape)), "2:4.*dense"),
        (job_of(ConvShape(1, 24, 4, 6, 48, 1, 1)), "multiples of 16 channels, got 24 -> 48"),
        (job_of(ConvShape(1, 64, 4, 6, 40, 1, 1)), "multiples of 16 channels, got 64 -> 40"),
        (job_of(epilogue=Epilogue(residual="before")), "residual"),
        (job_of(ConvShape(0, 64, 4, 6, 48, 1, 1)), "empty"),
    ],
    ids=["kernel", "stride", "fp32", "dense", "depth", "rows", "residual", "empty"],
)
def test_refusals_say_why(job: Job, reason: str) -> None:
    said = METHOD.supports(job.layer, GPU)
    assert said is not None
    assert re.search(reason, said)


def test_devices_and_builds_without_the_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of()
    assert METHOD.supports(job.layer, cpu(1)) == "runs on NVIDIA GPUs only"
    assert METHOD.configs(job.segment, cpu(1)) == []
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert METHOD.supports(job.layer, GPU) == "this torch was built without cuSPARSELt"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert METHOD.supports(job.layer, GPU) is None


def test_images_go_in_as_they_lie_only_one_at_a_time() -> None:
    def orders(job: Job) -> list[str]:
        return [candidate.config.order for candidate in METHOD.configs(job.segment, GPU)]

    assert orders(job_of()) == ["nhwc", "nchw"]
    assert orders(job_of(ConvShape(2, 64, 4, 6, 48, 1, 1))) == ["nhwc"]
    assert orders(job_of(ConvShape(1, 64, 7, 7, 48, 1, 1))) == ["nhwc"]
    assert orders(job_of(LINEAR, kind="linear")) == ["nhwc"]
    with pytest.raises(ValueError, match="one image with a multiple of 8 pixels"):
        METHOD.candidate(job_of(ConvShape(1, 64, 7, 7, 48, 1, 1)).segment, CusparseltConfig("nchw"))


def test_unpack_returns_the_weights_exactly() -> None:
    job = job_of(epilogue=Epilogue(bias=True))
    for candidate in METHOD.configs(job.segment, GPU):
        assert from_json(CusparseltConfig, to_json(candidate.config)) == candidate.config
        assert torch.equal(METHOD.unpack(METHOD.pack(job.segment, job.parameters, candidate.config)), job.weight)


def multiply(weight: Tensor, dense: Tensor, bias: Tensor | None = None, transpose_result: bool = False) -> Tensor:
    """torch's operator as its tests describe it, on CPU tensors, strict about what it is given."""
    assert dense.is_contiguous() or dense.t().is_contiguous()
    assert dense.shape[1] % 8 == 0
    y = weight.float() @ dense.float()
    y = y if bias is None else y + bias.float()[:, None]
    return (y.t() if transpose_result else y).to(weight.dtype).contiguous()


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_library_gets_matrices_it_takes(
    bias: bool, activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    for shape, kind in CASES:
        job = job_of(shape, Epilogue(bias, activation), kind=kind)
        for candidate in METHOD.configs(job.segment, GPU):
            assert job.bound_share(METHOD, candidate) <= 1, (candidate.config, job.layer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.backends.cusparselt.is_available(), reason="this torch was built without cuSPARSELt")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("bias", [False, True])
def test_values_on_a_gpu_and_in_a_graph(bias: bool, activation: Activation, precision: Precision) -> None:
    from zeroskip.measure.bound import moved

    for shape, kind in CASES:
        job = job_of(shape, Epilogue(bias, activation), precision, kind=kind, device="cuda")
        want = job.expected
        for candidate in METHOD.configs(job.segment, cuda()):
            assert job.bound_share(METHOD, candidate, cuda()) <= 1, (candidate.config, job.layer)
            packed = moved(METHOD.pack(job.segment, job.parameters, candidate.config), job.x.device)
            run = METHOD.bind(job.segment, packed, None, cuda())
            first = job.run(run, candidate)
            assert all(torch.equal(job.run(run, candidate), first) for _ in range(9)), (candidate.config, job.layer)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = job.run(run, candidate)
            graph.replay()
            assert bool(((y.double() - want.value).abs() <= want.bound).all()), (candidate.config, job.layer)
