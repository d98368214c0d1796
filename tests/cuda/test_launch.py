"""Launching: arguments, streams, shared memory, dependent launches, graphs.  Most of it needs a GPU."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zeroskip.core.errors import Unsupported
from zeroskip.cuda import launch
from zeroskip.cuda.compile import build
from zeroskip.cuda.launch import Kernel, load

KERNELS = Path(__file__).with_name("kernels.cuh")
COUNT = 4096 * 4
GRID, BLOCK = (COUNT // 4 // 256, 1, 1), (256, 1, 1)
TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


def arch() -> str:
    from zeroskip.core.device import cuda

    return cuda().arch


def kernel(expression: str) -> Kernel:
    return load(build(KERNELS, f"zeroskip::testing::{expression}", arch()))


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Small integers: what follows is exact in every type."""
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.randint(-8, 9, (COUNT,), generator=generator).to(dtype) for _ in range(2))
    return y.cuda(), x.cuda()


# -- without a GPU ------------------------------------------------------------------------------------
def test_arguments_become_what_kernels_take() -> None:
    passed = [launch._passed(value) for value in (None, 7, -(2**31), 2**31 - 1, 0.1, float("inf"))]
    assert passed[0] == 0
    assert type(passed[0]) is int
    assert [value.itemsize for value in passed[1:]] == [4] * 5
    assert [value.dtype.kind for value in passed[1:]] == list("iiiff")
    assert [int(value) for value in passed[1:4]] == [7, -(2**31), 2**31 - 1]
    assert float(passed[4]) == torch.tensor(0.1).item()


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (2**31, ValueError, "32-bit integers, got 2147483648"),
        (-(2**31) - 1, ValueError, "32-bit"),
        (torch.zeros(1), ValueError, "tensor on cpu"),
        (True, TypeError, "got bool"),
        ("x", TypeError, "got str"),
        ([1], TypeError, "got list"),
    ],
)
def test_other_arguments_are_refused(value: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        launch._passed(value)


def test_clusters_must_divide_the_grid() -> None:
    pytest.importorskip("cuda.core")
    with pytest.raises(ValueError, match="do not divide"):
        launch._config((7, 1, 1), (32, 1, 1), (2, 1, 1), 0, False)


# -- with one -----------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "width"), [*itertools.product(TYPES, (1, 4, 8)), (torch.float16, 16)])
def test_vectors_of_every_type_and_width_add(dtype: torch.dtype, width: int) -> None:
    y, x = data(dtype)
    want = x + 0.5 * y
    kernel(f"add<{TYPES[dtype]}, {width}>").launch((COUNT // width // 256, 1, 1), BLOCK, (y, x, 0.5, COUNT))
    assert torch.equal(y, want)


@pytest.mark.gpu
def test_a_launch_goes_to_the_stream_that_is_current() -> None:
    """On a side stream that waits for the host: the default stream, which does not wait for it, sees the old values."""
    from cuda.bindings import driver

    y, x = data()
    old, want = y.clone(), x + 0.5 * y
    gate = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    add = kernel("add<float, 4>")
    add.launch(GRID, BLOCK, (torch.zeros_like(y), x, 0.5, COUNT))
    assert not torch.equal(want, old)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    (status,) = driver.cuStreamWaitValue32(side.cuda_stream, gate.data_ptr(), 1, 0)
    assert status == 0
    try:
        with torch.cuda.stream(side):
            add.launch(GRID, BLOCK, (y, x, 0.5, COUNT))
        assert torch.equal(y, old)
    finally:
        gate.fill_(1)
    side.synchronize()
    assert torch.equal(y, want)


@pytest.mark.gpu
def test_a_new_thread_can_launch() -> None:
    y, x = data()
    want = x + 0.5 * y
    add, failures = kernel("add<float, 4>"), []
    torch.cuda.synchronize()

    def work() -> None:
        try:
            add.launch(GRID, BLOCK, (y, x, 0.5, COUNT))
        except Exception as error:  # noqa: BLE001  (whatever it is, the test wants to show it)
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    torch.cuda.synchronize()
    assert torch.equal(y, want)


@pytest.mark.gpu
def test_shared_memory_beyond_48_kib() -> None:
    """Little, exactly what is free, more, most, and little again, by one kernel."""
    from zeroskip.core.device import cuda

    x = torch.arange(1024, device="cuda", dtype=torch.float32)
    reverse = kernel("reverse<4>")
    for shared_bytes in (4096, 48 * 1024, 50 * 1024, cuda().shared_bytes, 60 * 1024, 4096):
        y = torch.empty_like(x)
        reverse.launch((1, 1, 1), (256, 1, 1), (y, x), shared_bytes=shared_bytes)
        assert torch.equal(y, x.flip(0))


@pytest.mark.gpu
def test_all_of_a_large_shared_memory_is_there() -> None:
    x = torch.arange(200 * 256 if arch() != "sm_80" else 160 * 256, device="cuda", dtype=torch.float32)
    y = torch.empty_like(x)
    launched = kernel(f"reverse<{x.numel() // 256}>")
    launched.launch((1, 1, 1), (256, 1, 1), (y, x), shared_bytes=4 * x.numel())
    assert torch.equal(y, x.flip(0))


@pytest.mark.gpu
def test_more_shared_memory_than_there_is_is_refused() -> None:
    y, x = data()
    with pytest.raises(ValueError, match="1048576 bytes of shared memory"):
        kernel("reverse<4>").launch((1, 1, 1), (256, 1, 1), (y, x), shared_bytes=2**20)


@pytest.mark.gpu
def test_dependent_launches_keep_their_order() -> None:
    """Each adds to what the one before it wrote; half of the values are lost if one starts too early."""
    add = kernel("add<float, 4>")
    y, x = torch.zeros(COUNT, device="cuda"), torch.ones(COUNT, device="cuda")
    for _ in range(500):
        add.launch(GRID, BLOCK, (y, x, 1.0, COUNT), dependent=True)
    assert torch.equal(y, torch.full_like(y, 500.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dependent", [False, True])
def test_launches_are_captured_in_a_graph(dependent: bool) -> None:
    from cuda.bindings import driver

    add = kernel("add<float, 4>")
    y, x = torch.zeros(COUNT, device="cuda"), torch.ones(COUNT, device="cuda")
    add.launch(GRID, BLOCK, (y, x, 1.0, COUNT))
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for _ in range(20):
            add.launch(GRID, BLOCK, (y, x, 1.0, COUNT), dependent=dependent)
    error, _, count = driver.cuGraphGetNodes(graph.raw_cuda_graph(), 0)
    assert error == driver.CUresult.CUDA_SUCCESS
    assert count == 20
    graph.instantiate()
    y.zero_()
    for _ in range(3):
        graph.replay()
    assert torch.equal(y, torch.full_like(y, 60.0))


@pytest.mark.gpu
def test_clusters_of_blocks() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters came with sm_90")
    ranks = torch.full((8,), -1, device="cuda", dtype=torch.int32)
    kernel("rank<int>").launch((8, 1, 1), (32, 1, 1), (ranks,), cluster=(4, 1, 1))
    assert ranks.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("place", ["no", "before", "after"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_the_end_of_a_layer_is_torchs_to_the_bit(activation: str, place: str, dtype: torch.dtype) -> None:
    acc = torch.randn(COUNT, device="cuda") * 5
    acc[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    residual, y = torch.randn(COUNT, device="cuda").to(dtype), torch.empty(COUNT, device="cuda", dtype=dtype)
    residual[4] = float("nan")
    act = {"none": lambda x: x, "relu": torch.relu, "relu6": torch.nn.functional.relu6}[activation]
    total = acc + 0.25
    want = act(total + residual.float()) if place == "before" else act(total)
    want = want + residual.float() if place == "after" else want
    expression = f"end<{TYPES[dtype]}, zeroskip::Activation::{activation}, zeroskip::Residual::{place}>"
    passed = (y, acc, None if place == "no" else residual, 0.25, COUNT)
    kernel(expression).launch((COUNT // 256, 1, 1), BLOCK, passed)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(), want.to(dtype).nan_to_num())


@pytest.mark.gpu
def test_wrong_arguments_are_refused_before_the_driver_reads_them() -> None:
    y, x = data()
    before = y.clone()
    add = Kernel(build(KERNELS, "zeroskip::testing::add<float, 4>", arch()))
    for wrong in ((), (y, x, 0.5), (y, x, 0.5, COUNT, 1), (y, x, 0.5, y), (y, 1, 0.5, COUNT)):
        with pytest.raises(TypeError, match="takes arguments of"):
            add.launch(GRID, BLOCK, wrong)
    assert torch.equal(y, before)
    add.launch(GRID, BLOCK, (y, x, 0.5, COUNT))
    with pytest.raises(TypeError, match="takes arguments of"):
        add.launch(GRID, BLOCK, (y, x, 0.5))
    assert torch.equal(y, x + 0.5 * before)


@pytest.mark.gpu
def test_code_for_another_gpu_is_refused() -> None:
    built = build(KERNELS, "zeroskip::testing::rank<int>", "sm_80" if arch() != "sm_80" else "sm_90a")
    with pytest.raises(Unsupported, match="was compiled for"):
        load(built)


@pytest.mark.gpu
def test_builds_are_loaded_once() -> None:
    assert kernel("rank<int>") is kernel("rank<int>")
