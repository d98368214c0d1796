"""The engine: the model's values, tensors that stay, many threads, and clear words for wrong inputs."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from contract.cases import OURS, Net, engine_of, engine_with, plan_with, program_of, sparse_weight, thin, work
from zeroskip.core.layer import ConvShape
from zeroskip.methods import registry
from zeroskip.methods.dense.cpu import ConvRun, OnednnRun
from zeroskip.model import zoo
from zeroskip.run.compile import distance
from zeroskip.run.engine import Engine, Variant


def conv(inputs: int = 8, outputs: int = 8, size: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **more)


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or (2, 8, 12, 11), generator=torch.Generator().manual_seed(seed))


def stack() -> nn.Module:
    torch.manual_seed(0)
    return thin(
        nn.Sequential(
            conv(),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            conv(),
            nn.Sigmoid(),
            conv(8, 12, 1),
            nn.Flatten(),
            nn.Linear(12 * 36, 5),
        ),
        0.2,
    )


def expect(model: nn.Module, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return model(*inputs)


# -- memory -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pick", [0, 1])
def test_what_was_read_for_the_last_time_is_let_go(pick: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def convolve(self: ConvRun, x: Tensor, residual: Tensor | None) -> Tensor:
        alive.append(sum(one() is not None for one in made))
        y = functional.conv2d(x, self.weight, self.bias, padding=1)
        made.append(weakref.ref(y))
        return y

    for kind in (ConvRun, OnednnRun):
        monkeypatch.setattr(kind, "compute", convolve)
    x = image()
    engine_with(nn.Sequential(*(conv() for _ in range(6))), x, pick=pick)(x)
    assert alive == [0, 1, 1, 1, 1, 1]


OUTPUTS = {
    "a layer": lambda net, x: net.a(x),
    "a layer that others read": lambda net, x: (lambda y: (y, net.b(y)))(net.a(x)),
    "an activated layer and its view": lambda net, x: (lambda y: (y.flatten(1), y[:, 2:5], net.b(y)))(net.a(x).relu()),
    "chunks": lambda net, x: (lambda y: (*y.chunk(2, 1), net.b(y)))(net.a(x)),
    "a view of a view": lambda net, x: (lambda y: (y.permute(0, 2, 3, 1)[0, 1:], net.b(y)))(net.a(x)),
    "a concatenation": lambda net, x: torch.cat([net.a(x), net.b(x)], 1),
    "a concatenation that others read": lambda net, x: (lambda y: (y, net.c(y)))(torch.cat([net.a(x), net.b(x)], 1)),
    "a part of a concatenation": lambda net, x: (lambda y: (y, net.c(torch.cat([y, net.b(x)], 1))))(net.a(x)),
    "a view of a concatenation": lambda net, x: (lambda y: (y[:, 3:11], net.c(y)))(torch.cat([net.a(x), net.b(x)], 1)),
    "pooled": lambda net, x: (lambda y: (functional.max_pool2d(y, 2), net.b(y)))(net.a(x)),
    "the same twice": lambda net, x: (lambda y: (y, y))(net.a(x)),
    "an input": lambda net, x: (x, net.a(x)),
    "a residual chain": lambda net, x: (lambda y: net.b(y) + y)(net.a(x) + x),
}


@pytest.mark.parametrize("pick", [0, 1, 5])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_right_and_never_overwritten(name: str, pick: int) -> None:
    torch.manual_seed(0)
    model = thin(Net(OUTPUTS[name], a=conv(), b=conv(), c=conv(16, 4)), 0.3)
    inputs = [image(seed=seed) for seed in range(3)]
    engine = engine_with(model, inputs[0], *OURS, pick=pick)
    found = [engine(x) for x in inputs]
    kept = [pytree.tree_map(torch.clone, one) for one in found]
    for x in inputs:
        engine(x * 2)
    for x, one, copy in zip(inputs, found, kept, strict=True):
        assert distance(one, expect(model, x)) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(copy), strict=True))


def test_what_the_caller_does_to_a_result_does_not_reach_the_engine() -> None:
    model, x = thin(Net(OUTPUTS["a concatenation that others read"], a=conv(), b=conv(), c=conv(16, 4)), 0.3), image()
    engine = engine_with(model, x, *OURS)
    want = pytree.tree_map(torch.clone, engine(x))
    for tensor in engine(x):
        tensor.fill_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(engine(x), want, strict=True))


def test_a_parameter_among_the_outputs_is_a_copy() -> None:
    model, x = thin(Net(lambda net, x: (net.a(x), net.a.bias), a=conv()), 0.3), image()
    engine = engine_with(model, x, *OURS)
    want = [tensor.detach().clone() for tensor in expect(model, x)]
    for tensor in engine(x):
        tensor.fill_(torch.nan)
    assert distance(engine(x), tuple(want)) < 1e-5


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x.clone(),
        lambda self, x: x,
        lambda self, x: (self.a(x), x),
        lambda self, x: {"one": (y := self.a(x)), "copy": y.clone(), "part": y[:, :2], "same": y},
    ],
)
def test_no_output_shares_memory_with_an_input_or_another_output(forward: Any) -> None:
    model, x = Net(forward, a=conv()).eval(), image()
    before, engine = x.clone(), engine_with(model, x)
    want = pytree.tree_leaves(expect(model, x))
    found = pytree.tree_leaves(engine(x))
    assert all(distance(a, b) < 1e-5 for a, b in zip(found, want, strict=True))
    for one in found:
        kept = [other.clone() for other in found if other is not one]
        one.fill_(7.0)
        assert all(torch.equal(a, b) for a, b in zip([o for o in found if o is not one], kept, strict=True))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.a(x).permute(0, 2, 3, 1).contiguous(),
        lambda self, x: torch.view_as_real(torch.view_as_complex(self.a(x).permute(0, 2, 3, 1)[..., :2].contiguous())),
        lambda self, x: self.a(x).permute(0, 2, 3, 1).contiguous().as_strided((5, 3), (3, 1)),
    ],
)
@pytest.mark.parametrize("pick", range(3))
def test_copies_that_say_how_values_lie_are_kept(forward: Any, pick: int) -> None:
    model, x = Net(forward, a=conv()).eval(), image()
    want, y = expect(model, x), engine_with(model, x, pick=pick)(x)
    assert distance(y, want) < 1e-5
    assert y.is_contiguous() == want.is_contiguous()


def test_the_input_is_not_changed() -> None:
    model, x = (
        thin(Net(lambda net, x: net.a(x).add_(x).relu_() + x.flatten(1).view_as(x).clone().relu_(), a=conv()), 0.3),
        image(),
    )
    before = x.clone()
    engine = engine_with(model, image(seed=2), *OURS)
    assert distance(engine(x), expect(model, before)) < 1e-5
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "twist",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 1)[:, :8],
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.requires_grad_(),
    ],
)
def test_inputs_of_any_strides_give_the_same(twist: Any) -> None:
    model, x = stack(), image()
    for prefer in ((), OURS):
        engine = engine_with(model, x, *prefer)
        assert distance(engine(twist(x.clone())), engine(x)) < 1e-6


@pytest.mark.parametrize("kind", ["slice", "transpose", "permuted image", "slice of a concatenation", "residual slice"])
def test_linear_layers_take_inputs_of_any_strides(kind: str) -> None:
    functions = {
        "slice": lambda net, x: net.a(x[:, :3]),
        "transpose": lambda net, x: net.a(x.transpose(1, 2)),
        "permuted image": lambda net, x: net.b(x.permute(0, 2, 3, 1)),
        "slice of a concatenation": lambda net, x: (lambda y, z: (net.a(y), torch.cat([y, z], 1).sin()))(
            net.c(x), net.d(x)
        ),
        "residual slice": lambda net, x: net.a(x[:, :3]) + x[:, 3:6],
    }
    model = thin(Net(functions[kind], a=nn.Linear(11, 11), b=nn.Linear(8, 5), c=conv(), d=conv()), 0.3)
    x = image()
    for pick in range(3):
        assert distance(engine_with(model, x, *OURS, pick=pick)(x), expect(model, x)) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pick", [0, 3])
def test_concatenations_are_free_and_right(batch: int, pick: int) -> None:
    torch.manual_seed(0)
    fire = thin(zoo.squeezenet1_1(num_classes=4).get_submodule("features")[3:6], 0.3)  # type: ignore[index]
    x = image(batch, 64, 13, 15)
    engine = engine_with(fire, x, *OURS, pick=pick)
    assert distance(engine(x), expect(fire, x)) < 1e-5
    (run,) = engine._executors.values()
    assert run._storage.joined, "no concatenation was written in place"


def test_layouts_may_change_from_layer_to_layer() -> None:
    """Every layer by another candidate: halos, channels_last and gapless planes meet."""
    torch.manual_seed(0)
    model = thin(
        nn.Sequential(conv(), nn.ReLU(), conv(8, 8, 1), conv(), conv(8, 8, 5), nn.MaxPool2d(2), conv(), conv(8, 8, 1)),
        0.3,
    )
    x = image()
    program = program_of(model, x)
    dense, ours = (plan_with(program, *prefer, pick=pick).steps for prefer, pick in (((), 0), (OURS, 0)))
    plain = plan_with(program, pick=1).steps
    want = expect(model, x)
    for mask in range(0, 729, 29):
        steps = []
        for index, choices in enumerate(zip(dense, ours, plain, strict=True)):
            steps.append(choices[mask // 3**index % 3])
        plan = replace(plan_with(program), steps=tuple(steps))
        assert distance(Engine([Variant(program, plan)], registry())(x), want) < 1e-5


# -- threads ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [1, 2])
def test_four_threads_at_once_give_the_bits_of_one(threads: int) -> None:
    model = stack()
    inputs = [image(seed=seed) for seed in range(4)]
    engine = engine_with(model, inputs[0], *OURS, threads=threads)
    want = [engine(x) for x in inputs]

    def repeat(index: int) -> bool:
        return all(torch.equal(engine(inputs[index]), want[index]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


def test_an_error_in_a_call_leaves_the_engine_usable() -> None:
    model, x = stack(), image()
    engine = engine_with(model, x, *OURS)
    want = engine(x)
    with pytest.raises(ValueError, match="compiled for"):
        engine(image(1, 8, 12, 11))
    assert torch.equal(engine(x), want)


# -- wrong inputs ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((image(1, 8, 12, 11),), r"compiled for inputs of shape 2x8x12x11, got 1x8x12x11.*\[example1, example2\]"),
        ((image(2, 8, 11, 12),), "got 2x8x11x12"),
        ((image(2, 8, 12),), "got 2x8x12"),
        ((), "got none"),
        ((image(), image()), "got 2x8x12x11, 2x8x12x11"),
        ((image().double(),), "takes torch.float32 on the cpu, got torch.float64"),
        ((image().int(),), "got torch.int32"),
        ((image().to("meta"),), "on meta"),
        (([1, 2],), "must be tensors, got"),
        ((None,), "must be tensors, got"),
    ],
)
def test_wrong_inputs_are_told_apart(inputs: tuple[Any, ...], words: str) -> None:
    engine = engine_with(stack(), image())
    with pytest.raises(ValueError, match=words):
        engine(*inputs)


def test_several_shapes_live_in_one_engine() -> None:
    model = thin(nn.Sequential(conv(), nn.ReLU(), conv()), 0.3)
    shapes = [(1, 8, 9, 9), (3, 8, 9, 9), (1, 8, 16, 5)]
    programs = [program_of(model, image(*shape)) for shape in shapes]
    engine = Engine([Variant(program, plan_with(program, *OURS)) for program in programs], registry())
    for shape in shapes:
        assert distance(engine(image(*shape)), expect(model, image(*shape))) < 1e-5
    assert [plan.input_shapes[0] for plan in engine.plans] == shapes
    with pytest.raises(ValueError, match="1x8x9x9; 3x8x9x9; 1x8x16x5, got 2x8x9x9"):
        engine(image(2, 8, 9, 9))


def test_an_empty_batch_runs() -> None:
    model, x = stack(), torch.empty(0, 8, 12, 11)
    assert engine_with(model, x, *OURS)(x).shape == (0, 5)


# -- an engine is a module ------------------------------------------------------------------------------------
def test_an_engine_is_a_module_that_shows_its_plan() -> None:
    engine = engine_with(stack(), image(), *OURS)
    assert isinstance(engine, nn.Module)
    assert "2x8x12x11" in repr(engine)
    assert list(engine.parameters()) == []


def test_no_gradient_is_recorded() -> None:
    x = image().requires_grad_()
    assert not engine_with(stack(), x)(x).requires_grad


def test_one_layer_engines_agree_with_the_oracle() -> None:
    """From a hand-made program, without any tracing."""
    shape = ConvShape(2, 8, 9, 7, 6, 3, 3, padding=(1, 1))
    job = work(shape, weight=sparse_weight(shape.weight_shape, 0.2), residual="before", activation="relu6")
    x, r = image(2, 8, 9, 7), image(2, 6, 9, 7)
    want = functional.relu6(functional.conv2d(x, job.parameters["weight"], job.parameters["bias"], padding=1) + r)
    assert distance(engine_of(job.program, *OURS)(x, r), want) < 1e-6
