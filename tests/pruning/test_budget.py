"""How a budget is dealt to layers, and the record that says so."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zeroskip.model import zoo
from zeroskip.pruning import GradualPruner, PruneConfig, prune
from zeroskip.pruning.masks import erk_sparsities

sparsities = st.floats(0, 1, exclude_max=True)
shapes = st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=8)


@settings(deadline=None)
@given(shapes=shapes, sparsity=sparsities)
def test_erk_spends_the_budget_exactly(shapes: list[list[int]], sparsity: float) -> None:
    dealt = erk_sparsities(shapes, sparsity)
    numel = [math.prod(shape) for shape in shapes]
    assert all(-1e-9 <= part <= 1 for part in dealt)
    got = sum(n * (1 - part) for n, part in zip(numel, dealt, strict=True))
    assert got == pytest.approx((1 - sparsity) * sum(numel), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(shapes=shapes, sparsity=sparsities)
def test_erk_densities_are_proportional_where_not_capped(shapes: list[list[int]], sparsity: float) -> None:
    dealt = erk_sparsities(shapes, sparsity)
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    scales = [(1 - part) / share for part, share in zip(dealt, raw, strict=True) if part > 0]
    assert scales == pytest.approx([scales[0]] * len(scales)) if scales else True
    # A capped layer would get more than all its weights at the others' scale.
    if scales:
        assert all(scales[0] * share >= 1 - 1e-9 for part, share in zip(dealt, raw, strict=True) if part == 0)


@settings(deadline=None)
@given(shapes=shapes, bounds=st.tuples(sparsities, sparsities))
def test_erk_never_makes_a_layer_denser(shapes: list[list[int]], bounds: tuple[float, float]) -> None:
    low, high = sorted(bounds)
    pairs = zip(erk_sparsities(shapes, low), erk_sparsities(shapes, high), strict=True)
    assert all(a <= b + 1e-9 for a, b in pairs)


def test_erk_by_hand() -> None:
    # Sums 10, 20; products 36, 100: a tenth of 136 weights is 13.6 = scale * 30.
    assert erk_sparsities([[2, 2, 3, 3], [10, 10]], 0.9) == pytest.approx(
        [1 - 13.6 / 30 * 10 / 36, 1 - 13.6 / 30 * 0.2]
    )
    # The first cannot hold its share of 122.4 / 30 * 10: it stays dense and the second gets what is left.
    assert erk_sparsities([[2, 2, 3, 3], [10, 10]], 0.1) == pytest.approx([0, 1 - 86.4 / 100])


def test_erk_keeps_small_layers_dense_and_meets_the_total() -> None:
    net = zoo.resnet18(num_classes=10)
    record = prune(net, 0.9, scope="erk")
    pruned = [layer for layer in record.layers if layer.reason is None]
    total = sum(layer.numel for layer in pruned)
    assert abs(sum(layer.nnz for layer in pruned) - 0.1 * total) <= len(pruned) / 2
    by_name = {layer.name: layer.density for layer in pruned}
    assert by_name["layer1.0.conv1"] > 3 * by_name["layer4.1.conv2"]


def test_gradual_erk_ends_where_one_shot_does() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 40), nn.Linear(40, 4))
    pruner = GradualPruner(net, 0.8, begin=1, end=10, every=1, scope="erk", only=["*"])
    before = 0.0
    for _ in range(10):
        pruner.step()
        assert pruner.sparsity >= before
        before = pruner.sparsity
    expected = erk_sparsities([(40, 8), (40, 40), (4, 40)], 0.8)
    got = [1 - layer.density for layer in pruner.record().layers]
    assert got == pytest.approx(expected, abs=0.5 / 160)


@pytest.mark.parametrize(
    "config",
    [
        PruneConfig(),
        PruneConfig(0.95, scope="erk", skip=("conv1",), only=("*",)),
        PruneConfig(None, "2:4", permute=True),
    ],
)
def test_config_round_trips_through_json(config: PruneConfig) -> None:
    assert PruneConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"skip": null, "only": null, "rate": 1}', "3"])
def test_other_json_is_no_config(text: str) -> None:
    with pytest.raises(ValueError, match="JSON that is none"):
        PruneConfig.from_json(text)


def test_a_config_stands_for_its_arguments() -> None:
    nets = []
    for arguments in (
        (PruneConfig(0.7, scope="erk", only=("0", "1")), {}),
        (0.7, {"scope": "erk", "only": ["0", "1"]}),
    ):
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 40), nn.Linear(40, 4)))
        prune(nets[-1], arguments[0], **arguments[1])  # type: ignore[arg-type]
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="got a PruneConfig and further arguments"):
        prune(nets[0], PruneConfig(), scope="erk")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity: got 1.0, expected a fraction in \[0, 1\)"),
        ({"pattern": "2:4", "scope": "erk"}, "scope: got \"erk\" with pattern '2:4'"),
        ({"pattern": "filters", "scope": "erk"}, "scope: got \"erk\" with pattern 'filters'"),
        ({"permute": True}, "permute: got True with pattern 'unstructured'"),
        ({"scope": "all"}, "scope: got 'all'"),
    ],
)
def test_a_config_is_checked_when_made(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneConfig(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got the string 'conv1', expected a list"):
        PruneConfig.of(0.9, only="conv1")
    with pytest.raises(ValueError, match="got the string '01', expected a list"):
        PruneConfig(only="01")  # type: ignore[arg-type]


def test_a_sparsity_of_numpy_can_be_saved() -> None:
    config = PruneConfig(np.float32(0.5))  # type: ignore[arg-type]
    assert PruneConfig.from_json(config.to_json()) == config
