"""Graphs, streams and memory of an engine on a GPU, with a GPU that is none."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zeroskip
from contract.cases import Net, plan_with, program_of, thin
from run.fake_gpu import H100, FakeGpu, Stream
from zeroskip.core.errors import FileFormatError
from zeroskip.core.graph import Graph, Node, Ref, Value
from zeroskip.core.layer import Precision
from zeroskip.measure import others
from zeroskip.methods import registry
from zeroskip.model.program import Program
from zeroskip.run import compile as compile_module
from zeroskip.run.confirm import distance
from zeroskip.run.engine import Engine, Variant
from zeroskip.run.executor import _rest
from zeroskip.run.graphs import in_capture_thread, obstacle


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


def stack() -> nn.Module:
    torch.manual_seed(0)
    return thin(
        nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 1),
            nn.Flatten(),
            nn.Linear(180, 5),
        ),
        0.3,
    )


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 8, 12, 11, generator=torch.Generator().manual_seed(seed))


def expect(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def engine_on_gpu(model: nn.Module, *inputs: Tensor) -> Engine:
    program = program_of(model, *inputs)
    return Engine([Variant(program, plan_with(program, device=H100))], registry())


def test_a_graph_per_stream_runs_every_later_call(gpu: FakeGpu) -> None:
    model = stack()
    engine = engine_on_gpu(model, image())
    for seed in range(4):
        assert distance(engine(image(seed)), expect(model, image(seed))) < 1e-5
    assert gpu.captured == [0]
    for handle in (7, 8, 7):
        with torch.cuda.stream(Stream(handle)):  # type: ignore[arg-type]
            assert distance(engine(image(9)), expect(model, image(9))) < 1e-5
    assert gpu.captured == [0, 7, 8]


def test_outputs_are_never_overwritten(gpu: FakeGpu) -> None:
    engine = engine_on_gpu(stack(), image())
    results = [engine(image(seed)) for seed in range(3)]
    kept = [result.clone() for result in results]
    for seed in range(3, 9):
        engine(image(seed))
    assert all(torch.equal(result, copy) for result, copy in zip(results, kept, strict=True))
    assert len({result.data_ptr() for result in results}) == 3


def test_every_shape_of_output_is_copied(gpu: FakeGpu) -> None:
    model = thin(Net(lambda net, x: {"y": (net.a(x), [net.a(x).sum(), x]), "none": None}, a=nn.Conv2d(8, 4, 1)), 0.5)
    engine, x = engine_on_gpu(model, image()), image(4)
    engine(image())
    got = engine(x)
    with torch.no_grad():
        want = model(x)
    assert distance(got, want) < 1e-5
    assert got["y"][1][1] is not x
    assert got["none"] is None


def test_inputs_of_any_strides_that_want_gradients_are_taken(gpu: FakeGpu) -> None:
    model = stack()
    engine = engine_on_gpu(model, image())
    x = image(2).contiguous(memory_format=torch.channels_last).requires_grad_()
    for _ in range(2):
        y = engine(x)
        assert not y.requires_grad
        assert distance(y, expect(model, x.detach())) < 1e-5


def test_inference_mode_at_the_first_call_does_not_bind_later_ones(gpu: FakeGpu) -> None:
    model = stack()
    engine = engine_on_gpu(model, image())
    with torch.inference_mode():
        engine(image())
    assert distance(engine(image(1)), expect(model, image(1))) < 1e-5
    with gpu.capturing(), torch.inference_mode():
        engine(image())
    assert distance(engine(image(1)), expect(model, image(1))) < 1e-5


def test_threads_on_one_stream_take_turns_and_on_several_do_not_meet(gpu: FakeGpu) -> None:
    engine = engine_on_gpu(stack(), image())
    want = [engine(image(seed)) for seed in range(4)]

    def repeat(index: int) -> bool:
        with torch.cuda.stream(Stream(index // 2)):  # type: ignore[arg-type]
            return all(torch.equal(engine(image(index)), want[index]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))
    assert sorted(gpu.captured) == [0, 1]


def test_inside_a_capture_of_the_callers_nothing_is_captured_and_no_memory_is_shared(gpu: FakeGpu) -> None:
    model = stack()
    engine = engine_on_gpu(model, image())
    (run,) = engine._executors.values()
    with gpu.capturing():
        assert distance(engine(image(1)), expect(model, image(1))) < 1e-5
    assert gpu.captured == []
    assert not any(run._pools.values())


def test_a_capture_that_fails_falls_back_and_says_why_once(gpu: FakeGpu) -> None:
    model = stack()
    engine = engine_on_gpu(model, image())
    gpu.fails = RuntimeError("operation not permitted when stream is capturing\nand more")
    with pytest.warns(UserWarning, match=r"without a CUDA graph.*RuntimeError: operation not permitted[^\n]*$"):
        first = engine(image())
    gpu.fails = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(engine(image()), first)
        with torch.cuda.stream(Stream(5)):  # type: ignore[arg-type]
            assert torch.equal(engine(image()), first)
    assert distance(first, expect(model, image())) < 1e-5
    assert gpu.captured == []


def test_memory_for_calls_without_a_graph_stays_with_its_stream(gpu: FakeGpu) -> None:
    engine = engine_on_gpu(stack(), image())
    (run,) = engine._executors.values()
    for handle in (0, 3, 0, 3):
        with torch.cuda.stream(Stream(handle)):  # type: ignore[arg-type]
            run((image(),))
    assert {handle: len(pool) for handle, pool in run._pools.items()} == {0: 1, 3: 1}


def test_running_out_of_memory_is_no_reason_to_go_without_a_graph(gpu: FakeGpu) -> None:
    engine = engine_on_gpu(stack(), image())
    gpu.fails = torch.OutOfMemoryError("too large")
    with pytest.raises(torch.OutOfMemoryError):
        engine(image())
    gpu.fails = None
    engine(image())
    assert gpu.captured == [0]


def test_the_capture_thread_is_one_and_may_be_asked_from_within() -> None:
    with pytest.MonkeyPatch.context() as patch:
        FakeGpu(patch)
        names = {in_capture_thread(lambda: threading.current_thread().name) for _ in range(3)}
        nested = in_capture_thread(lambda: in_capture_thread(lambda: threading.current_thread().name))
    assert names == {nested}
    assert nested != threading.current_thread().name


def one_node(op: str, *args: object) -> Program:
    node = Node("n", op, (Ref("x"), *args))
    return Program(Graph(("x",), Ref("n"), (node,), {"x": Value((3,), "float32"), "n": Value((3,), "float32")}, {}), {})


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (one_node("aten.nonzero.default"), "waits for a value"),
        (one_node("aten.masked_select.default", Ref("x")), "waits for a value"),
        (one_node("aten.to.device", torch.device("cpu"), torch.float32), "another device"),
        (one_node("aten.relu.default"), None),
        (one_node("aten.to.device", torch.device("cuda:0"), torch.float32), None),
    ],
)
def test_what_cannot_be_captured_is_known_before(program: Program, words: str | None) -> None:
    found = obstacle(program)
    assert (found is None) if words is None else (found is not None and words in found)


def test_an_obstacle_is_not_even_tried(gpu: FakeGpu) -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.a(x).to("cpu", torch.float64).float()  # type: ignore[operator,union-attr,no-any-return]

    model = thin(Net(forward, a=nn.Conv2d(8, 4, 1)), 0.5)
    engine = engine_on_gpu(model, image())
    with pytest.warns(UserWarning, match="works on another device"):
        assert distance(engine(image()), expect(model, image())) < 1e-5


# -- precision ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ops", "precisions", "rest"),
    [
        ((), "fp32", "fp32"),
        (("conv2d",), "fp32/tf32", "fp32"),
        (("conv2d", "linear"), "tf32", "tf32"),
    ],
)
def test_precision_is_held_per_layer_and_for_the_rest(ops: tuple[str, ...], precisions: str, rest: Precision) -> None:
    program = program_of(stack(), image()).with_tf32(ops)
    assert program.precisions == precisions
    assert _rest(program) == rest
    half = program_of(stack().bfloat16(), image().bfloat16()).with_tf32(("conv2d", "linear"))
    assert half.precisions == "bf16"


def test_torchs_settings_at_the_call_do_not_matter_and_come_back(gpu: FakeGpu) -> None:
    seen: list[str] = []

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.a(x)  # type: ignore[operator,no-any-return]

    program = program_of(thin(Net(forward, a=nn.Conv2d(8, 4, 1)), 0.5), image()).with_tf32(("conv2d",))
    engine = Engine([Variant(program, plan_with(program, device=H100))], registry())
    (run,) = engine._executors.values()
    inner = run._calls[0]
    run._calls[0] = lambda slots: (seen.append(torch.backends.cuda.matmul.fp32_precision), inner(slots))[1]  # type: ignore[func-returns-value]
    before = torch.backends.cuda.matmul.fp32_precision
    engine(image())
    assert set(seen) == {"tf32"}
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_the_file_keeps_the_precision(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(stack(), image()).with_tf32(("conv2d",))
    engine = Engine([Variant(program, plan_with(program, device=H100))], registry())
    engine.save(tmp_path / "model.zsk")
    gpu.may_be_loaded_for(monkeypatch)
    again = zeroskip.load(tmp_path / "model.zsk")
    assert again.variants[0].program.graph == program.graph
    assert again.plan.precision == "fp32/tf32"
    assert torch.equal(again(image()), engine(image()))


# -- compile ----------------------------------------------------------------------------------------------------
@pytest.fixture
def compiling(gpu: FakeGpu, quick: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """``zeroskip.compile`` believes that example and model are on the GPU."""
    monkeypatch.setattr(compile_module, "this_gpu", lambda: H100)
    monkeypatch.setattr(others, "_of", lambda device: None)
    monkeypatch.setattr(compile_module, "_device", lambda model, inputs: torch.device("cuda", 0))
    return gpu


def test_a_model_compiles_for_the_gpu(compiling: FakeGpu) -> None:
    model = stack()
    engine = zeroskip.compile(model, image(), methods=["dense"], precision="fp32")
    assert distance(engine(image(1)), expect(model, image(1))) < 1e-5
    assert engine.plan.device.kind == "cuda"
    assert engine.plan.precision == "fp32"
    assert engine.plan.confirmation is not None
    assert engine.plan.notes == ()
    assert f"{H100.name}, fp32, inputs 2x8x12x11" in str(engine.plan)
    assert "thread" not in str(engine.plan)


@pytest.mark.parametrize(("precision", "found"), [("tf32", "tf32"), (None, "fp32/tf32")])
def test_precision_comes_from_the_argument_or_from_torch(
    compiling: FakeGpu, monkeypatch: pytest.MonkeyPatch, precision: str | None, found: str
) -> None:
    monkeypatch.setattr(compile_module, "of_torch", lambda kind: "tf32" if kind == "conv2d" else "fp32")
    engine = zeroskip.compile(stack(), image(), methods=["dense"], precision=precision)  # type: ignore[arg-type]
    assert engine.plan.precision == found


def test_a_model_that_cannot_be_captured_is_compiled_and_the_plan_says_so(compiling: FakeGpu) -> None:
    compiling.fails = RuntimeError("it waits")
    engine = zeroskip.compile(stack(), image(), methods=["dense"])
    assert engine.plan.notes == ("runs without a CUDA graph: RuntimeError: it waits",)
    assert engine.plan.confirmation is not None


def test_threads_are_refused_on_the_gpu(compiling: FakeGpu) -> None:
    with pytest.raises(ValueError, match="threads are a choice for the CPU"):
        zeroskip.compile(stack(), image(), threads=2)


@pytest.mark.parametrize(
    ("precision", "dtype", "words"),
    [
        ("fp16", torch.float32, r"'fp32' or 'tf32'.*model.half\(\)"),
        ("tf32", torch.float16, r"is about float32, the example is \['torch.float16'\]"),
        ("tf32", torch.float32, "TF32 is a precision of NVIDIA GPUs"),
    ],
)
def test_a_precision_that_cannot_be_is_refused(precision: str, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        zeroskip.compile(stack().to(dtype), image().to(dtype), precision=precision)  # type: ignore[arg-type]


def test_a_plan_for_another_precision_is_refused_unless_asked_to_measure_again(compiling: FakeGpu) -> None:
    plan = zeroskip.compile(stack(), image(), methods=["dense"], precision="fp32").plan
    with pytest.raises(ValueError, match=r"layers in fp32, the model has them in tf32"):
        zeroskip.compile(stack(), image(), plan=plan, precision="tf32")
    again = zeroskip.compile(stack(), image(), plan=plan, precision="tf32", replan=True, methods=["dense"])
    assert again.plan.precision == "tf32"


# -- other devices --------------------------------------------------------------------------------------------
def test_a_plan_of_another_gpu_runs_with_a_warning_or_is_measured_again(compiling: FakeGpu) -> None:
    model = stack()
    plan = zeroskip.compile(model, image(), methods=["dense"], precision="fp32").plan
    other = replace(plan, device=replace(plan.device, name="another GPU", arch="sm_80"))
    with pytest.warns(UserWarning, match="made on another GPU and runs on a GPU"):
        engine = zeroskip.compile(model, image(), plan=other, precision="fp32")
    assert distance(engine(image()), expect(model, image())) < 1e-5
    again = zeroskip.compile(model, image(), plan=other, precision="fp32", replan=True, methods=["dense"])
    assert again.plan.device.name == H100.name


def test_a_plan_of_another_gpu_that_does_not_bind_here_says_what_to_do(gpu: FakeGpu) -> None:
    program = program_of(stack(), image())
    plan = plan_with(program, device=H100)
    steps = tuple(replace(step, config={**step.config, "library": "onednn", "order": "nhwc"}) for step in plan.steps)
    other = replace(plan, device=replace(H100, name="another GPU"), steps=steps)
    with pytest.raises(ValueError, match=r"onednn|another GPU"):
        Engine([Variant(program, other)], registry())


def test_a_plan_for_another_kind_of_device_is_refused(compiling: FakeGpu) -> None:
    program = program_of(stack(), image())
    with pytest.raises(ValueError, match=r"made for cpu .*the model is on cuda: move"):
        zeroskip.compile(stack(), image(), plan=plan_with(program))


def test_a_file_for_a_gpu_says_what_to_do_without_one(tmp_path: Path) -> None:
    program = program_of(stack(), image())
    with pytest.MonkeyPatch.context() as patch:
        FakeGpu(patch).may_be_loaded_for(patch)
        Engine([Variant(program, plan_with(program, device=H100))], registry()).save(tmp_path / "model.zsk")
        with pytest.raises(FileFormatError, match=r"compiled for cuda .*, not for cpu"):
            zeroskip.load(tmp_path / "model.zsk", "cpu")
        assert zeroskip.load(tmp_path / "model.zsk", "cuda").plan.device.kind == "cuda"
    if not torch.cuda.is_available():
        with pytest.raises(FileFormatError, match=r"compiled for cuda \(a GPU\) and torch finds no NVIDIA GPU"):
            zeroskip.load(tmp_path / "model.zsk")
