"""What is special about Escort's CUDA side: its kernel runs here as C++ on the CPU (``escort_on_cpu.py``), and the PTX
of its windows in an interpreter of that little PTX.

So index arithmetic, copies, barriers and exchanges are tested without a GPU; the contract tests do the rest on one.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from contract.cases import sparse_weight
from contract.shapes import SHAPES
from methods.escort_on_cpu import Emulator
from methods.jobs import GPU, Job
from zeroskip.core.device import cpu
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import PRECISION_DTYPES, ConvShape, Epilogue, Layer, Precision, Sparsity
from zeroskip.core.oracle import expected
from zeroskip.cuda.compile import INCLUDE
from zeroskip.methods.escort import cuda
from zeroskip.methods.escort.cuda_geometry import EscortCudaConfig, patch_of
from zeroskip.methods.escort.method import METHOD

Config = EscortCudaConfig
TAIL, AFTER = Epilogue(True, "relu", "before"), Epilogue(True, "relu6", "after")


def square(c: int, k: int, side: int, n: int = 1, **more: Any) -> ConvShape:
    """A 3x3 convolution that keeps the size of its images."""
    return ConvShape(n, c, side, side, k, 3, 3, padding=(1, 1), **more)


# -- the kernel on the CPU ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One layer with one configuration; ``density`` of its random weight."""

    shape: ConvShape
    config: Config
    precision: Precision = "fp32"
    epilogue: Epilogue = TAIL
    density: float = 0.3

    @property
    def weight(self) -> Tensor:
        return sparse_weight(self.shape.weight_shape, self.density).to(PRECISION_DTYPES[self.precision])

    @property
    def layer(self) -> Layer:
        return Layer("layer", "conv2d", self.shape, self.precision, Sparsity.of(self.weight), self.epilogue)

    @property
    def expression(self) -> str:
        return cuda.expression(self.shape, self.config, self.precision, self.epilogue)

    def random(self, shape: tuple[int, ...], seed: int) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values.to(PRECISION_DTYPES[self.precision])


