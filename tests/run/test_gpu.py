"""Whole networks on the GPU: the values of torch, the same bits at every call, whatever streams and threads do."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import zeroskip
from contract.cases import OURS, Net, engine_of, engine_with, plan_with, program_of, thin
from run.networks import small
from zeroskip.cli.main import app
from zeroskip.core.graph import CONV, LINEAR
from zeroskip.core.layer import PRECISION_DTYPES, Precision
from zeroskip.model.zoo import BUILDERS
from zeroskip.plan.plan import Plan
from zeroskip.run.confirm import distance
from zeroskip.run.engine import Engine

pytestmark = pytest.mark.gpu

KERNELS = tuple(name for name in OURS if not name.startswith("cu"))
"""The methods that are no vendor's library."""
CLOSE: dict[Precision, float] = {"fp32": 1e-5, "tf32": 2e-2, "fp16": 2e-2}


def stack() -> nn.Module:
    """Layers of most kinds: a dense stem, 1x1 and depthwise ones, a pooling, a residual, a linear one."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.relu(net.stem(x))  # type: ignore[operator]
        y = torch.relu(net.depthwise(net.wide(x)))  # type: ignore[operator]
        x = torch.relu(net.narrow(y) + x)  # type: ignore[operator]
        return net.last(nn.functional.max_pool2d(x, 2).flatten(1))  # type: ignore[operator,no-any-return]

    torch.manual_seed(0)
    model = Net(
        forward,
        stem=nn.Conv2d(3, 16, 3, padding=1),
        wide=nn.Conv2d(16, 64, 1),
        depthwise=nn.Conv2d(64, 64, 3, padding=1, groups=64),
        narrow=nn.Conv2d(64, 16, 1),
        last=nn.Linear(16 * 7 * 7, 10),
    )
    return thin(model, 0.2).cuda()


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_with(stack(), image(), *KERNELS)


@pytest.fixture(scope="module", params=KERNELS)
def each_engine(request: pytest.FixtureRequest) -> Engine:
    """Every method of ours runs what it can of the network."""
    made = engine_with(stack(), image(), request.param, *KERNELS)
    assert request.param in {step.method for step in made.plan.steps}
    return made


def bits(x: Tensor) -> Tensor:
    """Of float32: 0 and -0 differ."""
    return x.view(torch.int32)


# -- values ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("precision", CLOSE)
@pytest.mark.parametrize("prefer", [(), KERNELS, OURS], ids=["dense", "kernels", "all"])
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v1"])
def test_networks_equal_torch(name: str, prefer: tuple[str, ...], precision: Precision, batch: int) -> None:
    model, x = small(name, batch)
    thin(model, 0.1)
    model, x = model.to("cuda", PRECISION_DTYPES[precision]), x.to("cuda", PRECISION_DTYPES[precision])
    with torch.no_grad():
        want, exact = model(x), copy.deepcopy(model).double()(x.double())
    program = program_of(model, x).with_tf32((CONV, LINEAR) if precision == "tf32" else ())
    engine = engine_of(program, *prefer)
    assert engine.plan.precision == precision
    # A random network may amplify rounding: then the engine may be as far from the truth as torch is.
    bound = max(CLOSE[precision], 4 * distance(want, exact))
    for _ in range(3):
        y = engine(x)
        assert y.dtype == want.dtype
        assert distance(y, exact) < bound
    if prefer:
        assert {step.method for step in engine.plan.steps} & set(prefer)


def test_a_part_of_a_concatenation_that_starts_anywhere() -> None:
    """Slab copies runs of 16 bytes; the part that ``narrow`` reads starts after 75 numbers."""

    def forward(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = net.a(x), net.b(x)  # type: ignore[operator]
        return net.narrow(b), net.last(torch.cat([a, b], 1))  # type: ignore[operator]

    parts = {"a": nn.Conv2d(4, 3, 1), "b": nn.Conv2d(4, 16, 1), "narrow": nn.Conv2d(16, 8, 1)}
    model, x = thin(Net(forward, **parts, last=nn.Conv2d(19, 8, 1)), 0.5).cuda(), torch.randn(2, 4, 5, 5).cuda()
    engine = engine_with(model, x, "slab")
    assert {step.method for step in engine.plan.steps} == {"slab"}
    assert next(step for step in engine.plan.steps if "narrow" in step.nodes[0]).config["mode"] == "runs"
    with torch.no_grad():
        for y, want in zip(engine(x), model(x), strict=True):
            assert distance(y, want) < CLOSE["fp32"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_compiles_from_end_to_end(dtype: torch.dtype, quick: None) -> None:
    model, x = stack().to(dtype), image().to(dtype)
    engine = zeroskip.compile(model, x)
    with torch.no_grad():
        assert distance(engine(x), model(x)) < {torch.float32: 2e-2, torch.float16: 2e-2}.get(dtype, 1e-1)
    plan = engine.plan
    assert plan.device.kind == "cuda"
    assert torch.cuda.get_device_name() in str(plan)
    assert not [note for note in plan.notes if "graph" in note]
    assert plan.confirmation is not None
    assert plan.confirmation.engine_us <= plan.confirmation.dense_engine_us
    assert len(plan.steps) == 5
    again = zeroskip.compile(model, x, plan=plan)
    assert torch.equal(again(x), engine(x))


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_precision_is_what_was_asked_for_whatever_torch_says_later(precision: str, quick: None, tmp_path: Path) -> None:
    model, x = stack(), image()
    engine = zeroskip.compile(model, x, precision=precision)  # type: ignore[arg-type]
    assert engine.plan.precision == precision
    engine.save(tmp_path / "model.zsk")
    want, matmul, conv = engine(x), torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    torch.cuda.synchronize()
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            matmul.fp32_precision = conv.fp32_precision = setting
            with torch.cuda.stream(torch.cuda.Stream()):
                assert torch.equal(zeroskip.load(tmp_path / "model.zsk")(x), want)
                assert torch.equal(engine(x), want)
    finally:
        matmul.fp32_precision, conv.fp32_precision = before
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    if precision == "fp32":
        assert distance(want, exact) < 1e-5


# -- the same bits ----------------------------------------------------------------------------------------------
def test_a_thousand_replays_give_the_same_bits(each_engine: Engine) -> None:
    x = image()
    want = bits(each_engine(x))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        wrong += (bits(each_engine(x)) != want).sum()
    assert int(wrong) == 0


def test_a_replay_has_the_bits_of_the_calls_it_was_captured_from(engine: Engine) -> None:
    from zeroskip.run.graphs import in_capture_thread

    x = image(3)
    (run,) = engine._executors.values()
    assert torch.equal(engine(x), in_capture_thread(lambda: run((x,))))


def test_four_threads_on_four_streams_give_the_bits_of_one(each_engine: Engine) -> None:
    inputs = [image(seed) for seed in range(4)]
    want = [bits(each_engine(x)) for x in inputs]
    torch.cuda.synchronize()

    def repeat(index: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [each_engine(inputs[index]) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
            return all(torch.equal(bits(result), want[index]) for result in results)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


def test_threads_on_one_stream_take_turns(engine: Engine) -> None:
    inputs = [image(seed) for seed in range(4)]
    want = [engine(x) for x in inputs]

    def repeat(index: int) -> bool:
        results = [engine(inputs[index]) for _ in range(50)]
        return all(torch.equal(result, want[index]) for result in results)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


def test_inputs_may_lie_anywhere(engine: Engine) -> None:
    kept = []
    for seed in range(20):
        x = image(seed)
        want = engine(x)
        kept.append(torch.empty(seed * 1000, device="cuda"))
        for other in (x.clone(), x.contiguous(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 1]):
            assert torch.equal(engine(other), want)
        assert torch.equal(engine(x.requires_grad_()), want)


def test_outputs_are_never_overwritten(engine: Engine) -> None:
    results = [engine(image(seed)) for seed in range(5)]
    copies = [result.clone() for result in results]
    for seed in range(20):
        engine(image(seed + 100))
    assert all(torch.equal(result, copy) for result, copy in zip(results, copies, strict=True))


def test_the_callers_modes_do_not_change_the_values() -> None:
    model = stack()
    want = engine_with(model, image(), *KERNELS)(image())
    for mode in (torch.inference_mode(), torch.autocast("cuda", torch.float16), torch.no_grad()):
        engine = engine_with(model, image(), *KERNELS)
        with mode:
            assert torch.equal(engine(image()), want)
        assert torch.equal(engine(image()), want)


# -- inside other captures --------------------------------------------------------------------------------------
def test_an_engine_can_be_part_of_the_callers_graph(engine: Engine) -> None:
    x = image()
    engine(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = engine(x * 2) + 1
    other = torch.cuda.Stream()
    for seed in range(10):
        z = image(seed)
        want = engine(z * 2) + 1
        x.copy_(z)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            meanwhile = [engine(z) for _ in range(5)]
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, want)
        assert all(torch.equal(one, meanwhile[0]) for one in meanwhile)


def test_several_captures_one_after_the_other_do_not_share_memory(engine: Engine) -> None:
    inputs, graphs, outputs = [image(seed) for seed in range(3)], [], []
    want = [engine(x) for x in inputs]
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(engine(x))
        graphs.append(graph)
    torch.cuda.synchronize()
    for _ in range(20):
        for graph in graphs:
            with torch.cuda.stream(torch.cuda.Stream()):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, right) for y, right in zip(outputs, want, strict=True))


# -- what cannot be captured ------------------------------------------------------------------------------------
def waiting() -> nn.Module:
    return thin(
        Net(lambda net, x: net.b(net.a(x).cpu().cuda()), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1)), 0.5
    ).cuda()


def test_a_model_that_waits_for_the_gpu_runs_without_a_graph() -> None:
    model, x = waiting(), image()
    engine = engine_with(model, x, *KERNELS)
    with pytest.warns(UserWarning, match=r"without a CUDA graph.*another device"):
        first = engine(x)
    with torch.no_grad():
        assert distance(first, model(x)) < 2e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(engine(x), first)


def test_a_model_that_waits_for_the_gpu_compiles_and_its_plan_says_so(quick: None) -> None:
    engine = zeroskip.compile(waiting(), image())
    assert any("without a CUDA graph" in note for note in engine.plan.notes)
    assert engine.plan.confirmation is not None


FAILING = """
import sys, torch
sys.path[:0] = {paths!r}
from run import test_gpu as tests
from zeroskip.run import graphs
good = tests.engine_with(tests.stack(), tests.image())
graphs.obstacle = lambda program: None
model, x = tests.waiting(), tests.image()
engine = tests.engine_with(model, x)
want = tests.engine_with(tests.stack(), tests.image())(x)
for _ in range(3):
    with torch.no_grad():
        assert tests.distance(engine(x), model(x)) < 2e-2
