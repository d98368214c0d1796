"""cuSPARSE: refusals with their reasons, the packed form, and the same torch calls on CPU tensors."""

from __future__ import annotations

import re

import pytest
import torch

from methods.jobs import EPILOGUES, GPU, Job
from zeroskip.core.device import cpu, cuda
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import ConvShape, Epilogue, Precision
from zeroskip.measure.bound import moved
from zeroskip.methods.cusparse.method import METHOD, CusparseConfig

FLAT = ConvShape(3, 33, 4, 5, 17, 1, 1)
SHAPES = (FLAT, ConvShape(1, 12, 9, 7, 20, 1, 1), ConvShape(4, 12, 1, 1, 5, 1, 1))


def sparse(shape: ConvShape, density: float = 0.3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape.weight_shape, generator=generator)
    return torch.where(torch.rand(shape.weight_shape, generator=generator) < density, weight, 0.0)


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (Job.of(ConvShape(1, 8, 9, 9, 8, 3, 3)), "kernel is 3x3"),
        (Job.of(ConvShape(1, 8, 9, 9, 8, 1, 1, (2, 2))), r"stride \(2, 2\)"),
        (Job.of(ConvShape(1, 8, 9, 9, 8, 1, 1, padding=(1, 0))), r"padding \(1, 0\)"),
        (Job.of(ConvShape(1, 8, 9, 9, 8, 1, 1, groups=2)), "groups 2"),
        (Job.of(ConvShape(0, 8, 9, 9, 8, 1, 1)), "empty"),
        (Job.of(ConvShape(9, 33, 1, 1, 17, 1, 1), kind="linear"), "rows of features is not reproducible bit for bit"),
        (Job.of(FLAT, precision="fp16"), "fp16 cuSPARSE rounds more than once"),
        (Job.of(FLAT, precision="bf16"), "bf16 cuSPARSE rounds more than once"),
        (Job.of(FLAT, precision="fp64"), "the layer is fp64"),
    ],
    ids=["kernel", "stride", "padding", "groups", "empty", "linear", "fp16", "bf16", "fp64"],
)
def test_refusals_say_why(job: Job, reason: str) -> None:
    said = METHOD.supports(job.layer, GPU)
    assert said is not None
    assert re.search(reason, said)


def test_a_cpu_is_refused_and_gets_no_configuration() -> None:
    job = Job.of(FLAT, weight=sparse(FLAT))
    assert METHOD.supports(job.layer, cpu(1)) == "runs on NVIDIA GPUs only"
    assert METHOD.configs(job.segment, cpu(1)) == []
    assert METHOD.supports(job.layer, GPU) is None


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_unpack_returns_the_weights_exactly(density: float) -> None:
    weight = sparse(FLAT, density)
    job = Job.of(FLAT, weight=weight)
    (candidate,) = METHOD.configs(job.segment, GPU)
    assert from_json(CusparseConfig, to_json(candidate.config)) == candidate.config
    packed = METHOD.pack(job.segment, job.parameters, candidate.config)
    assert packed.col_indices.dtype == packed.row_offsets.dtype == torch.int32
    assert torch.equal(METHOD.unpack(packed), weight)


def test_a_plan_for_a_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="linear"):
        METHOD.candidate(Job.of(ConvShape(9, 33, 1, 1, 17, 1, 1), kind="linear").segment, CusparseConfig())


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_calls_are_within_the_bound_on_cpu_tensors(epilogue: Epilogue) -> None:
    for shape in SHAPES:
        job = Job.of(shape, epilogue, weight=sparse(shape))
        (candidate,) = METHOD.configs(job.segment, GPU)
        assert job.bound_share(METHOD, candidate) <= 1


def test_empty_weights_leave_what_the_bias_says() -> None:
    job = Job.of(FLAT, Epilogue(bias=True), weight=torch.zeros(FLAT.weight_shape))
    assert job.bias is not None
    (candidate,) = METHOD.configs(job.segment, GPU)
    packed = METHOD.pack(job.segment, job.parameters, candidate.config)
    y = job.run(METHOD.bind(job.segment, packed, None, GPU), candidate)
    assert torch.equal(y, job.bias.reshape(-1, 1, 1).expand_as(y))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("epilogue", [Epilogue(bias=True, activation="relu"), Epilogue(residual="before")], ids=str)
def test_values_on_a_gpu_and_in_a_graph(epilogue: Epilogue, precision: Precision) -> None:
    for shape in (*SHAPES, ConvShape(1, 64, 14, 14, 96, 1, 1), ConvShape(2, 128, 56, 56, 128, 1, 1)):
        job = Job.of(shape, epilogue, precision, weight=sparse(shape), device="cuda")
        (candidate,) = METHOD.configs(job.segment, cuda())
        assert job.bound_share(METHOD, candidate, cuda()) <= 1, job.layer
        packed = moved(METHOD.pack(job.segment, job.parameters, candidate.config), job.x.device)
        run = METHOD.bind(job.segment, packed, None, cuda())
        job.run(run, candidate)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = job.run(run, candidate)
        graph.replay()
        want = job.expected
        assert bool(((y.double() - want.value).abs() <= want.bound).all()), job.layer