CASES = {
    "a cluster of 8": Case(square(33, 30, 14), Config("taps", 1, 2, 14, 7, 2, 4, 2, 3, 2, 4, 8)),
    "a cluster of 4, pieces of 2": Case(square(24, 13, 7), Config("taps", 1, 4, 7, 2, 1, 4, 1, 6, 1, 4, 4)),
    "a cluster of 2, pieces of 1": Case(square(9, 8, 7), Config("taps", 1, 4, 7, 1, 2, 2, 1, 3, 2, 2, 2)),
    "a cluster of windows": Case(square(12, 30, 14), Config("windows", 1, 1, 14, 14, 8, 2, 2, 2, 2, 2, 4)),
    "columns in tiles, wide": Case(square(6, 5, 56), Config("taps", 1, 1, 28, 4, 1, 2, 4, 4, 2, 3)),
    "columns in tiles, one beyond": Case(square(5, 5, 30), Config("taps", 1, 2, 16, 5, 2, 2, 2, 2, 3, 2)),
    "images in a tile": Case(square(10, 9, 7, n=6), Config("taps", 4, 1, 7, 7, 2, 2, 1, 4, 2, 3)),
    "images and strips in a tile": Case(square(4, 9, 4, n=5), Config("taps", 2, 2, 4, 2, 4, 2, 4, 2, 3, 2)),
    "images of half precision": Case(
        square(10, 9, 8, n=3), Config("taps", 2, 1, 8, 8, 2, 2, 4, 4, 2, 3), "fp16", AFTER
    ),
    "bfloat16": Case(square(6, 7, 10), Config("taps", 1, 3, 10, 4, 1, 4, 2, 2, 3, 2), "bf16", AFTER),
    "three stages": Case(square(20, 9, 9), Config("taps", 1, 3, 9, 3, 3, 3, 1, 2, 3, 1)),
    "one thread's idle lanes": Case(square(5, 3, 5), Config("taps", 1, 1, 3, 2, 1, 1, 1, 5, 1, 3)),
    "tall windows": Case(square(9, 21, 30), Config("windows", 1, 1, 30, 14, 8, 3, 2, 3, 2, 1)),
    "tall windows, wide": Case(square(5, 9, 32), Config("windows", 1, 2, 16, 14, 8, 1, 4, 2, 3, 2), epilogue=AFTER),
    "flat windows": Case(square(9, 40, 14, n=2), Config("windows", 1, 2, 14, 7, 16, 1, 2, 4, 2, 3)),
    "flat windows of images": Case(square(9, 35, 7, n=5), Config("windows", 4, 1, 7, 7, 16, 2, 1, 4, 2, 2), "fp16"),
    "windows of stride 2": Case(
        square(7, 20, 29, stride=(2, 2)), Config("windows", 1, 2, 15, 7, 16, 2, 1, 3, 2, 1), epilogue=AFTER
    ),
    "windows of stride 2x1": Case(square(7, 20, 16, stride=(2, 1)), Config("windows", 1, 2, 16, 7, 16, 1, 4, 3, 2, 2)),
    "windows of 3x5": Case(
        ConvShape(1, 6, 16, 12, 9, 3, 5, padding=(1, 2)), Config("windows", 1, 2, 12, 14, 8, 2, 4, 3, 2, 1)
    ),
    "windows of groups": Case(square(12, 20, 9, groups=2), Config("windows", 1, 2, 9, 7, 16, 1, 1, 3, 2, 1)),
    "windows without nonzeros": Case(square(4, 9, 9), Config("windows", 1, 1, 9, 14, 8, 2, 1, 2, 2, 1), density=0.0),
    "taps without nonzeros": Case(square(4, 9, 9), Config("taps", 1, 3, 9, 3, 2, 5, 1, 2, 2, 1), density=0.0),
    "dense": Case(square(5, 9, 9), Config("taps", 1, 3, 9, 3, 2, 5, 1, 2, 2, 1), density=1.1),
    "dense windows": Case(square(5, 9, 9), Config("windows", 1, 1, 9, 14, 8, 2, 1, 2, 2, 1), density=1.1),
    "dilation 9": Case(
        ConvShape(1, 6, 12, 11, 5, 3, 3, padding=(9, 9), dilation=(9, 9)), Config("taps", 1, 2, 11, 3, 1, 5, 1, 3, 2, 1)
    ),
    "no padding, no bias": Case(
        ConvShape(2, 6, 9, 12, 5, 3, 3), Config("taps", 1, 3, 10, 3, 1, 5, 4, 3, 2, 1), epilogue=Epilogue()
    ),
}


def sampled() -> dict[str, Case]:
    """The likeliest configuration of every kind of geometry, and others at random; small clusters only."""
    draw, found = random.Random(0), {}
    for name, shape in SHAPES.items():
        if not shape.n:
            continue
        layer = Case(shape, CASES["dense"].config).layer
        every = [config for _, config in cuda.every_config(layer, GPU) if config.warps * config.split <= 16]
        likeliest = [config for _, config in cuda.configs(layer, GPU) if config.warps * config.split <= 16][:1]
        windows = [config for config in every if config.mode == "windows"]
        drawn = [*likeliest, draw.choice(every), *(draw.sample(windows, 1) if windows else ())]
        for config in dict.fromkeys(drawn):
            found[f"{name}, {len(found)}"] = Case(shape, config)
        if len(found) % 3 == 0:
            found[f"{name}, {len(found)}"] = Case(shape, draw.choice(every), "fp16", AFTER)
    return found


SAMPLED = sampled()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    expressions = [case.expression for case in (*CASES.values(), *SAMPLED.values())]
    return Emulator(tmp_path_factory.mktemp("escort"), expressions)


