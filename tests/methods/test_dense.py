"""Dense baselines: what the contract tests cannot see from a CPU, and the caller's settings."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch.nn import functional

from methods.jobs import EPILOGUES, GPU, Job
from zeroskip.core.device import Device, cpu, cuda
from zeroskip.core.errors import Unsupported
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import ConvShape, Epilogue, Precision
from zeroskip.core.method import Candidate
from zeroskip.methods.dense import cuda as dense_cuda
from zeroskip.methods.dense.blocks import BLOCKS, likely
from zeroskip.methods.dense.config import Blocks, DenseConfig, DensePacked, Order
from zeroskip.methods.dense.cuda import MOST_BLOCKS, ProductRun
from zeroskip.methods.dense.method import METHOD

FLAT = ConvShape(3, 37, 5, 7, 21, 1, 1)
SHAPES = {
    "1x1": FLAT,
    "1x1 one image": ConvShape(1, 12, 9, 4, 20, 1, 1),
    "1x1 one pixel": ConvShape(4, 12, 1, 1, 5, 1, 1),
    "3x3 stride 2": ConvShape(2, 8, 9, 14, 7, 3, 3, (2, 2), (1, 1)),
    "depthwise": ConvShape(2, 6, 9, 8, 6, 3, 3, padding=(1, 1), groups=6),
}
LINEAR = ConvShape(9, 45, 1, 1, 23, 1, 1)
LIBRARIES: tuple[Literal["torch", "cublas"], ...] = ("torch", "cublas")


# -- the GPU's library calls, on CPU tensors: the same torch operators ------------------------------------------
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_library_calls_of_the_gpu_are_within_the_bound(shape: str, epilogue: Epilogue) -> None:
    job = Job.of(SHAPES[shape], epilogue)
    found = METHOD.configs(job.segment, GPU)
    libraries = {candidate.config.library for candidate in found}
    assert libraries == ({"torch", "cublas"} if shape.startswith("1x1") else {"torch"})
    assert all(job.bound_share(METHOD, candidate) <= 1 for candidate in found)


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_library_calls_for_linear_layers_are_within_the_bound(epilogue: Epilogue) -> None:
    job = Job.of(LINEAR, epilogue, kind="linear")
    for config in (DenseConfig("nchw", "torch"), DenseConfig("nchw", "cublas")):
        assert job.bound_share(METHOD, METHOD.candidate(job.segment, config)) <= 1


def test_a_linear_layer_of_more_dimensions_keeps_them() -> None:
    job = Job.of(LINEAR, Epilogue(bias=True, activation="relu"), kind="linear")
    for sizes in ((2, 3, 45), (2, 5, 3, 45)):
        x = torch.randn(sizes)
        for library in LIBRARIES:
            packed = METHOD.pack(job.segment, job.parameters, DenseConfig("nchw", library))
            y = METHOD.bind(job.segment, packed, None, GPU)([x], [], None)[0]
            torch.testing.assert_close(y, functional.linear(x, job.weight, job.bias).relu())


@pytest.mark.parametrize("order", ["nchw", "nhwc"])
@pytest.mark.parametrize("library", ["torch", "cublas"])
def test_nan_survives_the_activation(library: Any, order: Any) -> None:
    job = Job.of(FLAT, Epilogue(bias=True, activation="relu"))
    job.x[1, 2, 3, 4] = torch.nan
    config = DenseConfig(order, library)
    run = METHOD.bind(job.segment, METHOD.pack(job.segment, job.parameters, config), None, GPU)
    y = job.run(run, METHOD.candidate(job.segment, config))
    assert y[1, :, 3, 4].isnan().all()
    assert int(y.isnan().sum()) == FLAT.k


# -- the fused ReLU ------------------------------------------------------------------------------------------------
def product_run(job: Job) -> ProductRun:
    packed = METHOD.pack(job.segment, job.parameters, DenseConfig("nchw", "cublas"))
    run = METHOD.bind(job.segment, packed, None, GPU)
    assert isinstance(run, ProductRun)
    return run


def relu_that_loses_nan(bias: Any, rows: Any, weight: Any) -> Any:
    return torch.addmm(bias, rows, weight).nan_to_num(nan=0.0).relu()


def test_the_librarys_relu_is_used_where_it_keeps_nan_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.of(LINEAR, Epilogue(bias=True, activation="relu"), kind="linear")
    assert product_run(job).fuses_relu
    monkeypatch.setattr(torch, "_addmm_activation", relu_that_loses_nan)
    run = product_run(job)
    assert not run.fuses_relu
    x = job.x.clone()
    x[3, 5] = torch.nan
    assert run([x], [], None)[0][3].isnan().all()
    monkeypatch.delattr(torch, "_addmm_activation")
    assert not product_run(job).fuses_relu


@pytest.mark.parametrize(
    "epilogue",
    [Epilogue(False, "relu"), Epilogue(True, "relu6"), Epilogue(True, "none"), Epilogue(True, "relu", "before")],
    ids=str,
)
def test_the_librarys_relu_is_not_used_for_other_epilogues(epilogue: Epilogue) -> None:
    assert not product_run(Job.of(LINEAR, epilogue, kind="linear")).fuses_relu


# -- the caller's settings ---------------------------------------------------------------------------------------
@pytest.fixture
def settings() -> Iterator[None]:
    """torch's settings, put back after the test."""
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.usefixtures("settings")
def test_cudnn_searches_during_the_call_and_the_callers_setting_comes_back(
    benchmark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    conv2d = functional.conv2d

    def spy(*arguments: Any) -> Any:
        seen.append(torch.backends.cudnn.benchmark)
        return conv2d(*arguments)

    monkeypatch.setattr(dense_cuda.functional, "conv2d", spy)
    torch.backends.cudnn.benchmark = benchmark
    job = Job.of(SHAPES["3x3 stride 2"])
    candidate = METHOD.configs(job.segment, GPU)[0]
    assert job.bound_share(METHOD, candidate) <= 1
    assert seen == [True, benchmark, benchmark], "the library's call, and the two of the oracle"
    assert torch.backends.cudnn.benchmark is benchmark


@pytest.mark.usefixtures("settings")
def test_the_callers_setting_comes_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(dense_cuda.functional, "conv2d", broken)
    torch.backends.cudnn.benchmark = False
    job = Job.of(SHAPES["3x3 stride 2"])
    with pytest.raises(RuntimeError, match="no memory"):
        job.bound_share(METHOD, METHOD.configs(job.segment, GPU)[0])
    assert torch.backends.cudnn.benchmark is False


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_call_holds_the_precision_of_its_layer(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    mm = torch.mm

    def spy(*arguments: Any) -> Any:
        seen.append(torch.backends.cuda.matmul.fp32_precision == "tf32")
        return mm(*arguments)

    monkeypatch.setattr(torch, "mm", spy)
    job = Job.of(SHAPES["1x1 one image"], precision=precision)
    candidate = METHOD.candidate(job.segment, DenseConfig("nchw", "cublas"))
    before = torch.backends.cuda.matmul.fp32_precision
    assert job.bound_share(METHOD, candidate) <= 1
    assert seen == [precision == "tf32"]
    assert torch.backends.cuda.matmul.fp32_precision == before


# -- configurations ------------------------------------------------------------------------------------------------
def test_a_configuration_says_blocks_for_triton_and_for_nothing_else() -> None:
    with pytest.raises(ValueError, match="blocks belong to library triton"):
        DenseConfig("nchw", "triton")
    with pytest.raises(ValueError, match="blocks belong to library triton"):
        DenseConfig("nchw", "cublas", BLOCKS[0])


@pytest.mark.parametrize(
    "numbers", [(8, 64, 32, 4, 3), (64, 512, 32, 4, 3), (64, 64, 24, 4, 3), (64, 64, 32, 3, 3), (64, 64, 32, 4, 0)]
)
def test_blocks_that_no_kernel_takes_are_refused(numbers: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="of a block must be"):
        Blocks(*numbers)


def test_configurations_survive_json_and_those_without_blocks_still_read() -> None:
    for config in (DenseConfig("nhwc", "triton", BLOCKS[3]), DenseConfig("nchw", "cublas")):
        assert from_json(DenseConfig, to_json(config)) == config
    assert from_json(DenseConfig, {"order": "nchw", "library": "torch"}) == DenseConfig("nchw", "torch")


@pytest.mark.parametrize(
    ("config", "job"),
    [
        (DenseConfig("nchw", "cublas"), Job.of(SHAPES["3x3 stride 2"])),
        (DenseConfig("nchw", "triton", BLOCKS[0]), Job.of(ConvShape(1, 8, 8, 8, 8, 1, 1, (2, 2)))),
        (DenseConfig("nchw", "triton", BLOCKS[0]), Job.of(FLAT, precision="fp64")),
        (DenseConfig("nchw", "cublas"), Job.of(ConvShape(0, 8, 8, 8, 8, 1, 1))),
        (DenseConfig("nhwc", "torch"), Job.of(LINEAR, kind="linear")),
        (DenseConfig("nhwc", "onednn"), Job.of(LINEAR, kind="linear")),
        (DenseConfig("nchw", "onednn"), Job.of(FLAT)),
    ],
    ids=["kernel", "stride", "fp64", "empty", "linear order", "linear onednn", "onednn order"],
)
def test_configurations_that_do_not_fit_the_layer_are_refused(config: DenseConfig, job: Job) -> None:
    with pytest.raises(ValueError, match=r"linear|1x1|triton|onednn"):
        METHOD.candidate(job.segment, config)


def test_libraries_of_the_other_device_are_refused_at_bind() -> None:
    job = Job.of(FLAT)
    packed = METHOD.pack(job.segment, job.parameters, DenseConfig("nchw", "cublas"))
    with pytest.raises(Unsupported, match="cublas runs on NVIDIA GPUs only"):
        METHOD.bind(job.segment, packed, None, cpu(1))
    with pytest.raises(ValueError, match="onednn runs on the CPU only"):
        METHOD.bind(
            job.segment, DensePacked(job.weight, None, DenseConfig("nhwc", "onednn"), job.segment.layer), None, GPU
        )


def test_the_cpu_never_gets_a_library_of_the_gpu() -> None:
    for job in (Job.of(FLAT), Job.of(LINEAR, kind="linear")):
        found = METHOD.configs(job.segment, cpu(1))
        assert {candidate.config.library for candidate in found} <= {"torch", "onednn"}


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_likely_blocks_fit_the_device_and_grow_with_the_layer(precision: Precision, by_rows: bool) -> None:
    small = Job.of(ConvShape(1, 512, 7, 7, 512, 1, 1), precision=precision).layer
    large = Job.of(ConvShape(64, 64, 56, 56, 512, 1, 1), precision=precision).layer
    item = 2 if precision == "fp16" else 4
    for layer in (small, large):
        found = likely(layer, GPU, by_rows)
        assert found
        assert all(blocks.shared_bytes(item) <= GPU.shared_bytes for blocks in found)
    areas = [found[0].m * found[0].n for found in (likely(small, GPU, by_rows), likely(large, GPU, by_rows))]
    assert areas[0] < areas[1]


@pytest.mark.parametrize(
    ("batch", "precision", "by_rows", "faster", "slower"),
    [
        (1, "fp32", True, (64, 32), (32, 32)),
        (1, "fp32", False, (64, 32), (32, 32)),
        (8, "fp32", True, (64, 64), (128, 128)),
        (8, "fp32", False, (64, 64), (128, 128)),
        (8, "fp32", True, (64, 64), (64, 32)),
        (1, "tf32", False, (32, 32), (64, 64)),
        (8, "tf32", False, (128, 64), (64, 64)),
    ],
)
def test_blocks_are_ordered_as_they_were_measured(
    batch: int, precision: Precision, by_rows: bool, faster: tuple[int, int], slower: tuple[int, int]
) -> None:
    """On an H100, torch 2.11, Triton 3.6; the pairs that are more than a tenth apart with and without a residual."""
    layer = Job.of(ConvShape(batch, 128, 56, 56, 128, 1, 1), precision=precision).layer
    found = [(blocks.m, blocks.n) for blocks in likely(layer, GPU, by_rows)]
    assert found.index(faster) < found.index(slower)
    assert found.index(faster) < MOST_BLOCKS


def labels(job: Job, device: Device = GPU) -> list[tuple[str, str]]:
    return [(item.config.library, item.config.order) for item in METHOD.configs(job.segment, device)]


def test_a_planner_that_tries_only_some_meets_every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_cuda, "triton_runs", lambda: True)
    libraries = [("torch", "nchw"), ("torch", "nhwc"), ("cublas", "nchw"), ("cublas", "nhwc")]
    blocks = [("triton", "nhwc"), ("triton", "nchw")] * MOST_BLOCKS
    assert labels(Job.of(FLAT)) == libraries + blocks
    assert sorted(labels(Job.of(FLAT, precision="fp16"))[:4]) == sorted(libraries)
    linear = Job.of(LINEAR, Epilogue(bias=True, activation="relu"), kind="linear")
    assert labels(linear) == [("torch", "nchw"), ("cublas", "nchw")] + [("triton", "nchw")] * MOST_BLOCKS
    assert labels(Job.of(SHAPES["3x3 stride 2"])) == libraries[:2]
    assert labels(Job.of(FLAT), replace(GPU, shared_bytes=48 * 1024)) == libraries
    configs = [item.config for item in METHOD.configs(Job.of(FLAT).segment, GPU)]
    assert len(set(configs)) == len(configs)


# -- with a GPU ------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("library", ["torch", "cublas"])
def test_fp32_is_strict_while_the_caller_allows_tf32(library: Any) -> None:
    job = Job.of(ConvShape(2, 512, 14, 14, 128, 1, 1), device="cuda")
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        matmul.fp32_precision = conv.fp32_precision = "tf32"
        for order in ("nchw", "nhwc"):
            assert job.bound_share(METHOD, METHOD.candidate(job.segment, DenseConfig(order, library)), cuda()) <= 1
        assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", "tf32")
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


@pytest.mark.gpu
def test_tf32_is_used_where_the_layer_allows_it() -> None:
    """Then errors are larger than strict float32 could make: otherwise the column would be mislabelled."""
    job = Job.of(ConvShape(2, 512, 14, 14, 128, 1, 1), precision="tf32", device="cuda")
    want = job.expected
    for library in LIBRARIES:
        candidate = METHOD.candidate(job.segment, DenseConfig("nhwc", library))
        assert job.bound_share(METHOD, candidate, cuda()) <= 1
        packed = METHOD.pack(job.segment, job.parameters, candidate.config)
        packed = replace(packed, weight=packed.weight.cuda(), bias=None)
        y = job.run(METHOD.bind(job.segment, packed, None, cuda()), candidate)
        assert float((y - want.value).norm() / want.value.norm()) > 1e-5


@pytest.mark.gpu
def test_a_batched_product_copies_neither_weights_nor_images() -> None:
    job = Job.of(ConvShape(16, 512, 28, 28, 256, 1, 1), device="cuda")
    candidate = METHOD.candidate(job.segment, DenseConfig("nchw", "cublas"))
    packed = METHOD.pack(job.segment, job.parameters, candidate.config)
    run = METHOD.bind(job.segment, replace(packed, weight=packed.weight.cuda(), bias=None), None, cuda())
    job.run(run, candidate)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = job.run(run, candidate)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < 1.05 * y.numel() * y.element_size()


def tried(job: Job) -> list[Candidate[DenseConfig]]:
    """Every library and, as each takes a second to compile, some of the blocks."""
    found = METHOD.configs(job.segment, cuda())
    libraries = [candidate for candidate in found if candidate.config.library != "triton"]
    return libraries + [candidate for candidate in found if candidate.config.library == "triton"][::5]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("epilogue", [EPILOGUES[0], EPILOGUES[8], EPILOGUES[12], EPILOGUES[13]], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_libraries_and_blocks_are_within_the_bound_on_a_gpu(
    shape: str, epilogue: Epilogue, precision: Precision
) -> None:
    job = Job.of(SHAPES[shape], epilogue, precision, device="cuda")
    for candidate in tried(job):
        assert job.bound_share(METHOD, candidate, cuda()) <= 1, candidate.config


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_blocks_round_half_precision_once_on_a_gpu(precision: Precision) -> None:
    for shape, kind in ((FLAT, "conv2d"), (ConvShape(2, 64, 8, 8, 96, 1, 1), "conv2d"), (LINEAR, "linear")):
        job = Job.of(shape, EPILOGUES[13], precision, kind, device="cuda")  # type: ignore[arg-type]
        for candidate in tried(job):
            if candidate.config.library == "triton":
                assert job.bound_share(METHOD, candidate, cuda()) <= 1, candidate.config


@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_nan_and_infinity_come_out_as_from_torch_on_a_gpu(precision: Precision, value: float) -> None:
    job = Job.of(FLAT, Epilogue(bias=True, activation="relu"), precision, device="cuda")
    job.x[1, 2, 3, 4] = value
    want = job.expected.value.float()
    for candidate in tried(job):
        packed = METHOD.pack(job.segment, job.parameters, candidate.config)
        packed = replace(packed, weight=packed.weight.cuda(), bias=job.bias)
        y = job.run(METHOD.bind(job.segment, packed, None, cuda()), candidate)
        assert torch.equal(y.isnan(), want.isnan()), candidate.config
        assert torch.equal(y.isinf(), want.isinf()), candidate.config


@pytest.mark.gpu
def test_a_search_is_skipped_while_a_graph_is_captured() -> None:
    job = Job.of(SHAPES["3x3 stride 2"], device="cuda")
    candidate = METHOD.configs(job.segment, cuda())[0]
    packed = METHOD.pack(job.segment, job.parameters, candidate.config)
    run = METHOD.bind(job.segment, replace(packed, weight=packed.weight.cuda(), bias=None), None, cuda())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = job.run(run, candidate)
    graph.replay()
    error = (y.double() - job.expected.value).abs()
    assert bool((error <= job.expected.bound).all())


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["nchw", "nhwc"])
@pytest.mark.parametrize("epilogue", [EPILOGUES[0], EPILOGUES[13]], ids=str)
def test_a_product_that_was_compiled_ahead_is_not_compiled_again(order: Order, epilogue: Epilogue) -> None:
    from zeroskip.methods.dense.matmul import _multiply

    job = Job.of(ConvShape(2, 48, 9, 7, 80, 1, 1), epilogue, device="cuda")
    candidate = METHOD.candidate(job.segment, DenseConfig(order, "triton", Blocks(32, 32, 16, 4, 3)))
    compiled: list[object] = _multiply.device_caches[torch.cuda.current_device()][0]  # type: ignore[attr-defined]
    before = len(compiled)
    with ThreadPoolExecutor(4) as pool:
        packed = METHOD.pack(job.segment, job.parameters, candidate.config)
        list(pool.map(lambda _: METHOD.build(packed, cuda()), range(8)))
    assert len(compiled) == before + 1
    assert job.bound_share(METHOD, candidate, cuda()) <= 1
    assert len(compiled) == before + 1
