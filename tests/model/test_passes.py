"""Each rewrite does its work where it may and leaves values alone everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.cases import OURS, Net, engine_of, program_of, thin
from zeroskip.core.graph import CONV, LINEAR
from zeroskip.model.passes import PASSES, simplify, steps
from zeroskip.model.passes.fold_batch_norm import BATCH_NORM
from zeroskip.model.program import Program
from zeroskip.model.trace import trace
from zeroskip.run.compile import distance


def conv(inputs: int = 4, outputs: int = 4, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 9, 8), generator=torch.Generator().manual_seed(1))


def simplified(function: Callable[..., Any], *inputs: Tensor, **modules: nn.Module) -> Program:
    """The program after all passes, checked to compute what the model computes, dense and with sparse methods."""
    inputs = inputs or (image(),)
    torch.manual_seed(0)
    model = thin(Net(function, **modules), 0.4)
    with torch.no_grad():
        want = model(*inputs)
    program = program_of(model, *inputs)
    for prefer in ((), OURS):
        assert distance(engine_of(program, *prefer)(*inputs), want) < 1e-5
    return program


def ops(program: Program) -> list[str]:
    return [node.op for node in program.graph.nodes]


def fused(program: Program) -> list[tuple[str, str]]:
    """Activation and residual of each layer, in order."""
    return [(node.conv.activation, node.conv.residual) for node in program.graph.nodes if node.conv is not None]


# -- batch norm ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", [{}, {"affine": False}, {"eps": 0.5}])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_is_folded(norm: dict[str, Any], bias: bool) -> None:
    program = simplified(lambda net, x: net.n(net.a(x)), a=conv(bias=bias), n=nn.BatchNorm2d(4, **norm))
    assert ops(program) == [CONV]
    assert program.layers()["a"].epilogue.bias


def test_batch_norm_after_a_linear_layer_is_folded() -> None:
    program = simplified(lambda net, x: net.n(net.a(x)), image(5, 8), a=nn.Linear(8, 6), n=nn.BatchNorm1d(6))
    assert ops(program) == [LINEAR]


def test_batch_norm_over_time_after_a_linear_layer_is_not_folded() -> None:
    """There the channels of the norm are the steps of the sequence."""
    program = simplified(lambda net, x: net.n(net.a(x)), image(5, 6, 8), a=nn.Linear(8, 6), n=nn.BatchNorm1d(6))
    assert ops(program)[:2] == [LINEAR, BATCH_NORM]


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: (lambda y: net.n(y) + y)(net.a(x)),
        lambda net, x: (lambda y: (net.n(y), y))(net.a(x)),
        lambda net, x: (lambda y: net.n(y) * net.m(y))(net.a(x)),
        lambda net, x: net.n(net.a(x).relu()),
        lambda net, x: net.n(x) + net.a(x),
    ],
)
def test_a_convolution_with_other_readers_is_not_folded(function: Callable[..., Any]) -> None:
    assert BATCH_NORM in ops(simplified(function, a=conv(), n=nn.BatchNorm2d(4), m=nn.BatchNorm2d(4)))


def test_a_shared_convolution_with_two_norms_is_folded_twice() -> None:
    program = simplified(
        lambda net, x: net.m(net.a(net.n(net.a(x)))), a=conv(), n=nn.BatchNorm2d(4), m=nn.BatchNorm2d(4)
    )
    assert ops(program) == [CONV, CONV]
    first, second = (program.tensors[node.args[1].ref] for node in program.graph.nodes)
    assert not torch.equal(first, second)


def test_norms_by_the_batchs_own_statistics_run_in_torch() -> None:
    program = simplified(lambda net, x: net.n(net.a(x)), a=conv(), n=nn.BatchNorm2d(4, track_running_stats=False))
    assert len(ops(program)) > 1


def test_norms_whose_statistics_are_inputs_run_in_torch() -> None:
    program = simplified(
        lambda net, x, mean, var: functional.batch_norm(net.a(x), mean, var),
        image(),
        image(4),
        image(4).abs(),
        a=conv(),
    )
    assert BATCH_NORM in ops(program)


EPS = 2.0**-17  # exact in float32; torch 2.11 refuses 0


@pytest.mark.parametrize("variance", [-EPS, 0.0, 1e30, torch.inf, torch.nan])
def test_zeros_stay_zeros_whatever_the_statistics_are(variance: float) -> None:
    a, n = conv(), nn.BatchNorm2d(4, eps=EPS)
    model = thin(Net(lambda net, x: net.n(net.a(x)), a=a, n=n), 0.3)
    n.running_var.fill_(variance)  # type: ignore[union-attr]
    weight = simplify(trace(model, (image(),))).tensors["a.weight:folded"]
    zero = a.weight == 0
    assert (weight[zero] == 0).all()
    assert not weight[zero].signbit().any()


# -- activations ------------------------------------------------------------------------------------------
RELU6 = {
    "module": lambda x: nn.ReLU6()(x),
    "relu6": functional.relu6,
    "hardtanh": lambda x: functional.hardtanh(x, 0.0, 6.0),
    "clamp": lambda x: x.clamp(0, 6),
    "float clamp": lambda x: torch.clamp(x, 0.0, 6.0),
    "clip": lambda x: x.clip(0, 6),
    "keyword clamp": lambda x: torch.clamp(x, max=6, min=0),
}
RELU = {
    "relu": torch.relu,
    "in place": lambda x: functional.relu(x, inplace=True),
    "clamp_min": lambda x: x.clamp_min(0),
}
OTHERS = {
    "hardtanh": functional.hardtanh,
    "clamp at 1": lambda x: x.clamp(0, 1),
    "clamp max": lambda x: x.clamp(max=6),
    "clamp_min at 1": lambda x: x.clamp_min(1),
    "clamp by tensors": lambda x: x.clamp(torch.zeros(8), torch.full((8,), 6.0)),
    "leaky": lambda x: functional.leaky_relu(x, 0.1),
    "silu": functional.silu,
}


@pytest.mark.parametrize("name", RELU6)
def test_relu6_is_fused_in_every_spelling(name: str) -> None:
    program = simplified(lambda net, x: RELU6[name](net.a(9 * x)), a=conv())
    assert fused(program) == [("relu6", "none")]
    assert ops(program)[-1] == CONV


@pytest.mark.parametrize("name", RELU)
def test_relu_is_fused_in_every_spelling(name: str) -> None:
    assert fused(simplified(lambda net, x: RELU[name](net.a(x)), a=conv())) == [("relu", "none")]


@pytest.mark.parametrize("name", OTHERS)
def test_other_activations_run_in_torch(name: str) -> None:
    program = simplified(lambda net, x: OTHERS[name](9 * x + net.a(9 * x)), a=conv())
    assert all(activation == "none" for activation, _ in fused(program))


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: (lambda y: (y.relu(), y))(net.a(x)),
        lambda net, x: (lambda y: y.relu() * y)(net.a(x)),
    ],
)
def test_an_activation_is_not_fused_where_others_read_the_sum(function: Callable[..., Any]) -> None:
    assert fused(simplified(function, a=conv())) == [("none", "none")]


# -- residuals ----------------------------------------------------------------------------------------------
CHAINS: dict[str, tuple[Callable[..., Any], list[tuple[str, str]]]] = {
    "add then relu": (lambda net, x: (net.a(x) + x).relu(), [("relu", "before")]),
    "the other way round": (lambda net, x: (x + net.a(x)).relu(), [("relu", "before")]),
    "relu then add": (lambda net, x: x + net.a(x).relu(), [("relu", "after")]),
    "relu, add, relu": (lambda net, x: (net.a(x).relu() + x).relu(), [("relu", "after")]),
    "norm, relu, add, relu": (lambda net, x: (net.n(net.a(x)).relu() + x).relu(), [("relu", "after")]),
    "norm, add, relu6": (lambda net, x: functional.relu6(net.n(net.a(x)) + x), [("relu6", "before")]),
    "two convolutions": (lambda net, x: (net.a(x) + net.b(x)).relu(), [("none", "none"), ("relu", "before")]),
    "two convolutions, the first one later": (
        lambda net, x: (lambda y: (net.a(y) + y).relu())(net.b(x)),
        [("none", "none"), ("relu", "before")],
    ),
    "two activated convolutions": (
        lambda net, x: net.a(x).relu() + net.b(x).relu(),
        [("relu", "none"), ("relu", "after")],
    ),
    "a sum of three": (lambda net, x: net.a(x) + net.b(x) + x, [("none", "none"), ("none", "before")]),
    "a residual made later": (lambda net, x: net.a(x) + x.sin().cos(), [("none", "before")]),
    "through dropout": (lambda net, x: (net.d(net.a(x)) + x).relu(), [("relu", "before")]),
    "in place": (lambda net, x: net.a(x).add_(x).relu_(), [("relu", "before")]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_sums_become_residuals(name: str) -> None:
    function, want = CHAINS[name]
    program = simplified(function, a=conv(), b=conv(), n=nn.BatchNorm2d(4), d=nn.Dropout())
    assert fused(program) == want


APART: dict[str, Callable[..., Any]] = {
    "broadcasting over the image": lambda net, x, y: net.a(x) + y[:, :, :1, :1],
    "broadcasting over the batch": lambda net, x, y: net.a(x) + y[:1],
    "broadcasting the layer": lambda net, x, y: net.a(x[:1]) + y,
    "a number": lambda net, x, y: net.a(x) + 3,
    "another dtype": lambda net, x, y: net.a(x) + y.double(),
    "a factor": lambda net, x, y: torch.add(net.a(x), y, alpha=2),
    "itself": lambda net, x, y: (lambda z: z + z)(net.a(x)),
    "a difference": lambda net, x, y: net.a(x) - y,
    "a reader beside": lambda net, x, y: (lambda z: (z + y, z))(net.a(x)),
}


@pytest.mark.parametrize("name", APART)
def test_sums_that_are_no_residual_run_in_torch(name: str) -> None:
    program = simplified(APART[name], image(), image() + 1, a=conv())
    assert [residual for _, residual in fused(program)] == ["none"]


def test_a_linear_layer_takes_a_residual_too() -> None:
    program = simplified(lambda net, x: (net.a(x) + x).relu(), image(2, 5, 8), a=nn.Linear(8, 8))
    assert fused(program) == [("relu", "before")]


def test_a_parameter_is_no_residual() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), nn.Parameter(image())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x) + self.b
            return y

    assert fused(simplify(trace(Bias(), (image(),)))) == [("none", "none")]


# -- order and rest ------------------------------------------------------------------------------------------
def test_dead_nodes_and_tensors_go() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        net.b(x)
        return net.a(x).clone().detach()  # type: ignore[no-any-return]

    program = simplified(function, a=conv(), b=conv(), n=nn.BatchNorm2d(4))
    assert ops(program) == [CONV]
    assert sorted(program.tensors) == ["a.bias", "a.weight"]


def test_every_step_is_named_and_printable() -> None:
    program = trace(thin(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())), (image(),))
    seen = list(steps(program))
    assert [name for name, _ in seen] == [rewrite.__name__ for rewrite in PASSES]
    assert "conv2d" in str(seen[-1][1].graph)
    assert str(seen[-1][1].graph) == str(simplify(program).graph)


def test_passes_leave_the_program_they_were_given() -> None:
    program = trace(thin(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())), (image(),))
    before, tensors = str(program.graph), {name: tensor.clone() for name, tensor in program.tensors.items()}
    simplify(program)
    assert str(program.graph) == before
    assert all(torch.equal(tensors[name], tensor) for name, tensor in program.tensors.items())


def test_a_second_time_changes_nothing() -> None:
    program = simplify(trace(thin(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv())), (image(),)))
    assert str(simplify(program).graph) == str(program.graph)