def spread(values: Tensor, wide: int = 1) -> Tensor:
    """``values`` in a larger buffer of NaN; without gaps in or between planes where ``wide`` neighbours are read."""
    n, c, h, w = values.shape
    gaps = (0, 0) if wide > 1 else (3, 5)
    big = torch.full((n + 2, c + 4, h + gaps[0], w + gaps[1]), torch.nan, dtype=values.dtype)
    return big[1 : n + 1, 2 : c + 2, :h, :w].copy_(values)


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
    spoil: Any = None,
) -> Result:
    """A case on random inputs, some ``pixels`` of x with given values.  Nothing beside the output may change."""
    shape, layer = case.shape, case.layer
    x = spread(case.random(shape.input_shape, 2), case.config.wide)
    for where, value in (pixels or {}).items():
        x[where] = value
    bias = case.random((shape.k,), 3) if case.epilogue.bias else None
    residual = spread(case.random(shape.output_shape, 4)) if case.epilogue.residual != "none" else None
    y = spread(torch.zeros(shape.output_shape, dtype=x.dtype))
    monkeypatch.setattr(cuda, "load", emulator.load)
    packed = cuda.pack(layer, case.weight, bias, case.config)
    if spoil is not None:
        spoil(packed.weight)
    cuda.EscortCudaRun(packed, case.expression.encode(), GPU)([x], [y], None, residual)
    result = y.clone()
    y.fill_(torch.nan)
    memory = torch.empty(0, dtype=y.dtype).set_(y.untyped_storage())
    assert bool(memory.isnan().all()), "something was written outside the output"
    return Result(result, x, bias, residual)


def right(case: Case, found: Result) -> bool:
    truth = expected(case.layer, found.x, case.weight, found.bias, found.residual)
    return bool(((found.y.double() - truth.value).abs() <= truth.bound).all())


