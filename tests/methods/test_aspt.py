"""What is special about ASpT: its kernel runs here as C++ on the CPU, the threads of a block as fibers.

``__syncthreads`` hands over to the next thread, in an order that is drawn anew between any two barriers, and a copy to
shared memory happens when its thread waits for it, not before (``cuda_on_cpu.py`` has the rest).  Shared memory begins
full of NaN.  So what only works by luck, a missing barrier, a copy that nobody waits for, an address beyond a tensor,
is found without a GPU; the contract tests do the rest on one.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from methods.cuda_on_cpu import CpuKernel
from methods.jobs import EPILOGUES, GPU, Job
from zeroskip.core.device import cpu
from zeroskip.core.errors import Unsupported
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import ConvShape, Epilogue, Precision
from zeroskip.core.oracle import expected
from zeroskip.measure.bound import moved
from zeroskip.methods.aspt import cuda
from zeroskip.methods.aspt.cuda import AsptConfig
from zeroskip.methods.aspt.method import METHOD

# -- CUDA on the CPU ------------------------------------------------------------------------------------
MACHINE = """
#pragma once
#include <ucontext.h>

constexpr int kShared = 232448, kGuard = 4096, kStack = 1 << 16;
namespace zeroskip::aspt { static uint4 memory[(kShared + kGuard) / 16]; }
inline char* shared_begin() { return reinterpret_cast<char*>(zeroskip::aspt::memory); }
static int64_t shared_bytes;
constexpr bool late = true;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Groups groups;
    bool ended;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static unsigned running;
