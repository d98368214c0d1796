"""Whatever torch.export takes becomes a program that computes the same; the rest is refused with advice."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.utils import _pytree as pytree

from contract.cases import OURS, Net, engine_of, engine_with, program_of, thin
from zeroskip.core.errors import Unsupported
from zeroskip.core.graph import CONV, LINEAR
from zeroskip.model.bake import bake
from zeroskip.model.passes import simplify
from zeroskip.model.passes.name_layers import name_layers
from zeroskip.model.program import Program
from zeroskip.model.trace import trace
from zeroskip.run.compile import distance


def conv(inputs: int = 4, outputs: int = 4, size: int | tuple[int, int] = 3, **more: Any) -> nn.Conv2d:
    more.setdefault("padding", 1)
    return nn.Conv2d(inputs, outputs, size, **more)


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 4, 9, 8), generator=torch.Generator().manual_seed(1))


def layers(program: Program) -> list[str]:
    return program.graph.names(CONV, LINEAR)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], int]] = {
    "padding same": (lambda: conv(padding="same", dilation=2, size=(3, 5)), (image(),), 1),
    "padding valid": (lambda: conv(padding="valid"), (image(),), 1),
    "circular padding": (lambda: conv(padding_mode="circular"), (image(),), 1),
    "groups and stride": (lambda: conv(groups=2, stride=(2, 1)), (image(),), 1),
    "an image without batch": (lambda: conv(), (image(4, 9, 8),), 0),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), (image(2, 4, 9),), 0),
    "conv3d": (lambda: nn.Conv3d(4, 4, 2), (image(1, 4, 3, 4, 5),), 0),
    "conv_transpose": (lambda: nn.ConvTranspose2d(4, 4, 2, 2), (image(),), 0),
    "linear on sequences": (lambda: nn.Linear(8, 5), (image(2, 3, 8),), 1),
    "linear on images": (lambda: nn.Linear(8, 5), (image(),), 1),
    "linear on one vector": (lambda: nn.Linear(8, 5), (image(8),), 0),
    "functional layers": (
        lambda: Net(lambda net, x: functional.conv2d(x, net.a.weight, groups=2, stride=2), a=conv(2)),
        (image(),),
        1,
    ),
    "dropout": (lambda: nn.Sequential(conv(), nn.Dropout(0.5), nn.Dropout2d(0.5)), (image(),), 1),
    "the same layer twice": (lambda: Net(lambda net, x: net.a(net.a(x).relu()), a=conv()), (image(),), 2),
    "several inputs": (
        lambda: Net(lambda net, x, y: net.a(x) + net.b(y), a=conv(), b=conv(2)),
        (image(), image(2, 2, 9, 8)),
        2,
    ),
    "an unused input": (lambda: Net(lambda net, x, y: net.a(x), a=conv()), (image(), image(3)), 1),
    "integer input": (
        lambda: Net(lambda net, i: net.b(net.a(i)), a=nn.Embedding(9, 8), b=nn.Linear(8, 4)),
        (torch.tensor([[1, 2]]),),
        1,
    ),
    "no layer at all": (lambda: Net(lambda net, x: x.relu().mean()), (image(),), 0),
    "in-place operators": (
        lambda: Net(lambda net, x: net.b(net.a(x).add_(1).relu_()), a=conv(), b=conv()),
        (image(),),
        2,
    ),
    "constants": (lambda: Net(lambda net, x: net.a(x) * torch.tensor(2.0) + torch.arange(8), a=conv()), (image(),), 1),
    "chunks": (lambda: Net(lambda net, x: torch.cat(net.a(x).chunk(2, 1)[::-1], 1), a=conv()), (image(),), 1),
    "topk": (lambda: Net(lambda net, x: net.a(x).flatten(1).topk(3)[0], a=conv()), (image(),), 1),
    "flatten by view": (
        lambda: Net(lambda net, x: net.b(net.a(x).view(2, -1)), a=conv(), b=nn.Linear(288, 3)),
        (image(),),
        2,
    ),
    "channel shuffle": (
        lambda: Net(
            lambda net, x: net.b(net.a(x).view(2, 2, 2, 9, 8).transpose(1, 2).contiguous().view(2, 4, 9, 8)),
            a=conv(),
            b=conv(),
        ),
        (image(),),
        2,
    ),
    "attention": (
        lambda: Net(lambda net, x: functional.scaled_dot_product_attention(*net.a(x).chunk(3, -1)), a=nn.Linear(8, 24)),
        (image(2, 3, 8),),
        1,
    ),
    "up and down": (
        lambda: Net(
            lambda net, x: functional.interpolate(net.a(functional.max_pool2d(x, 2)), scale_factor=2), a=conv()
        ),
        (image(),),
        1,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_program_computes_what_the_model_does(name: str) -> None:
    """Run by every method that takes its layers, and dense."""
    make, inputs, count = MODELS[name]
    torch.manual_seed(0)
    model = thin(make(), 0.4)
    with torch.no_grad():
        want = model(*inputs)
    program = program_of(model, *inputs)
    assert len(layers(program)) == count
    for prefer in ((), OURS):
        for pick in range(3):
            got = engine_of(program, *prefer, pick=pick)(*inputs)
            assert got.dtype == want.dtype
            assert distance(got, want) < 1e-5


def test_same_padding_of_an_even_kernel_is_left_to_torch() -> None:
    """It pads one side only."""
    model, x = thin(conv(padding="same", size=4), 0.4), image()
    with torch.no_grad(), warnings.catch_warnings():
        # torch says once per process that such a convolution copies its input.
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel", UserWarning)
        program = program_of(model, x)
        assert layers(program) == []
        assert torch.equal(engine_of(program, *OURS)(x), model(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda net, x: (net.a(x), x.relu()),
        lambda net, x: [net.a(x), None, (x.relu(), 3)],
        lambda net, x: {"a": net.a(x), "b": {"c": (x,)}},
        lambda net, x: (x, net.a(x), net.a(x)[:, :2], net.a(x).flatten(1)),
    ],
)
def test_nests_of_outputs_keep_their_form(make: Callable[..., Any]) -> None:
    model, x = thin(Net(make, a=conv()), 0.4), image()
    with torch.no_grad():
        want = model(x)
    got = engine_with(model, x, *OURS)(x)
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    assert distance(got, want) < 1e-5


Pair = namedtuple("Pair", ["a", "b"])


def by_value(net: nn.Module, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def with_state(net: nn.Module, x: Tensor) -> Tensor:
    net.a.weight.data.add_(1)  # type: ignore[union-attr, operator]
    return net.a(x)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (by_value, "could not capture Net"),
        (lambda net, x: net.a(x).numpy(), "Net"),
        (lambda net, x: Pair(net.a(x), x), "returns a Pair"),
        (lambda net, x: {3: net.a(x)}, "returns a dict"),
        (lambda net, x: 3, "Net"),
        (lambda net, x: torch.cond(x.sum() > 0, lambda x: x, lambda x: -x, (x,)), "control flow|could not capture"),
    ],
)
def test_what_cannot_be_a_program_is_refused_with_advice(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        trace(Net(function, a=conv()), (image(),))


def test_the_reason_and_the_way_out_are_in_the_message() -> None:
    with pytest.raises(Unsupported, match=r"torch\.export\.export\(model, example\)"):
        trace(Net(by_value), (image(),))


def test_a_model_that_counts_its_calls_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x + self.calls

    with pytest.raises(Unsupported, match="without state"):
        trace(Counter(), (image(),))


# -- names ---------------------------------------------------------------------------------------------
def test_layers_are_named_after_their_modules() -> None:
    model = nn.Sequential(conv(), nn.Sequential(conv(), nn.ReLU()), nn.Flatten(), nn.Linear(288, 3))
    assert layers(simplify(trace(model.eval(), (image(),)))) == ["0", "1.0", "3"]


def test_a_shared_layer_keeps_its_name_once() -> None:
    names = layers(name_layers(trace(Net(lambda net, x: net.a(net.a(x)), a=conv()).eval(), (image(),))))
    assert names[0] == "a"
    assert len(set(names)) == 2


def test_a_module_called_like_an_input_does_no_harm() -> None:
    model, x = thin(Net(lambda net, x: net.x(x), x=conv()), 0.4), image()
    with torch.no_grad():
        assert distance(engine_with(model, x, *OURS)(x), model(x)) < 1e-5


# -- pruned models ----------------------------------------------------------------------------------------
def masked() -> nn.Module:
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.Flatten(), nn.Linear(288, 3))
    for index in (0, 2, 4):
        torch_prune.l1_unstructured(model[index], "weight", 0.7)
    return model


def test_prune_masks_are_baked_into_plain_weights() -> None:
    model, x = masked(), image()
    program = simplify(trace(model, (x,)))
    assert sorted(program.graph.parameters) == ["0.bias", "0.weight", "2.bias", "2.weight", "4.bias", "4.weight"]
    assert all(layer.weights.density == pytest.approx(0.3, abs=0.02) for layer in program.layers().values())
    with torch.no_grad():
        assert distance(engine_with(model, x, *OURS)(x), model.eval()(x)) < 1e-5


def test_parametrizations_are_baked_into_plain_weights() -> None:
    class Mask(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (weight.abs() > 0.1)

    model, x = nn.Sequential(conv(), nn.ReLU(), parametrizations.weight_norm(conv())), image()
    parametrize.register_parametrization(model[0], "weight", Mask())
    with torch.no_grad():
        want = model.eval()(x)
    program = program_of(model, x)
    assert program.layers()["0"].weights.density < 1
    assert len(program.graph.parameters) == 4
    assert distance(engine_of(program, *OURS)(x), want) < 1e-5


def test_a_model_with_parametrizations_works_on() -> None:
    class Halve(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model, x = nn.Sequential(conv()).eval(), image()
    parametrize.register_parametrization(model[0], "weight", Halve())
    with torch.no_grad():
        want = model(x)
        first, second = program_of(model, x), program_of(model, x)
        assert torch.equal(model(x), want)
    assert torch.equal(first.tensors["0.weight"], second.tensors["0.weight"])
    assert parametrize.is_parametrized(model[0], "weight")


def test_the_original_model_is_not_touched() -> None:
    model, x = masked().train(), image()
    model[2].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine_with(bake(model), x, *OURS)
    trace(model, (x,))
    assert model.training
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert torch_prune.is_pruned(model)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