@pytest.mark.parametrize("name", [*CASES, *SAMPLED])
def test_the_kernel_is_right_and_reads_nothing_but_its_tensors(
    emulator: Emulator, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = (CASES | SAMPLED)[name]
    assert right(case, run(emulator, case, monkeypatch))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "a cluster of 8",
        "images in a tile",
        "three stages",
        "tall windows",
        "flat windows of images",
        "windows of stride 2",
    ],
)
def test_nan_and_inf_reach_what_they_touch(
    emulator: Emulator, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    shape = case.shape
    where = {(shape.n - 1, 1, 3, 4): value, (0, 2, 0, 0): value, (0, 3, shape.h - 1, shape.w - 1): value}
    found = run(emulator, case, monkeypatch, where)
    touched = torch.zeros(shape.input_shape)
    for pixel in where:
        touched[pixel] = 1
    used = (case.weight != 0).float()
    met = functional.conv2d(touched, used, None, shape.stride, shape.padding, shape.dilation, shape.groups) > 0.5
    assert bool(found.y[~met].isfinite().all())
    if value != value:
        assert bool(found.y[met].isnan().all())
    else:
        want = expected(case.layer, found.x, case.weight, found.bias, found.residual).value
        assert torch.equal(found.y.isnan()[met], want.isnan()[met])
        assert torch.equal(found.y[met & want.isinf()].double(), want[met & want.isinf()])


@pytest.mark.parametrize("name", ["a cluster of 8", "tall windows"])
def test_a_nonzero_in_a_wrong_place_is_caught(emulator: Emulator, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above are worth something."""

    def shift(weight: Any) -> None:
        chunk = weight.chunks[0, 0]
        # The first pair's first place, or the first program's first window.
        at = (weight.deal.positions + 4) // 4 * 4 + 1 if not weight.programs else (weight.deal.warps + 3) // 4 * 4 + 2
        chunk[at] += 4

    assert not right(CASES[name], run(emulator, CASES[name], monkeypatch, spoil=shift))


# -- the PTX of the windows -----------------------------------------------------------------------------
def ptx_of_windows() -> list[str]:
    """The three pieces of PTX in windows.cuh, as the preprocessor leaves them."""
    command = ["g++", "-E", "-P", "-x", "c++", f"-I{INCLUDE}", str(cuda.KERNEL.with_name("windows.cuh"))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = text[text.index("run_program") :]
    pieces = re.findall(r"asm volatile\(((?:\s*\"(?:[^\"\\]|\\.)*\")+)\s*:(.*?)\);", text, re.S)
    assert len(pieces) == 3
    found = []
    for code, operands in pieces:
        # Sum i is operand i.
        order = re.findall(r'"\+f"\(sums\[(\d+) / kPixels\]\[(\d+) % kPixels\]\)', operands)
        assert order == [(str(i), str(i)) for i in range(112)]
        kinds: list[str] = re.findall(r'"(\+f|r|n|memory)"', operands)
        assert kinds[112:] == ["r", "r", "n", "memory"]
        strings = re.findall(r'"((?:[^"\\]|\\.)*)"', code)
        found.append("".join(strings).replace("\\n", "\n"))
    return found


def interpret(code: str, memory: bytes, record: int, lane: int, pitch_bytes: int) -> np.ndarray[Any, Any]:
    """The 112 sums that the PTX computes for one lane, from zeros; every instruction that it may hold, and no other."""
    lines = [line.strip() for part in code.split("\n") for line in re.split(r";|(?<=:)(?=$)", part) if line.strip()]
    lines = [line for line in lines if line not in "{}" and not line.startswith((".reg", "{"))]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\w+:", line)}
    registers: dict[str, Any] = {f"%{i}": np.float32(0) for i in range(112)}
    registers |= {"%112": record, "%113": lane, "%114": pitch_bytes}
    targets: list[str] = []
    step = at = 0

    def value(text: str) -> Any:
        return int(text) if text.isdigit() else registers[text]

    def bits(address: int) -> int:
        assert 0 <= address <= len(memory) - 4
        assert address % 4 == 0
        return int.from_bytes(memory[address : address + 4], "little")

    while at < len(lines):
        line = lines[at]
        at, step = at + 1, step + 1
        assert step < 100_000
        if re.fullmatch(r"\w+:", line):
            continue
        if found := re.fullmatch(r"steps: \.branchtargets (.*)", line):
            targets = found[1].split(", ")
        elif found := re.fullmatch(r"ld\.shared\.v2\.b32 \{(\w+), (\w+)\}, \[(\w+)(?:\+(\d+))?\]", line):
            address = registers[found[3]] + int(found[4] or 0)
            assert address % 8 == 0
            registers[found[1]], registers[found[2]] = bits(address), bits(address + 4)
        elif found := re.fullmatch(r"ld\.shared\.f32 (\w+), \[(\w+)\+(\d+)\*(%\d+)\]", line):
            address = registers[found[2]] + int(found[3]) * registers[found[4]]
            registers[found[1]] = np.uint32(bits(address)).view(np.float32)
        elif found := re.fullmatch(r"add\.u32 (\w+), (\w+), (%?\w+)", line):
            registers[found[1]] = value(found[2]) + value(found[3])
        elif found := re.fullmatch(r"mov\.(?:u32|b32) (\w+), (%?\w+)", line):
            moved = value(found[2])
            registers[found[1]] = np.uint32(moved).view(np.float32) if found[1] == "weight" else moved
        elif found := re.fullmatch(r"fma\.rn\.f32 (%\d+), weight, (\w+), (%\d+)", line):
            assert found[1] == found[3]
            exact = float(registers["weight"]) * float(registers[found[2]]) + float(registers[found[1]])
            registers[found[1]] = np.float32(exact)
        elif found := re.fullmatch(r"brx\.idx\.uni (\w+), steps", line):
            at = labels[targets[registers[found[1]]]]
        else:
            raise AssertionError(f"no such PTX: {line}")
    return np.array([registers[f"%{i}"] for i in range(112)])


@pytest.mark.parametrize(("which", "rows", "pixels", "stride"), [(0, 8, 14, 1), (1, 16, 7, 1), (2, 16, 7, 2)])
def test_the_ptx_of_windows_runs_programs(which: int, rows: int, pixels: int, stride: int) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    code = ptx_of_windows()[which]
    shape = ConvShape(1, 3, 40, 12, 2 * rows, 3, 3, (stride, 1), (1, 1))
    config = Config("windows", 1, 1, 12, pixels, rows, 2, 1, 3, 2, 1)
    weight = torch.randint(-4, 5, shape.weight_shape, generator=torch.Generator().manual_seed(0)).float()
    packed = cuda.pack(Case(shape, config).layer, weight, None, config).weight
    patch = patch_of(shape, config)
    tile = np.random.default_rng(0).integers(-9, 9, patch.floats(3)).astype(np.float32)
    chunk = packed.chunks[0, 0].numpy()
    memory, col = tile.tobytes() + chunk.tobytes(), 5
    for warp in range(2):
        begin = len(tile) * 4 + 16 + 8 * int(chunk[warp])
        sums = interpret(code, memory, begin, 4 * (patch.first + col), 4 * patch.pitch).reshape(rows, pixels)
        for number in range(rows):
            row = int(packed.heads[0, number * 2 + warp, 0])
            for pixel in range(pixels):
                want = sum(
                    float(weight[row, c, r, s])
                    * float(tile[c * patch.channel + (pixel * stride + r) * patch.pitch + patch.first + col + s])
                    for c in range(3)
                    for r in range(3)
                    for s in range(3)
                )
                assert sums[number, pixel] == want


# -- what is decided before a kernel runs -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "linear"}, "sputnik"),
        ({"precision": "fp64"}, "fp64"),
        ({"shape": square(4, 4, 8, n=0)}, "empty"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], reason: str) -> None:
    layer = CASES["dense"].layer
    assert METHOD.supports(layer, GPU) is None
    assert reason in (METHOD.supports(replace(layer, **changes), GPU) or "")


def test_both_sides_take_what_is_theirs() -> None:
    job = Job.of(square(8, 8, 9))
    for device in (GPU, cpu(1)):
        found = METHOD.configs(job.segment, device)
        assert found
        assert all(isinstance(one.config, Config) == (device.kind == "cuda") for one in found)
        for one in found:
            assert from_json(METHOD.config_type, to_json(one.config)) == one.config
            assert METHOD.candidate(job.segment, one.config).inputs == one.inputs
    assert METHOD.supports(replace(job.layer, precision="fp16"), cpu(1))
    assert METHOD.supports(replace(job.layer, precision="fp16"), GPU) is None


def test_a_configuration_of_the_other_side_is_refused() -> None:
    job = Job.of(square(8, 8, 9))
    for device, other in ((GPU, cpu(1)), (cpu(1), GPU)):
        packed = METHOD.pack(job.segment, job.parameters, METHOD.configs(job.segment, other)[0].config)
        with pytest.raises(ValueError, match="plan again"):
            METHOD.bind(job.segment, packed, b"", device)


LARGE = [
    *(square(c, c, side) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *(square(c, c, side, stride=(2, 2)) for c, side in ((128, 56), (256, 28), (512, 14))),
    *(square(c, k, side) for c, k, side in ((3, 64, 224), (64, 128, 112), (256, 512, 28), (512, 512, 14))),
    ConvShape(1, 64, 60, 60, 64, 3, 3, padding=(36, 36), dilation=(36, 36)),
    ConvShape(1, 32, 40, 40, 32, 31, 31, padding=(15, 15)),
    ConvShape(1, 96, 1, 1, 96, 3, 3, padding=(1, 1)),
    ConvShape(1, 64, 300, 3, 64, 3, 3, padding=(1, 1), groups=32),
]


@pytest.mark.parametrize("n", [1, 32])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_every_layer_has_candidates_that_fit_it(shape: ConvShape, n: int) -> None:
    shape = replace(shape, n=n)
    layer = Layer("layer", "conv2d", shape, "fp32", Sparsity(1, 0.1, "unstructured", 0.3), TAIL)
    found = cuda.configs(layer, GPU)
    assert 2 <= len(found) <= 24
    assert len({config for _, config in found}) == len(found)
    assert all(0 < seconds < 1 for seconds, _ in found)
    usual = shape.r == 3 and shape.dilation == (1, 1)
    assert not usual or {config.mode for _, config in cuda.every_config(layer, GPU)} == {"taps", "windows"}


def test_blocks_of_a_gpu_without_clusters_are_alone() -> None:
    layer = CASES["a cluster of 8"].layer
    for arch, splits in (("sm_80", {1}), ("sm_90a", {1, 2, 4, 8}), ("sm_100a", {1, 2, 4, 8})):
        device = replace(GPU, arch=arch, shared_bytes=160 * 1024)
        assert {config.split for _, config in cuda.every_config(layer, device)} == splits


def test_outputs_on_neighbouring_lanes_meet_different_banks() -> None:
    """Of the layers in whole networks; of any other a configuration may do with less."""
    for shape in LARGE[:11]:
        for n in (1, 32):
            layer = Layer("layer", "conv2d", replace(shape, n=n), "fp32", Sparsity(1, 0.1, "unstructured", 0.3), TAIL)
            assert all(patch_of(layer.shape, config).conflict == 1 for _, config in cuda.configs(layer, GPU))


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "rows"},
        {"images": 3},
        {"pixels": 17},
        {"rows": 0},
        {"wide": 3},
        {"stages": 4},
        {"split": 3},
        {"warps": 3, "split": 4},
        {"warps": 33},
        {"mode": "windows", "rows": 4},
        {"mode": "windows", "pixels": 14, "rows": 8, "warps": 16},
    ],
)
def test_configs_that_no_kernel_takes_do_not_exist(changes: dict[str, Any]) -> None:
    good = Config("taps", 1, 2, 14, 7, 1, 16, 2, 32, 1, 16, 8)
    with pytest.raises(ValueError, match=r"mode|sizes|pixels|wide|split|registers|rows"):
        replace(good, **changes)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        (square(16, 16, 15), {}),
        (square(16, 16, 30), {"cols": 15}),
        (square(16, 16, 14, stride=(2, 2)), {}),
        (square(16, 17, 14), {}),
        (square(16, 16, 14), {"stages": 1}),
        (square(16, 16, 14), {"slab": 16, "split": 2}),
        (ConvShape(1, 16, 14, 14, 16, 5, 5, padding=(2, 2)), {"mode": "windows", "rows": 16}),
        (square(16, 16, 14, dilation=(2, 1)), {"mode": "windows", "rows": 16}),
        (square(16, 16, 14, stride=(2, 1)), {"mode": "windows", "rows": 8, "pixels": 14}),
        (square(70_000, 70_000, 1, groups=70_000), {"cols": 1, "slab": 1, "wide": 1}),
    ],
)
def test_configs_that_do_not_fit_the_layer_are_refused(shape: ConvShape, changes: dict[str, Any]) -> None:
    config = replace(Config("taps", 1, 2, 14, 7, 4, 4, 2, 8, 2, 1), **changes)
    layer = Layer("layer", "conv2d", shape, "fp32", Sparsity(1, 0.1, "unstructured", 0.3), TAIL)
    with pytest.raises(ValueError, match=r"neighbours|do not fit|windows are for"):
        METHOD.candidate(replace(Job.of(square(1, 1, 3)).segment, layers=(layer,)), config)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_packing_keeps_every_weight(name: str, precision: Precision) -> None:
    case = replace(CASES[name], precision=precision)
    bias = torch.randn(case.shape.k).to(case.weight.dtype)
    packed = cuda.pack(case.layer, case.weight, bias, case.config)
    assert torch.equal(METHOD.unpack(packed), case.weight.float())
    heads = packed.weight.heads.reshape(-1, 2)
    heads = heads[heads[:, 0] >= 0]
    assert torch.equal(heads[:, 1].contiguous().view(torch.float32)[heads[:, 0].argsort()], bias.float())