inline Groups& groups() { return fibers[running].groups; }
inline void __syncthreads() {
    swapcontext(&fibers[running].context, &scheduler);
    threadIdx = {running, 0, 0};
}
inline void thread() {
    threadIdx = {running, 0, 0};
    body();
    fibers[running].ended = true;
    swapcontext(&fibers[running].context, &scheduler);
}
// sizes: bytes of shared memory; a number that decides in which order threads run.
inline void run_grid(const int64_t* sizes) {
    const unsigned threads = blockDim.x;
    shared_bytes = sizes[0];
    uint64_t random = sizes[1];
    fibers.resize(threads);
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
        memset(shared_begin(), 0xff, kShared + kGuard);
        std::vector<unsigned> order(threads);
        for (unsigned t = 0; t < threads; ++t) {
            order[t] = t;
            fibers[t].stack.resize(kStack);
            fibers[t].groups.assign(1, {});
            fibers[t].ended = false;
            getcontext(&fibers[t].context);
            fibers[t].context.uc_stack.ss_sp = fibers[t].stack.data();
            fibers[t].context.uc_stack.ss_size = kStack;
            fibers[t].context.uc_link = nullptr;
            makecontext(&fibers[t].context, thread, 0);
        }
        for (unsigned ended = 0; ended < threads;) {
            for (unsigned t = threads - 1; t > 0; --t) {
                random = random * 6364136223846793005u + 1442695040888963407u;
                std::swap(order[t], order[(random >> 33) % (t + 1)]);
            }
            for (unsigned t : order) {
                running = t;
                swapcontext(&scheduler, &fibers[t].context);
            }
            ended = 0;
            for (const Fiber& fiber : fibers) ended += fiber.ended;
            if (ended != 0 && ended != threads) faults += 1 << 20;  // a barrier that not all came to
            if (faults >> 20) break;
        }
        for (const Fiber& fiber : fibers)
            for (const auto& group : fiber.groups) faults += group.size();  // nobody waited for it
        for (int64_t i = shared_bytes; i < kShared + kGuard; ++i) faults += shared_begin()[i] != char(0xff);
    }
}
"""


class Emulator(CpuKernel):
    seed = 0

    def __init__(self, folder: Path, expressions: Sequence[str], kernel: Path = cuda.KERNEL) -> None:
        super().__init__(folder, kernel, expressions, {"machine.h": MACHINE})

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
        *,
        shared_bytes: int,
        dependent: bool,
    ) -> None:
        assert dependent
        assert grid[2] == block[1] == block[2] == 1
        faults = self.run(grid, block, arguments, arguments[:3], shared_bytes, self.seed)
        assert faults < 1 << 20, "some threads ended while others waited"
        assert faults == 0, f"{faults} copies were outside, not aligned or not waited for, or bytes behind the memory"


# -- cases ----------------------------------------------------------------------------------------------
TAIL = Epilogue(True, "relu6", "before")


@dataclass(frozen=True)
class Case:
    """One layer with one configuration.  ``gaps``: spare columns, rows and channels around every image, images between
    images."""

    shape: ConvShape
    config: AsptConfig
    precision: Precision = "fp32"
    epilogue: Epilogue = TAIL
    density: float = 0.1
    kind: Literal["conv2d", "linear"] = "conv2d"
    gaps: tuple[int, int, int] = (0, 0, 0)
    long_rows: int = 0

    @property
    def job(self) -> Job:
        return Job.of(self.shape, self.epilogue, self.precision, self.kind, self.weight)

    @property
    def weight(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(self.shape.weight_shape, generator=generator)
        # Some input channels are needed by most rows, others by few: panels have heavy and light columns.
        chance = torch.rand(self.shape.weight_shape[1], generator=generator).square() * 3 * self.density
        keep = torch.rand(self.shape.weight_shape, generator=generator) < chance.reshape(1, -1, 1, 1)
        keep[: self.long_rows] = True
        return weight * keep

    def spread(self, values: Tensor, around: float = torch.nan) -> Tensor:
        """``values`` in a larger buffer of ``around``."""
        if values.dim() == 2:
            big = torch.full((values.shape[0] + 2, values.shape[1] + self.gaps[0]), around, dtype=values.dtype)
            return big[1:-1, : values.shape[1]].copy_(values)
        column, row, channel = self.gaps
        n, c, h, w = values.shape
        big = torch.full((n + 2, c + channel, h + row, w + column), around, dtype=values.dtype)
        return big[1:-1, :c, :h, :w].copy_(values)


LINE, SMALL = ConvShape(2, 64, 14, 14, 48, 1, 1), ConvShape(3, 60, 7, 7, 33, 1, 1)
CASES = {
    "vectors": Case(LINE, AsptConfig(4, 8, 1, 1, 4, 16, 3, 64)),
    "light only": Case(LINE, AsptConfig(4, 8, 1, 1, 4, 16, 99, 64)),
    "heavy only": Case(LINE, AsptConfig(4, 8, 1, 1, 4, 16, 1, 64)),
    "two sections": Case(LINE, AsptConfig(4, 16, 1, 2, 4, 16, 2, 32)),
    "many sections": Case(LINE, AsptConfig(4, 8, 2, 2, 4, 24, 2, 5)),
    "rows in the given order": Case(LINE, AsptConfig(4, 8, 1, 2, 4, 20, 3, 16, order="given")),
    "dense": Case(LINE, AsptConfig(4, 8, 1, 1, 4, 16, 4, 24), density=9.0),
    "no nonzero": Case(LINE, AsptConfig(4, 8, 1, 1, 4, 16, 2, 64), density=0.0),
    "wide": Case(replace(LINE, h=16, w=17), AsptConfig(4, 32, 2, 2, 4, 8, 2, 32)),
    "divided rows": Case(LINE, AsptConfig(4, 8, 1, 2, 4, 30, 3, 64, longest=4)),
    "long rows": Case(LINE, AsptConfig(4, 8, 1, 1, 4, 16, 3, 16, longest=12), long_rows=2),
    "long rows undivided": Case(LINE, AsptConfig(4, 8, 1, 1, 4, 16, 3, 16), long_rows=2),
    "divided in the given order": Case(
        SMALL, AsptConfig(1, 16, 2, 1, 4, 8, 2, 16, longest=3, order="given"), long_rows=1
    ),
    "7x7 images": Case(SMALL, AsptConfig(1, 32, 2, 1, 4, 4, 2, 64)),
    "7x7 images, four pieces": Case(SMALL, AsptConfig(1, 8, 4, 2, 4, 32, 2, 16)),
    "stride 2": Case(ConvShape(2, 24, 9, 13, 18, 1, 1, (2, 2)), AsptConfig(1, 8, 1, 1, 4, 16, 2, 64)),
    "stride 2x1": Case(ConvShape(1, 24, 9, 13, 18, 1, 1, (2, 1)), AsptConfig(1, 16, 1, 2, 4, 16, 2, 9), "fp16"),
    "groups": Case(replace(LINE, groups=4), AsptConfig(4, 8, 1, 1, 4, 16, 2, 8), density=0.3),
    "one pixel": Case(ConvShape(1, 40, 1, 1, 17, 1, 1), AsptConfig(1, 8, 1, 1, 4, 16, 2, 64)),
    "one row": Case(ConvShape(1, 40, 4, 8, 1, 1, 1), AsptConfig(4, 8, 1, 1, 4, 16, 1, 64)),
    "fp16 in eights": Case(replace(LINE, h=16), AsptConfig(8, 8, 1, 1, 4, 16, 3, 64), "fp16"),
    "fp16 in eights, divided": Case(replace(LINE, h=16), AsptConfig(8, 8, 2, 1, 4, 16, 3, 9, longest=5), "fp16"),
    "fp16 in fours": Case(LINE, AsptConfig(4, 16, 1, 2, 4, 16, 3, 20), "fp16"),
    "fp16 one by one": Case(SMALL, AsptConfig(1, 16, 2, 2, 4, 16, 2, 20), "fp16"),
    "bf16": Case(replace(LINE, h=16), AsptConfig(8, 16, 1, 1, 4, 8, 2, 20), "bf16", replace(TAIL, residual="after")),
    "gaps": Case(SMALL, AsptConfig(1, 16, 2, 1, 4, 8, 2, 16), gaps=(3, 2, 5)),
    "channels apart": Case(LINE, AsptConfig(4, 16, 1, 1, 4, 8, 2, 16), gaps=(0, 0, 5)),
    "linear": Case(ConvShape(9, 64, 1, 1, 48, 1, 1), AsptConfig(1, 8, 2, 1, 4, 16, 2, 16), kind="linear"),
    "linear, one row": Case(ConvShape(1, 64, 1, 1, 48, 1, 1), AsptConfig(1, 8, 1, 1, 4, 16, 2, 64), kind="linear"),
    "linear, apart": Case(
        ConvShape(40, 64, 1, 1, 48, 1, 1),
        AsptConfig(1, 32, 2, 1, 4, 4, 2, 30, longest=6),
        "bf16",
        kind="linear",
        gaps=(3, 0, 0),
    ),
}
ENDS = AsptConfig(4, 8, 1, 1, 4, 16, 3, 64)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    expressions = [case.config.expression(case.precision) for case in CASES.values()]
    return Emulator(tmp_path_factory.mktemp("aspt"), expressions)


def run(
    emulator: Emulator, case: Case, monkeypatch: pytest.MonkeyPatch, job: Job | None = None, seed: int = 0
) -> tuple[Job, Tensor]:
    """The job and its result.  Nothing beside the output may change, and every element of it must."""
    job = job or case.job
    x, residual = case.spread(job.x), None if job.residual is None else case.spread(job.residual)
    y = case.spread(torch.full(job.expected.value.shape, torch.nan, dtype=x.dtype), 7.0)
    monkeypatch.setattr(cuda, "load", emulator.load)
    emulator.seed = seed
    METHOD.candidate(job.segment, case.config)
    packed = METHOD.pack(job.segment, job.parameters, case.config)
    built = case.config.expression(case.precision).encode()
    cuda.AsptRun(job.layer, packed, built, GPU)([x], [y], None, residual)
    result = y.clone()
    y.fill_(7.0)
    memory = torch.empty(0, dtype=y.dtype).set_(y.untyped_storage())
    assert bool((memory == 7.0).all()), "something was written outside the output"
    return job, result


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_right_and_reads_nothing_but_its_tensors(
    emulator: Emulator, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, y = run(emulator, CASES[name], monkeypatch)
    assert bool(((y.double() - job.expected.value).abs() <= job.expected.bound).all())


@pytest.mark.parametrize("name", ["two sections", "long rows", "fp16 one by one"])
def test_the_order_of_threads_changes_no_bit(emulator: Emulator, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = run(emulator, CASES[name], monkeypatch, seed=1)
    _, second = run(emulator, CASES[name], monkeypatch, seed=2)
    assert torch.equal(first, second)


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_every_epilogue(emulator: Emulator, epilogue: Epilogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are large enough that relu6 cuts on both sides."""
    case = replace(CASES["vectors"], epilogue=epilogue)
    job = Job.of(case.shape, epilogue, weight=3 * case.weight)
    _, y = run(emulator, case, monkeypatch, job)
    assert bool(((y.double() - job.expected.value).abs() <= job.expected.bound).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["vectors", "light only", "heavy only", "long rows", "fp16 one by one", "linear"])
