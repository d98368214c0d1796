"""What is special about depthwise: its kernels run here as C++ on the CPU, thread by thread, with every load checked.

Predicated loads become functions that refuse what is not an element of a tensor or not aligned (``cuda_on_cpu.py`` has
the rest).  So index arithmetic is tested without a GPU; the contract tests do the rest on one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.cuda_on_cpu import CpuKernel
from zeroskip.core.device import Device, cpu
from zeroskip.core.graph import Segment
from zeroskip.core.layer import PRECISION_DTYPES, ConvShape, Epilogue, Layer, Precision, Sparsity
from zeroskip.core.oracle import expected
from zeroskip.methods.depthwise import cuda
from zeroskip.methods.depthwise.cuda import DepthwiseConfig
from zeroskip.methods.depthwise.method import METHOD

GPU = Device("cuda", "an H100", 50 * 2**20, arch="sm_90a", num_sms=132)

# -- CUDA on the CPU ------------------------------------------------------------------------------------
FILES = {
    "load_if.cuh": """
#pragma once
template <int Offset, typename Word>
void load_if(bool there, const void* from, Word& to) {
    const char* address = static_cast<const char*>(from) + Offset;
    if (!there) return;
    if (!aligned(address, sizeof(Word)) || !readable(address, sizeof(Word))) ++faults;
    else memcpy(&to, address, sizeof(Word));
}
""",
    "machine.h": """
inline void run_grid(const int64_t*) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x)
    for (threadIdx.y = 0; threadIdx.y < blockDim.y; ++threadIdx.y)
    for (threadIdx.z = 0; threadIdx.z < blockDim.z; ++threadIdx.z)
        body();
}
""",
}


@dataclass(frozen=True)
class Case:
    """One layer with one configuration; ``gaps`` around rows, channels and images of every tensor, in elements."""

    shape: ConvShape
    config: DepthwiseConfig
    precision: Precision = "fp32"
    epilogue: Epilogue = field(default_factory=Epilogue)
    gaps: tuple[int, int, int] = (0, 0, 0)
    density: float = 1.0

    @property
    def layer(self) -> Layer:
        return Layer("layer", "conv2d", self.shape, self.precision, Sparsity.of(self.weight), self.epilogue)

    @property
    def weight(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(self.shape.weight_shape, generator=generator)
        keep = torch.rand(self.shape.weight_shape, generator=generator) < self.density
        return (weight * keep).to(PRECISION_DTYPES[self.precision])

    def random(self, shape: Sequence[int], seed: int) -> Tensor:
        values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
        return self.spread(values.to(PRECISION_DTYPES[self.precision]))

    def spread(self, values: Tensor) -> Tensor:
        """``values`` in a larger buffer of NaN, with this case's gaps."""
        if values.dim() != 4 or not any(self.gaps):
            return values
        column, row, channel = self.gaps
        n, c, h, w = values.shape
        big = torch.full((n + 1, c + channel, h + row, w + column), torch.nan, dtype=values.dtype)
        return big[:n, :c, :h, :w].copy_(values)


class Emulator(CpuKernel):
    def __init__(self, folder: Path, expressions: Sequence[str]) -> None:
        super().__init__(folder, cuda.KERNEL, expressions, FILES)

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
        *,
        dependent: bool = False,
    ) -> None:
        faults = self.run(grid, block, arguments, [arguments[at] for at in (0, 8, 12)])
        assert faults == 0, f"{faults} loads of {self.expression} were outside their tensor or not aligned"


@dataclass(frozen=True)
class Result:
    y: Tensor
    x: Tensor
    bias: Tensor | None
    residual: Tensor | None


def run(
    emulator: Emulator,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    pixels: Mapping[tuple[int, ...], float] | None = None,
) -> Result:
    """A case on random inputs, some ``pixels`` of x with given values.  Nothing beside the output may change."""
    shape, layer = case.shape, case.layer
    x = case.random(shape.input_shape, 2)
    for where, value in (pixels or {}).items():
        x[where] = value
    bias = case.random([shape.k], 3) if case.epilogue.bias else None
    residual = case.random(shape.output_shape, 4) if case.epilogue.residual != "none" else None
    y = case.spread(torch.full(shape.output_shape, torch.nan, dtype=x.dtype))
    monkeypatch.setattr(cuda, "load", emulator.load)
    packed = cuda.pack(layer, case.weight, bias, case.config)
    cuda.DepthwiseRun(packed, cuda.expression(layer, case.config).encode())([x], [y], None, residual)
    result = y.clone()
    y.fill_(torch.nan)
    memory = torch.empty(0, dtype=y.dtype).set_(y.untyped_storage())
    assert bool(memory.isnan().all()), "something was written outside the output"
    return Result(result, x, bias, residual)