assert torch.equal(good(x), want)
print("right")
"""


def test_a_capture_that_fails_unforeseen_falls_back() -> None:
    """In a process of its own: torch's allocator may not get over it."""
    tests, source = Path(__file__).parents[1], Path(zeroskip.__file__).parents[1]
    code = FAILING.format(paths=[str(tests), str(source)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.strip().endswith("right"), done.stderr
    assert "this engine runs without a CUDA graph" in done.stderr


# -- files and wrong arguments ----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_engine_comes_back_to_the_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = stack().to(dtype), image().to(dtype)
    engine = engine_with(model, x, *KERNELS)
    engine.save(tmp_path / "model.zsk")
    for device in (None, "cuda", torch.device("cuda", torch.cuda.current_device())):
        again = zeroskip.load(tmp_path / "model.zsk", device)
        assert again.plans == engine.plans
        assert all(tensor.is_cuda for tensor in again.variants[0].program.tensors.values())
        assert torch.equal(again(x), engine(x))
    with pytest.raises(ValueError, match=r"compiled for cuda .* not for cpu"):
        zeroskip.load(tmp_path / "model.zsk", "cpu")


def test_a_cpu_file_stays_on_the_cpu(tmp_path: Path) -> None:
    engine_with(stack().cpu(), image().cpu()).save(tmp_path / "model.zsk")
    assert zeroskip.load(tmp_path / "model.zsk").device.type == "cpu"
    with pytest.raises(ValueError, match=r"compiled for cpu .* not for cuda"):
        zeroskip.load(tmp_path / "model.zsk", "cuda")


def test_model_and_example_must_be_together() -> None:
    with pytest.raises(ValueError, match=r"the model is on \['cpu'\], the example on cuda:0: use model.to\('cuda:0'\)"):
        zeroskip.compile(stack().cpu(), image())
    with pytest.raises(ValueError, match=r"the model is on \['cuda:0'\], the example on cpu"):
        zeroskip.compile(stack(), image().cpu())
    with pytest.raises(ValueError, match="threads are a choice for the CPU"):
        zeroskip.compile(stack(), image(), threads=1)
    with pytest.raises(ValueError, match=r"made for cpu .*the model is on cuda"):
        zeroskip.compile(stack(), image(), plan=plan_with(program_of(stack().cpu(), image().cpu())))


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="one GPU here")
def test_an_example_on_another_gpu_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"the current GPU is cuda:0: call torch.cuda.set_device\(1\) first"):
        zeroskip.compile(stack().to("cuda:1"), image().to("cuda:1"))


