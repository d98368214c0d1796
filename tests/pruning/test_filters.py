"""Filters go for good: the layers are smaller and the network runs."""

import sys
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from torch import nn

from zeroskip.core.errors import Unsupported
from zeroskip.model import zoo
from zeroskip.pruning import GradualPruner, PruneRecord, prune

needs_library = pytest.mark.skipif(find_spec("torch_pruning") is None, reason="needs zeroskip[prune]")


def convs(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


@needs_library
def test_the_smallest_filters_go_and_the_rest_is_exact() -> None:
    net = convs(3, 4, 4)
    with torch.no_grad():
        net[0].weight[[1, 3]] *= 1e-3  # type: ignore[index]
        net[0].bias[[1, 3]] = 0  # type: ignore[index]
        net[2].weight[:, [1, 3]] = 0  # type: ignore[index]
    x = torch.randn(1, 3, 6, 6)
    expected = net(x)
    kept = net.get_parameter("0.weight")[[0, 2]].clone()
    record = prune(net, 0.5, pattern="filters", example=x)
    assert torch.equal(net.get_parameter("0.weight"), kept)
    assert net.get_parameter("2.weight").shape == (4, 2, 3, 3)
    torch.testing.assert_close(net(x), expected)
    assert [(layer.numel, layer.nnz, layer.pattern, layer.reason) for layer in record.layers] == [
        (108, 54, "filters", None), (144, 72, "dense", "output layer"),
    ]  # fmt: skip
    assert PruneRecord.from_json(record.to_json()) == record


@needs_library
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_of_the_zoo_halve(name: str) -> None:
    torch.manual_seed(0)
    net: nn.Module = getattr(zoo, name)(num_classes=10).train()
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    widths = {key: module.out_channels for key, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    record = prune(net, 0.5, pattern="filters", example=torch.randn(1, 3, 64, 64))
    got = {key: module.out_channels for key, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    # 24 and 144 filters are three times 8: of the former two thirds stay.
    assert got == {key: {24: 16}.get(width, width // 2) for key, width in widths.items()}
    assert net.training
    assert all(parameter.requires_grad == (parameter.dim() > 1) for parameter in net.parameters())
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert record.density < 0.27
    assert [layer.reason for layer in record.layers if layer.reason] == ["output layer"]


@needs_library
def test_skip_and_global() -> None:
    net = convs(3, 8, 8, 8)
    prune(net, 0.5, pattern="filters", skip=["2"], example=torch.randn(1, 3, 6, 6))
    assert [net[i].out_channels for i in (0, 2, 4)] == [4, 8, 8]
    net = convs(3, 8, 8, 8)
    with torch.no_grad():
        net.get_parameter("2.weight").mul_(100)
    prune(net, 0.25, pattern="filters", scope="global", example=torch.randn(1, 3, 6, 6))
    assert net[0].out_channels + net[2].out_channels == 12  # type: ignore[operator]


def test_errors_leave_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = convs(3, 8, 8)
    before = [p.detach().clone() for p in net.parameters()]
    x = torch.randn(1, 3, 6, 6)
    with pytest.raises(ValueError, match="example: got NoneType, expected an input"):
        prune(net, 0.5, pattern="filters")
    with pytest.raises(ValueError, match="only: got '7', which matches no"):
        prune(net, 0.5, pattern="filters", only=["7"], example=x)
    with pytest.raises(ValueError, match="sparsity: got 1"):
        prune(net, 1, pattern="filters", example=x)
    with pytest.raises(ValueError, match='pattern: got "filters", expected "unstructured"'):
        GradualPruner(net, 0.5, begin=0, end=2, every=1, pattern="filters")
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(Unsupported, match=r"not installed; pip install 'zeroskip\[prune\]'"):
        prune(net, 0.5, pattern="filters", example=x)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@needs_library
def test_a_network_that_does_not_run_is_refused() -> None:
    net = convs(3, 8, 8)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(Unsupported, match="could not trace Sequential"):
        prune(net, 0.5, pattern="filters", example=torch.randn(1, 2, 6, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@needs_library
@pytest.mark.parametrize(
    ("filters", "sparsity", "kept"),
    [(8, 0.9, 1), (10, 0.9, 1), (20, 0.9, 2), (7, 0.5, 3), (1, 0.9, 1), (24, 0.293, 16), (30, 0.3, 24), (9, 0.01, 8)],
)
def test_a_layer_keeps_its_share_and_at_least_one_filter(filters: int, sparsity: float, kept: int) -> None:
    net = convs(3, filters, 4)
    prune(net, sparsity, pattern="filters", example=torch.randn(1, 3, 6, 6))
    assert net[0].out_channels == kept


@needs_library
def test_a_threshold_that_leaves_no_filter_is_an_error() -> None:
    """torch-pruning keeps all filters of such a layer, and says nothing."""
    net = convs(3, 8, 8, 8)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"sparsity: got 0.95 with scope 'global', which leaves no filter in '2'"):
        prune(net, 0.95, pattern="filters", scope="global", example=torch.randn(1, 3, 6, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@needs_library
def test_transposed_convolutions_are_no_layers_to_prune() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    prune(net, 0.5, pattern="filters", only=["0"], example=torch.randn(1, 3, 4, 4))
    assert [module.out_channels for module in net] == [4, 8, 8, 2]


@needs_library
def test_shared_weights_are_not_parted() -> None:
    net = convs(3, 8, 8, 8, 4)
    net[4].weight = net[2].weight
    with pytest.raises(Unsupported, match=r"4.weight would no longer be the tensor that it shares"):
        prune(net, 0.5, pattern="filters", example=torch.randn(1, 3, 6, 6))
    assert net[4].weight is net[2].weight
    assert net(torch.randn(1, 3, 6, 6)).shape == (1, 4, 6, 6)


@needs_library
def test_a_network_that_cannot_be_copied_is_refused() -> None:
    net = convs(3, 8, 8)
    x = torch.randn(1, 3, 6, 6)
    net.register_buffer("last", net(x), persistent=False)
    with pytest.raises(Unsupported, match="Sequential cannot be copied"):
        prune(net, 0.5, pattern="filters", example=x)
