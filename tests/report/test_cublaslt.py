"""The search of cublasLt's algorithms: layouts by arithmetic, calls with a library of the CPU that has the same."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from report.fakes import Clock, FakeGpu, gpu
from zeroskip.core.errors import Unsupported
from zeroskip.core.record import Record
from zeroskip.plan.tune import FINALISTS
from zeroskip.report import cublaslt
from zeroskip.report.cublaslt import Algorithm, Library, Matmul, Matrix, Product, Proposal, by_pixels, by_planes
from zeroskip.report.layers import bench_layer
from zeroskip.report.suite import BenchCase
from zeroskip.report.vendors import MOST_ALGORITHMS

__all__ = ["gpu"]

K, C, PIXELS, IMAGES = 5, 7, 6, 3
STREAM = 77
RIGHT = 2
"""Of the fake's seven proposals: one more is the same as another, one has a bad state, one wants too much workspace."""
REFUSED = 2
"""One leaves a column unwritten and one fails."""


# -- layouts ------------------------------------------------------------------------------------------
def strided(memory: Tensor, matrix: Matrix, turn: bool, image: int) -> Tensor:
    """What the library reads: a column after the other."""
    found = memory.flatten().as_strided((matrix.rows, matrix.columns), (1, matrix.rows), image * matrix.step)
    return found.t() if turn else found


def interpreted(product: Product, weights: Tensor, x: Tensor, out: tuple[int, ...]) -> Tensor:
    y = torch.full(out, torch.nan)
    a, b = (weights, x) if product.weights_first else (x, weights)
    for image in range(product.images):
        found = strided(a, product.a, product.turns[0], image) @ strided(b, product.b, product.turns[1], image)
        strided(y, product.d, False, image).copy_(found)
    return y


@pytest.mark.parametrize("turned", [False, True])
def test_products_are_what_their_layouts_say(turned: bool) -> None:
    weights = torch.randn(K, C)
    lie = weights.t().contiguous() if turned else weights
    x = torch.randn(PIXELS, C)
    found = interpreted(by_pixels(K, C, PIXELS, turned), lie, x, (PIXELS, K))
    torch.testing.assert_close(found, x @ weights.t())
    x = torch.randn(C, PIXELS)
    found = interpreted(by_planes(K, C, PIXELS, turned), lie, x, (K, PIXELS))
    torch.testing.assert_close(found, weights @ x)
    x = torch.randn(IMAGES, C, PIXELS)
    found = interpreted(by_planes(K, C, PIXELS, turned, IMAGES), lie, x, (IMAGES, K, PIXELS))
    torch.testing.assert_close(found, weights @ x)


def test_the_bias_is_one_number_for_each_row_of_the_output() -> None:
    assert by_pixels(K, C, PIXELS, False).d.rows == K
    with pytest.raises(ValueError, match="must agree"):
        Matmul(by_planes(K, C, PIXELS, False), torch.zeros(K, C), "fp32", torch.zeros(K))


def test_structures_are_as_large_as_in_the_header() -> None:
    assert ctypes.sizeof(Algorithm) == 64
    assert ctypes.sizeof(Proposal) == 96
    assert [getattr(Proposal, name).offset for name in ("workspace", "state", "waves", "reserved")] == [64, 72, 76, 80]


