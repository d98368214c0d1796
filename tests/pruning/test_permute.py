"""Channels move so that N:M keeps more, and the network computes the same."""

import itertools
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zeroskip.core.errors import Unsupported
from zeroskip.pruning import GradualPruner, PruneConfig, prune
from zeroskip.pruning.permute import _Axis, _in_groups_of, _kept, best_order, permute_channels

LAYERS = ("a", "b", "join", "fc", "out")
CONFIG = PruneConfig(None, "2:4", only=LAYERS, permute=True)


@settings(max_examples=25, deadline=None)
@given(
    nm=st.integers(2, 6).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    groups=st.integers(1, 4),
    rows=st.integers(1, 12),
    seed=st.integers(0, 999),
)
def test_an_order_is_a_permutation_and_never_worse(nm: tuple[int, int], groups: int, rows: int, seed: int) -> None:
    n, m = nm
    torch.manual_seed(seed)
    magnitudes = torch.randn(rows, m * groups).abs()
    order = best_order(magnitudes, n, m)
    assert sorted(order) == list(range(m * groups))
    assert _kept(magnitudes[:, order], n, m) >= _kept(magnitudes, n, m) * (1 - 1e-6)


def test_no_single_swap_gains_more() -> None:
    torch.manual_seed(1)
    magnitudes = torch.randn(9, 16, dtype=torch.float64).abs()
    order = best_order(magnitudes, 2, 4)
    best = _kept(magnitudes[:, order], 2, 4)
    for a, b in itertools.combinations(range(16), 2):
        other = list(order)
        other[a], other[b] = other[b], other[a]
        assert _kept(magnitudes[:, other], 2, 4) <= best * (1 + 1e-5)


def test_big_columns_that_sit_together_get_apart() -> None:
    magnitudes = torch.tensor([[9.0, 9, 9, 9, 1, 1, 1, 1]]).repeat(5, 1)
    assert _kept(magnitudes, 2, 4) == 5 * 20
    assert _kept(magnitudes[:, best_order(magnitudes, 2, 4)], 2, 4) == 5 * 36


class Residual(nn.Module):
    """Sums, a concatenation, depthwise, flattening: what ties channels together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.a = nn.Conv2d(8, 8, 1)
        self.b = nn.Conv2d(8, 12, 3, padding=1)
        self.join = nn.Conv2d(20, 8, 1, bias=False)
        self.fc = nn.Linear(8 * 4, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.a(self.depthwise(x)).relu()
        x = self.join(torch.cat([x, self.b(x)], 1)).relu()
        return self.out(self.fc(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)).relu())  # type: ignore[no-any-return]


def residual() -> Residual:
    torch.manual_seed(0)
    net = Residual()
    for tensor in (net.norm.weight, net.norm.bias, net.norm.running_mean, net.norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_computes_the_same(dtype: torch.dtype) -> None:
    pytest.importorskip("torch_pruning")
    net = residual().to(dtype)
    x = torch.randn(2, 4, 6, 6, dtype=dtype)
    state, expected = {name: value.clone() for name, value in net.state_dict().items()}, net(x)
    done = permute_channels(net, x, CONFIG)
    assert {name for group in done for name in group.layers} >= {"a", "b", "join", "out"}
    assert all(group.after > group.before for group in done)
    assert (net(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.equal(net.stem.weight, state["stem.weight"])
    assert not torch.equal(net.norm.running_mean, state["norm.running_mean"])  # type: ignore[arg-type]
    for name, value in net.state_dict().items():  # the same values, elsewhere
        assert torch.equal(value.flatten().sort().values, state[name].flatten().sort().values)
    assert not net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_prune_keeps_more_with_permute() -> None:
    pytest.importorskip("torch_pruning")
    kept = []
    for permute in (False, True):
        net = residual()
        prune(net, CONFIG if permute else PruneConfig(None, "2:4", only=LAYERS), example=torch.randn(1, 4, 6, 6))
        for name in LAYERS:
            weight = net.get_parameter(f"{name}.weight").movedim(1, -1).reshape(-1, 4)
            assert ((weight != 0).sum(1) == 2).all()
        kept.append(sum(float(p.detach().abs().sum()) for name, p in net.named_parameters() if name.endswith("weight")))
    assert kept[1] > kept[0]


def test_gradual_pruner_permutes_first() -> None:
    pytest.importorskip("torch_pruning")
    net, moved = residual(), residual()
    pruner = GradualPruner(net, CONFIG, begin=1, end=2, every=1, example=torch.ones(1, 4, 6, 6).normal_())
    permute_channels(moved, torch.ones(1, 4, 6, 6).normal_(), CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), moved.parameters(), strict=True))
    pruner.step()
    pruner.step()
    assert pruner.sparsity == 0.5


class Shuffled(nn.Module):
    """Reads its channels in an order of its own, which no graph of modules shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * torch.arange(8, device=x.device)[:, None, None])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("first", "channels", "fits"), [(0, 8, True), (4, 8, True), (6, 8, False), (4, 6, False)])
def test_only_whole_groups_are_optimised_for(first: int, channels: int, fits: bool) -> None:
    """After a concatenation, where a layer's groups may hold channels of two layers."""
    axis = _Axis("", nn.Linear(20, 1), 1, tuple((first + channel,) for channel in range(channels)))
    assert _in_groups_of(4, axis) == fits
    flattened = _Axis("", nn.Linear(20, 1), 1, ((0, 1), (2, 3), (4, 5), (6, 7)))
    assert not _in_groups_of(4, flattened)


def test_what_would_change_the_function_stays() -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    net = Shuffled()
    before = [p.detach().clone() for p in net.parameters()]
    assert best_order(net.b.weight.detach().abs().flatten(1), 2, 4) != list(range(8))
    assert permute_channels(net, torch.randn(1, 4, 5, 5), PruneConfig(None, "2:4", only=("b",), permute=True)) == ()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_errors_leave_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = residual()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="example: got NoneType"):
        prune(net, CONFIG)
    with pytest.raises(ValueError, match=r"layer 'b': got 8 input channels .* multiple of 3"):
        prune(net, PruneConfig(None, "1:3", only=("b",), permute=True), example=torch.randn(1, 4, 6, 6))
    if find_spec("torch_pruning"):
        with pytest.raises(Unsupported, match="could not trace Residual with an example of shape"):
            prune(net, CONFIG, example=torch.randn(1, 3, 6, 6))
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(Unsupported, match=r"pip install 'zeroskip\[prune\]'"):
        prune(net, CONFIG, example=torch.randn(1, 4, 6, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_zero_weights_and_batch_norm_without_tensors() -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(4, 8, 1), norm, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1))
    nn.init.zeros_(net.get_parameter("3.weight"))
    x = torch.randn(2, 4, 5, 5)
    expected = net(x)
    done = permute_channels(net, x, PruneConfig(None, "2:4", only=("2", "3")))
    assert [group.layers for group in done] == [("2",)]
    torch.testing.assert_close(net(x), expected)
    with pytest.raises(ValueError, match="pattern: got 'unstructured', expected N:M"):
        permute_channels(net, x, PruneConfig(0.5))