def conv(
    side: tuple[int, int], taps: tuple[int, int], *, n: int = 1, c: int = 3, multiplier: int = 1, **more: Any
) -> ConvShape:
    """A depthwise convolution, padded to keep its size unless told otherwise."""
    more.setdefault("padding", (taps[0] // 2, taps[1] // 2))
    return ConvShape(n, c, *side, c * multiplier, *taps, groups=c, **more)


TAIL = Epilogue(True, "relu6", "before")
CASES = {
    "3x3 in vectors of four": Case(conv((16, 32), (3, 3)), DepthwiseConfig(2, 4, 8, 4), epilogue=TAIL),
    "3x3 stride 2": Case(conv((12, 16), (3, 3), stride=(2, 2)), DepthwiseConfig(2, 4, 2, 3), epilogue=TAIL),
    "vectors of eight halves": Case(conv((9, 32), (3, 3), n=2), DepthwiseConfig(2, 8, 4, 2, 2), "fp16", TAIL),
    "stride 2 in halves": Case(conv((9, 32), (3, 3), stride=(2, 2)), DepthwiseConfig(1, 8, 2, 2, 3), "fp16"),
    "bfloat16": Case(conv((6, 8), (3, 3)), DepthwiseConfig(2, 4, 2, 2), "bf16", replace(TAIL, residual="after")),
    "7x7 images": Case(conv((7, 7), (3, 3), n=3, c=5), DepthwiseConfig(1, 1, 7, 7, 4), epilogue=TAIL),
    "7x7 images, a row of outputs": Case(conv((7, 7), (3, 3), n=3, c=5), DepthwiseConfig(2, 7, 1, 4, 8)),
    "14x14 images": Case(conv((14, 14), (3, 3), c=6), DepthwiseConfig(2, 2, 7, 7, 4), "fp16"),
    "more threads than outputs": Case(conv((3, 4), (3, 3)), DepthwiseConfig(4, 4, 9, 5, 5)),
    "tiles beyond the edge": Case(conv((11, 20), (3, 3)), DepthwiseConfig(4, 8, 2, 2, 2), epilogue=TAIL),
    "5x5 stride 2": Case(conv((13, 24), (5, 5), stride=(2, 2)), DepthwiseConfig(2, 4, 3, 4)),
    "7x7": Case(conv((10, 12), (7, 7)), DepthwiseConfig(2, 4, 3, 5), epilogue=Epilogue(True, "relu")),
    "1x7 unpadded": Case(conv((3, 19), (1, 7), padding=(0, 0)), DepthwiseConfig(2, 3, 5, 2)),
    "2x4 padded by 3": Case(conv((5, 8), (2, 4), padding=(3, 3)), DepthwiseConfig(2, 4, 3, 5)),
    "dilation 2": Case(conv((9, 16), (3, 3), padding=(2, 2), dilation=(2, 2)), DepthwiseConfig(2, 4, 4, 5)),
    "stride 3 dilation 2x4": Case(
        conv((17, 24), (3, 3), padding=(2, 4), stride=(3, 2), dilation=(2, 4)), DepthwiseConfig(2, 4, 3, 3)
    ),
    "stride larger than the kernel": Case(
        conv((9, 15), (2, 2), padding=(0, 0), stride=(3, 4)), DepthwiseConfig(2, 4, 1, 2)
    ),
    "multiplier 3": Case(conv((6, 8), (3, 3), n=2, multiplier=3), DepthwiseConfig(2, 4, 2, 3, 4), epilogue=TAIL),
    "one pixel": Case(conv((1, 1), (3, 3), n=4, c=9), DepthwiseConfig(1, 1, 1, 1, 16)),
    "more planes than a grid has in y": Case(conv((2, 1), (3, 3), n=2, c=34_000), DepthwiseConfig(2, 1, 1, 1)),
    "one column": Case(conv((13, 1), (3, 3)), DepthwiseConfig(4, 1, 1, 4, 2)),
    "skipped taps": Case(conv((8, 16), (3, 3)), DepthwiseConfig(2, 4, 4, 4, skip=True), epilogue=TAIL, density=0.3),
    "no tap left": Case(conv((8, 16), (3, 3)), DepthwiseConfig(2, 4, 4, 4, skip=True), epilogue=TAIL, density=0.0),
    "rows apart by a vector": Case(
        conv((8, 16), (3, 3), n=2), DepthwiseConfig(2, 4, 4, 4), epilogue=TAIL, gaps=(4, 1, 1)
    ),
    "rows apart by one": Case(conv((8, 16), (3, 3), n=2), DepthwiseConfig(2, 4, 4, 4), epilogue=TAIL, gaps=(1, 0, 2)),
    "loop": Case(
        conv((9, 10), (3, 3), n=2), DepthwiseConfig(2, 3, 3, 2, 2, window=False), epilogue=TAIL, gaps=(1, 1, 1)
    ),
    "loop 9x8": Case(conv((12, 13), (9, 8), padding=(4, 3)), DepthwiseConfig(2, 2, 4, 4, window=False), "fp16", TAIL),
    "loop skipping": Case(
        conv((20, 21), (5, 5), stride=(2, 3), dilation=(2, 1), multiplier=2),
        DepthwiseConfig(1, 2, 4, 4, window=False, skip=True),
        epilogue=replace(TAIL, residual="after"),
        density=0.3,
    ),
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    expressions = [cuda.expression(case.layer, case.config) for case in CASES.values()]
    return Emulator(tmp_path_factory.mktemp("depthwise"), expressions)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_right_and_reads_nothing_but_its_tensors(
    emulator: Emulator, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    found = run(emulator, case, monkeypatch)
    truth = expected(case.layer, found.x, case.weight, found.bias, found.residual)
    assert bool(((found.y.double() - truth.value).abs() <= truth.bound).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["3x3 in vectors of four", "dilation 2", "loop"])
def test_taps_that_are_not_skipped_spread_nan_and_inf_as_torch_does(
    emulator: Emulator, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    found = run(emulator, case, monkeypatch, {(0, 1, 4, 5): value})
    want = expected(case.layer, found.x, case.weight, found.bias, found.residual).value
    assert torch.equal(found.y.isnan(), want.isnan())
    assert torch.equal(found.y[want.isinf()].double(), want[want.isinf()])
    assert bool(found.y[want.isfinite()].isfinite().all())


def test_a_skipped_tap_hides_what_it_would_have_met(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(emulator, CASES["no tap left"], monkeypatch, {(0, 1, 4, 5): torch.nan, (0, 0, 0, 0): torch.inf})
    assert bool(found.y.isfinite().all())


# -- what is decided before a kernel runs -----------------------------------------------------------------
@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 32, 96, 1024, 1025, 46341, 2**30 + 1, 2**31 - 1])
def test_divisions_are_exact(divisor: int) -> None:
    """As kernel.cuh computes them, in 32 bits."""
    magic, shift = cuda.divider(divisor)
    for near in (0, divisor, 7 * divisor, 1000 * divisor, 2**31 - 1 - (2**31 - 1) % divisor):
        for number in (near - 1, near, near + 1, near + divisor - 1):
            if 0 <= number < 2**31:
                total = (number * (magic % 2**32) >> 32) + number
                assert total < 2**32
                assert total >> shift == number // divisor


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "linear"}, "linear"),
        ({"precision": "fp64"}, "fp64"),
        ({"shape": ConvShape(1, 4, 8, 8, 4, 3, 3, groups=2)}, "2 channels"),
        ({"shape": ConvShape(0, 4, 8, 8, 4, 3, 3, groups=4)}, "empty"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], reason: str) -> None:
    layer = CASES["7x7"].layer
    assert METHOD.supports(layer, GPU) is None
    assert reason in (METHOD.supports(replace(layer, **changes), GPU) or "")
    assert "escort" in (METHOD.supports(layer, cpu(1)) or "")


SQUARES = [conv((side, side), (taps, taps), c=64) for side in (1, 7, 14, 112) for taps in (1, 3, 7, 11)]
ODD = [
    conv((30, 1), (3, 3)),
    conv((9, 40), (3, 3), padding=(12, 12), dilation=(12, 12)),
    conv((5, 5), (5, 5), padding=(0, 0)),
]


@pytest.mark.parametrize("n", [1, 32])
@pytest.mark.parametrize("shape", SQUARES + ODD, ids=str)
def test_every_layer_has_a_few_different_candidates(shape: ConvShape, n: int) -> None:
    sparse = Sparsity(1, 0.5, "unstructured", 0.0)
    layer = Layer("layer", "conv2d", replace(shape, n=n), "fp32", sparse, Epilogue())
    found = METHOD.configs(Segment(("layer",), ("x",), ("layer",), (layer,)), GPU)
    assert 1 <= len(found) <= 12
    assert len({candidate.config for candidate in found}) == len(found)
    assert {candidate.config.skip for candidate in found} == {False, True}
    assert [candidate.run_seconds for candidate in found] == sorted(candidate.run_seconds for candidate in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 0},
        {"cols": 9},
        {"threads_x": 0},
        {"threads_x": 257, "threads_y": 1},
        {"threads_x": 1, "threads_y": 1, "planes": 65},
        {"planes": 2, "skip": True},
    ],
)
def test_configs_that_no_kernel_takes_do_not_exist(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be in|a block has|on one plane"):
        replace(DepthwiseConfig(2, 4, 7, 7), **changes)


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        (conv((20, 20), (9, 9)), DepthwiseConfig(1, 1, 4, 4)),
        (conv((20, 20), (7, 7)), DepthwiseConfig(8, 8, 4, 4)),
        (conv((70_000, 1), (3, 1)), DepthwiseConfig(1, 1, 1, 1)),
    ],
)
def test_configs_that_do_not_fit_the_layer_are_refused(shape: ConvShape, config: DepthwiseConfig) -> None:
    layer = Layer("layer", "conv2d", shape, "fp32", Sparsity(1, 1.0, "dense", 0.0), Epilogue())
    with pytest.raises(ValueError, match=r"at most 49 taps|registers|tiles"):
        METHOD.candidate(Segment(("layer",), ("x",), ("layer",), (layer,)), config)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_packing_keeps_every_weight(precision: Precision) -> None:
    case = replace(CASES["skipped taps"], precision=precision)
    packed = cuda.pack(case.layer, case.weight, None, case.config)
    assert torch.equal(cuda.unpack(packed), case.weight)
    assert cuda.unpack(packed).dtype == case.weight.dtype