def test_inputs_elsewhere_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"takes torch.float32 on cuda:0, got torch.float32 on cpu"):
        engine(image().cpu())
    with pytest.raises(ValueError, match=r"got torch.float16"):
        engine(image().half())


def test_an_empty_batch_runs() -> None:
    x = torch.empty(0, 3, 14, 14, device="cuda")
    assert engine_with(stack(), x)(x).shape == (0, 10)


# -- the command line -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compile_and_run_from_the_command_line(
    dtype: str, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILDERS, "tiny", lambda: stack().cpu())
    shape, file, plan = ("--shape", "2,3,14,14"), str(tmp_path / "m.zsk"), tmp_path / "plan.json"
    wanted = ("--precision", "tf32") if dtype == "float32" else ()
    arguments = ["compile", "tiny", *shape, "--device", "cuda", "--dtype", dtype, *wanted, "--out", file]
    done = CliRunner().invoke(app, [*arguments, "--plan", str(plan)])
    assert done.exit_code == 0, done.output
    assert Plan.read(plan).precision == ("tf32" if dtype == "float32" else "bf16")
    done = CliRunner().invoke(app, ["run", file, "--repeat", "2", "--json", "--output", str(tmp_path / "y.npy")])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["output"] == f"2x10 {dtype}"
    assert facts["device"] == torch.cuda.get_device_name()
    assert CliRunner().invoke(app, ["run", file, "--device", "cpu"]).exit_code == 1