# -- calls --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("cublaslt") / "libfake.so"
    source = Path(__file__).parent / "fake_cublaslt.c"
    subprocess.run([compiler, "-std=c11", "-O1", "-Wall", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


@pytest.fixture
def loaded(fake: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The fake in the place of the library, and tensors of the CPU in its reach."""
    found = Library(str(fake))
    monkeypatch.setattr(cublaslt, "library", lambda: found)
    monkeypatch.setattr(cublaslt, "reachable", lambda tensor: True)
    monkeypatch.setattr(cublaslt, "_stream", lambda device: STREAM)
    control = ctypes.CDLL(str(fake))
    yield control
    control.fake_without_gpu(0)
    cublaslt._workspace.cache_clear()


def bench(gpu: FakeGpu, clock: Clock, **more: Any) -> dict[str, Record]:
    names = ("cublaslt", "cublaslt_epilogue")
    facts: dict[str, Any] = {"c": 16, "k": 12, "h": 5, "w": 3, "device": "cuda", "methods": (), "baselines": names}
    records = bench_layer(BenchCase("layer", "a", caches=("warm",), **(facts | more)), gpu, clock)
    return {record.method: record for record in records}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_fastest_right_proposal_counts_and_wrong_or_failing_ones_do_not(
    gpu: FakeGpu, loaded: ctypes.CDLL, batch: int, precision: str
) -> None:
    clock = Clock()
    found = bench(gpu, clock, batch=batch, precision=precision)
    ways = 4 if batch == 1 else 6
    for name in ("cublaslt", "cublaslt_epilogue"):
        record = found[name]
        assert record.status == "OK", record.reason
        assert record.error["relative"] < 1e-6
        assert record.config["forms"] == ways * (RIGHT + REFUSED)
        assert record.config["refused"] == ways * REFUSED
        assert "CUBLAS_STATUS_EXECUTION_FAILED" in record.reason
        assert "proposal" in record.config["form"]
        assert len(record.config["tried_us"]) == ways
    clock.seen.clear()  # it kept the calls
    gc.collect()
    assert loaded.fake_alive() == 0


def test_of_the_quickest_forms_the_one_that_is_fastest_in_turns_is_kept(gpu: FakeGpu, loaded: ctypes.CDLL) -> None:
    clock = Clock()
    bench(gpu, clock, baselines=("cublaslt",))
    finalists = list(clock.seen[0])
    assert len(finalists) == FINALISTS
    clock = Clock({finalists[2]: 1.0})
    assert bench(gpu, clock, baselines=("cublaslt",))["cublaslt"].config["form"] == finalists[2]


def test_the_library_adds_the_bias_where_channels_are_last_only(gpu: FakeGpu, loaded: ctypes.CDLL) -> None:
    epilogues: dict[bool, set[bool]] = {True: set(), False: set()}
    real = Matmul.__init__

    def seen(self: Matmul, product: Product, weights: Tensor, precision: Any, bias: Tensor | None = None) -> None:
        epilogues[product.d.rows == 12].add(bias is not None)
        real(self, product, weights, precision, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Matmul, "__init__", seen)
        bench(gpu, Clock(), baselines=("cublaslt_epilogue",))
    assert epilogues == {True: {True}, False: {False}}


def test_what_the_library_cannot_do_is_unsupported(gpu: FakeGpu, loaded: ctypes.CDLL) -> None:
    record = bench(gpu, Clock(), precision="fp16")["cublaslt"]  # the fake's heuristic says NOT_SUPPORTED
    assert (record.status, record.reason) == ("UNSUPPORTED", "cublasLt proposes no algorithm for this product")


def test_a_library_that_does_not_start_is_an_error_and_no_time(gpu: FakeGpu, loaded: ctypes.CDLL) -> None:
    cublaslt._handle.cache_clear()
    loaded.fake_without_gpu(1)
    record = bench(gpu, Clock())["cublaslt"]
    assert (record.status, record.times) == ("LAUNCH_ERROR", None)
    assert "cublasLtCreate: CUBLAS_STATUS_NOT_INITIALIZED (1)" in record.reason


def test_when_every_proposal_is_wrong_there_is_no_time(
    gpu: FakeGpu, loaded: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Matmul, "__call__", lambda self, algorithm, x, y: None)
    record = bench(gpu, Clock())["cublaslt"]
    assert (record.status, record.times) == ("WRONG", None)


def test_without_the_library_or_a_gpu_it_is_unsupported(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench(gpu, Clock())["cublaslt"].reason == "cublasLt runs on NVIDIA GPUs only"

    def none() -> Library:
        raise Unsupported("cublasLt cannot be loaded: no")

    monkeypatch.setattr(cublaslt, "reachable", lambda tensor: True)
    monkeypatch.setattr(cublaslt, "library", none)
    assert bench(gpu, Clock())["cublaslt"].status == "UNSUPPORTED"


def test_another_library_is_not_taken_for_it() -> None:
    with pytest.raises(OSError, match="cublasLtCreate"):
        Library("libc.so.6")


def test_there_are_as_many_algorithms_as_asked_for(loaded: ctypes.CDLL) -> None:
    weights = torch.randn(K, C)
    matmul = Matmul(by_pixels(K, C, PIXELS, False), weights, "fp32")
    assert len(matmul.algorithms(1)) == 1
    assert len(matmul.algorithms(MOST_ALGORITHMS)) == RIGHT + REFUSED
    assert matmul.describe(matmul.algorithms(1)[0]) == "id 0, tile 0, stages 0, split 0"


# -- the library itself -------------------------------------------------------------------------------
def test_the_real_library_takes_these_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs no GPU: descriptors live on the host, and attributes of a wrong size are refused."""
    try:
        cublaslt.library()
    except Unsupported as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(cublaslt, "_handle", lambda loaded, device: ctypes.c_void_p())
    for precision in cublaslt.COMPUTE_TYPES:
        for images in (1, IMAGES):
            Matmul(by_planes(K, C, PIXELS, True, images), torch.zeros(C, K), precision)
        matmul = Matmul(by_pixels(K, C, PIXELS, False), torch.zeros(K, C), precision, torch.zeros(K))
        with pytest.raises(RuntimeError, match="CUBLAS_STATUS"):
            matmul.algorithms(4)  # there is no context
        assert matmul.describe(Algorithm()).startswith("id 0")
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_INVALID_VALUE"):
        matmul.operation.set(cublaslt.EPILOGUE, ctypes.c_uint64(6))