def test_nan_and_inf_reach_what_meets_them_and_nothing_else(
    emulator: Emulator, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither skipped weights, nor columns behind the last one, nor spare nonzeros touch them."""
    case = replace(CASES[name], epilogue=Epilogue(True))
    job = case.job
    rows = job.weight.reshape(case.shape.k, -1)
    for channel in (1, 5, 33):
        x = job.x.clone()
        x[(-1, channel) if x.dim() == 2 else (-1, channel, -1, -1)] = value
        hit = replace(job, x=x)
        _, y = run(emulator, case, monkeypatch, hit)
        want = expected(job.layer, job.x, job.weight, job.bias).value
        last = (-1, slice(None)) if x.dim() == 2 else (-1, slice(None), -1, -1)
        meets = rows[:, channel] != 0
        found = y[last]
        assert bool((found[meets].isnan() if value != value else found[meets].isinf()).all())
        assert bool(found[~meets].isfinite().all())
        y[last] = want[last].to(y.dtype)
        assert bool(y.isfinite().all())


def test_a_panel_without_heavy_columns_runs_beside_one_with_them(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["rows in the given order"]
    weight = torch.zeros(case.shape.weight_shape)
    weight[:16, ::2] = 1.5
    weight[torch.arange(16, 48), torch.arange(32) * 2] = 0.5
    job = Job.of(case.shape, case.epilogue, weight=weight)
    heavy = METHOD.pack(job.segment, job.parameters, case.config).weight.chunks[:, :, 2 * 32 + 1]
    assert heavy.sum(1).tolist() == [32, 0, 0]
    _, y = run(emulator, case, monkeypatch, job)
    assert bool(((y.double() - job.expected.value).abs() <= job.expected.bound).all())


FAULTS = {
    "no barrier before what was copied is read": (
        "        copy_wait<0>();\n        __syncthreads();\n",
        "copy_wait<0>();",
    ),
    "copies are not waited for": ("        copy_wait<0>();\n", ""),
    "sums are read before all are there": ("        __syncthreads();\n        for (int i", "        for (int i"),
    "sums are written over what is still read": ("(chunk_memory);\n        __syncthreads();", "(chunk_memory);"),
    "two chunks instead of three": ("s % 3 * chunk_units", "s % 2 * chunk_units"),
    "one tile instead of two": ("s % 2 * (width", "s % 1 * (width"),
    "the end is not cut off": ("col >= count", "col > count + 1000"),
    "a nonzero too few": ("const int end = index[1];", "const int end = index[1] - 1;"),
    "a nonzero too many": ("const int end = index[1];", "const int end = index[1] + 1;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    before, after = FAULTS[fault]
    text = cuda.KERNEL.read_text()
    assert before in text
    (tmp_path / "kernel.cuh").write_text(text.replace(before, after))
    case = Case(SMALL, AsptConfig(1, 16, 2, 2, 4, 16, 1, 9, longest=4), density=0.2)
    emulator = Emulator(tmp_path, [case.config.expression("fp32")], tmp_path / "kernel.cuh")
    wrong = []
    for seed in range(3):
        try:
            job, y = run(emulator, case, monkeypatch, seed=seed)
            wrong.append(not bool(((y.double() - job.expected.value).abs() <= job.expected.bound).all()))
        except AssertionError:
            wrong.append(True)
    assert any(wrong)


# -- what is decided before a kernel runs -----------------------------------------------------------------
def test_refusals_say_why() -> None:
    job = CASES["vectors"].job
    assert METHOD.supports(job.layer, GPU) is None
    assert METHOD.supports(CASES["linear"].job.layer, GPU) is None
    assert METHOD.supports(job.layer, cpu(1)) == "runs on NVIDIA GPUs only"
    assert "1x1" in str(METHOD.supports(Job.of(ConvShape(1, 8, 9, 9, 8, 3, 3)).layer, GPU))
    assert "empty" in str(METHOD.supports(Job.of(ConvShape(0, 8, 9, 9, 8, 1, 1)).layer, GPU))


@pytest.mark.parametrize(
    "change",
    [
        {"vector": 2},
        {"lanes": 12},
        {"rows": 0},
        {"warps": 33},
        {"pieces": 4, "rows": 8},
        {"warps": 32, "pieces": 2},
        {"height": 17},
        {"height": 0},
        {"threshold": 0},
        {"tile": 0},
        {"longest": -1},
        {"order": "sorted"},
    ],
    ids=str,
)
def test_a_configuration_checks_itself(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"vector|lanes|sizes|registers|height|threshold|order"):
        replace(ENDS, **change)


@pytest.mark.parametrize(
    ("job", "config"),
    [
        (Job.of(SMALL), ENDS),
        (Job.of(ConvShape(1, 8, 14, 14, 8, 1, 1, (2, 2))), ENDS),
        (Job.of(ConvShape(4, 8, 1, 1, 8, 1, 1), kind="linear"), ENDS),
        (Job.of(LINE), replace(ENDS, vector=8)),
        (Job.of(ConvShape(1, 1, 1, 1, 70_000, 1, 1)), replace(ENDS, vector=1)),
    ],
    ids=["odd image", "stride", "linear", "32 bytes", "grid"],
)
def test_a_configuration_that_does_not_fit_the_layer_is_refused(job: Job, config: AsptConfig) -> None:
    with pytest.raises(ValueError, match=r"do not lie together|more than 16 bytes|more panels"):
        METHOD.candidate(job.segment, config)


SHAPES = {
    "14x14": (LINE, "conv2d"),
    "7x7": (SMALL, "conv2d"),
    "strided": (ConvShape(1, 64, 15, 14, 48, 1, 1, (2, 2)), "conv2d"),
    "groups": (ConvShape(2, 24, 4, 5, 18, 1, 1, groups=3), "conv2d"),
    "one pixel": (ConvShape(1, 3, 1, 1, 2, 1, 1), "conv2d"),
    "large": (ConvShape(1, 1024, 7, 7, 1024, 1, 1), "conv2d"),
    "linear": (ConvShape(9, 300, 1, 1, 31, 1, 1), "linear"),
    "one row": (ConvShape(1, 2048, 1, 1, 100, 1, 1), "linear"),
    "very wide": (ConvShape(2, 25088, 1, 1, 64, 1, 1), "linear"),
}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_candidates_pack_exactly(name: str, precision: Precision) -> None:
    shape, kind = SHAPES[name]
    job = Job.of(shape, Epilogue(bias=True), precision, kind, Case(shape, ENDS).weight)  # type: ignore[arg-type]
    found = METHOD.configs(job.segment, GPU)
    assert len({candidate.config for candidate in found}) == len(found) >= 8
    assert {candidate.config.order for candidate in found[:8]} == {"given", "dealt"}
    assert len({candidate.config.threshold for candidate in found[:24]}) > 1
    for candidate in found[:6]:
        assert from_json(AsptConfig, to_json(candidate.config)) == candidate.config
        packed = METHOD.pack(job.segment, job.parameters, candidate.config)
        assert torch.equal(METHOD.unpack(packed).to(job.weight.dtype).reshape(job.weight.shape), job.weight)


def test_the_first_guesses_fit_into_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load", lambda built: None)
    for (shape, kind), density in itertools.product(SHAPES.values(), (0.1, 9.0)):
        job = Job.of(shape, kind=kind, weight=Case(shape, ENDS, density=density).weight)  # type: ignore[arg-type]
        for candidate in METHOD.configs(job.segment, GPU)[:3]:
            METHOD.bind(job.segment, METHOD.pack(job.segment, job.parameters, candidate.config), b"x", GPU)


def test_too_much_shared_memory_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load", lambda built: None)
    shape = ConvShape(1, 1024, 16, 16, 64, 1, 1)
    job = Job.of(shape)
    config = AsptConfig(4, 32, 2, 1, 8, 8, 1, 1024)
    with pytest.raises(Unsupported, match="bytes of shared memory"):
        METHOD.bind(job.segment, METHOD.pack(job.segment, job.parameters, config), b"x", GPU)


def test_instances_are_those_the_kernel_has_and_cover_both_ends() -> None:
    names = [instance.expression for instance in cuda.instances()]
    assert len(set(names)) == len(names)
    assert {text.split(", ")[-1] for text in names} == {"true>", "false>"}
    assert all(dtype in "".join(names) for dtype in ("float", "__half", "__nv_bfloat16"))


def test_moving_a_packed_layer_keeps_it() -> None:
    job = CASES["divided rows"].job
    packed = METHOD.pack(job.segment, job.parameters, CASES["divided rows"].config)
    assert torch.equal(METHOD.unpack(moved(packed, torch.device("cpu"))), METHOD.unpack(packed))
