"""One-shot pruning: exact counts, N:M validity, scope, the choice of layers, errors, the record."""

import json
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from zeroskip.model import zoo
from zeroskip.pruning import PruneRecord, prune

sparsities = st.floats(0, 1, exclude_max=True)
seeds = st.integers(0, 2**16)


def random_net(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Conv2d(i, o, 3) for i, o in pairwise(widths)))


def weights(net: nn.Module) -> list[Tensor]:
    return [value.detach() for name, value in net.named_parameters() if name.endswith("weight")]


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


@settings(max_examples=40, deadline=None)
@given(sparsity=sparsities, width=st.integers(1, 9), seed=seeds)
def test_layer_scope_zeros_exactly_the_rounded_count_of_smallest(sparsity: float, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    net = random_net(3, 5, width)
    before = weights(net)[1].clone()
    prune(net, sparsity, only=["1"])
    after = weights(net)[1]
    assert zeros(after) == round(sparsity * after.numel())
    kept = after != 0
    assert torch.equal(after[kept], before[kept])
    if kept.any() and not kept.all():
        assert before[~kept].abs().max() <= before[kept].abs().min()


@settings(max_examples=40, deadline=None)
@given(sparsity=sparsities, seed=seeds)
def test_global_scope_has_one_threshold(sparsity: float, seed: int) -> None:
    torch.manual_seed(seed)
    net = random_net(3, 5, 4, 6)
    with torch.no_grad():
        weights(net)[2].mul_(3)
    before = torch.cat([weight.flatten() for weight in weights(net)])
    prune(net, sparsity, scope="global", only=["*"])
    after = torch.cat([weight.flatten() for weight in weights(net)])
    assert zeros(after) == round(sparsity * after.numel())
    kept = after != 0
    if kept.any() and not kept.all():
        assert before[~kept].abs().max() <= before[kept].abs().min()


@settings(max_examples=40, deadline=None)
@given(
    nm=st.integers(2, 8).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    groups=st.integers(1, 3),
    kernel=st.sampled_from([1, 3]),
    seed=seeds,
)
def test_n_of_m_keeps_the_n_largest_along_the_reduction(
    nm: tuple[int, int], groups: int, kernel: int, seed: int
) -> None:
    n, m = nm
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(m * groups, 5, kernel), nn.Linear(m * groups, 3))
    before = [weight.clone() for weight in weights(net)]
    prune(net, None, pattern=f"{n}:{m}", only=["*"])
    for new, old in zip(weights(net), before, strict=True):
        new = new.movedim(1, -1).reshape(-1, m)
        old = old.movedim(1, -1).reshape(-1, m)
        assert ((new != 0).sum(1) == n).all()
        smallest_kept = torch.where(new != 0, old.abs(), torch.inf).amin(1)
        largest_dropped = torch.where(new == 0, old.abs(), 0).amax(1)
        assert (largest_dropped <= smallest_kept).all()
        assert torch.equal(new[new != 0], old[new != 0])


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_among_equals_the_earlier_go_first(pattern: str) -> None:
    layer = nn.Linear(8, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1, 1, -1, 1, -1, 1, -1]]))
    prune(layer, 0.5, pattern=pattern, only=[""])
    expected = {"unstructured": [0, 0, 0, 0, 1, -1, 1, -1], "2:4": [0, 0, 1, -1, 0, 0, 1, -1]}
    assert layer.weight.tolist() == [expected[pattern]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    net = nn.Linear(64, 64).to(dtype)
    prune(net, 0.9, only=["*"])
    assert zeros(net.weight) == round(0.9 * 64 * 64)
    assert net.weight.dtype is dtype


def test_zeros_already_there_count_and_stay() -> None:
    net = nn.Linear(10, 10)
    prune(net, 0.7, only=["*"])
    once = net.weight.detach().clone()
    assert prune(net, 0.7, only=["*"]).density == pytest.approx(0.3)
    assert torch.equal(net.weight, once)
    prune(net, 0.2, only=["*"])
    assert torch.equal(net.weight, once)


def reasons(record: PruneRecord) -> dict[str, str | None]:
    return {layer.name: layer.reason for layer in record.layers}


def test_stem_depthwise_and_classifier_stay_dense() -> None:
    net = zoo.mobilenet_v1(num_classes=10)
    record = prune(net, 0.9)
    got = reasons(record)
    assert got.pop("stem") == "first convolution"
    assert got.pop("classifier") == "output layer"
    assert {got.pop(f"blocks.{i}.depthwise") for i in range(13)} == {"depthwise"}
    assert set(got.values()) == {None}
    assert zeros(net.get_parameter("stem.weight")) == zeros(net.get_parameter("blocks.0.depthwise.weight")) == 0
    for layer in record.layers:
        weight = net.get_parameter(f"{layer.name}.weight")
        assert (layer.numel, layer.nnz) == (weight.numel(), weight.numel() - zeros(weight))
        assert layer.pattern == ("dense" if layer.reason else "unstructured")


@pytest.mark.parametrize(
    ("build", "output"),
    [
        (lambda: zoo.dncnn(depth=4, width=8), "layers.8"),
        (lambda: zoo.squeezenet1_1(num_classes=10), "classifier.1"),
        (lambda: zoo.resnet18(num_classes=10), "fc"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), "2"),
    ],
)
def test_the_output_layer_is_the_last_linear_or_else_the_last_convolution(
    build: Callable[[], nn.Module], output: str
) -> None:
    got = reasons(prune(build(), 0.5))
    assert [name for name, reason in got.items() if reason == "output layer"] == [output]
    assert list(got.values()).count(None) == len(got) - 1 - ("first convolution" in got.values())


def test_skip_adds_to_the_defaults_and_only_replaces_them() -> None:
    got = reasons(prune(random_net(3, 4, 4, 4, 4), 0.5, skip=["2"]))
    assert got == {"0": "first convolution", "1": None, "2": "skip", "3": "output layer"}
    got = reasons(prune(random_net(3, 4, 4, 4, 4), 0.5, only=["[03]"]))
    assert got == {"0": None, "1": "not in only", "2": "not in only", "3": None}
    got = reasons(prune(random_net(3, 4, 4, 4, 4), 0.5, only=["*"], skip=["1"]))
    assert got == {"0": None, "1": "skip", "2": None, "3": None}


def test_shared_weights_are_pruned_and_counted_once() -> None:
    net = random_net(4, 4, 4, 4, 4)
    net[2].weight = net[1].weight
    record = prune(net, 0.5)
    assert list(reasons(record)) == ["0", "1", "3"]
    assert zeros(net.get_parameter("1.weight")) == zeros(net.get_parameter("2.weight")) == 4 * 4 * 9 // 2
    net = random_net(4, 4, 4, 4, 4, 4)
    net[2].weight = net[1].weight
    assert reasons(prune(net, 0.5, skip=["2"]))["1"] == "skip"


def tiny() -> nn.Sequential:
    return random_net(3, 6, 6, 6)


def with_nan() -> nn.Module:
    net = tiny()
    nn.init.constant_(net.get_parameter("1.weight"), torch.nan)
    return net


def with_mask() -> nn.Sequential:
    net = tiny()
    torch_prune.l1_unstructured(net[1], "weight", 0.5)  # type: ignore[no-untyped-call]
    return net


def with_parametrization() -> nn.Module:
    net = tiny()
    parametrizations.weight_norm(net[1])
    return net


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (tiny, {"sparsity": 1.0}, r"sparsity: got 1.0, expected a fraction in \[0, 1\)"),
        (tiny, {"sparsity": -0.1}, r"sparsity: got -0.1"),
        (tiny, {"sparsity": float("nan")}, r"sparsity: got nan"),
        (tiny, {"sparsity": None}, r"sparsity: got None"),
        (tiny, {"scope": "all"}, r"scope: got 'all', expected \"layer\", \"global\" or \"erk\""),
        (tiny, {"pattern": "2:4", "scope": "global"}, r"scope: got \"global\" with pattern '2:4'"),
        (tiny, {"pattern": "4:2"}, r"pattern: got '4:2', expected \"unstructured\", \"filters\" or \"N:M\""),
        (tiny, {"pattern": "block"}, r"pattern: got 'block'"),
        (tiny, {"pattern": "2:4"}, r"layer '1': got 6 input channels .* multiple of 4; .* skip=\['1'\]"),
        (tiny, {"skip": ["conv*"]}, r"skip: got 'conv\*', which matches no .* expected one of: 0, 1, 2"),
        (tiny, {"only": ["1", "7"]}, r"only: got '7', which matches no"),
        (tiny, {"skip": "1"}, r"skip: got the string '1', expected a list"),
        (tiny, {"skip": ["1"]}, r"got no layer to prune .*'1' \(skip\).* only=\[...\]"),
        (nn.ReLU, {}, r"got no layer to prune \[no Conv2d, no Linear\]"),
        (with_nan, {}, r"layer '1': got NaN weights"),
        (with_mask, {}, r"layer '1': .* bake it first: torch.nn.utils.prune.remove"),
        (with_parametrization, {}, r"layer '1': .* torch.nn.utils.parametrize.remove_parametrizations"),
    ],
)
def test_errors_name_the_problem_and_leave_the_network_alone(
    build: Callable[[], nn.Module], arguments: dict[str, object], message: str
) -> None:
    net = build()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=message):
        prune(net, **arguments)  # type: ignore[arg-type]
    for old, new in zip(before, net.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(7), new.detach().nan_to_num(7))


def test_baked_masks_are_welcome() -> None:
    net = with_mask()
    torch_prune.remove(net[1], "weight")  # type: ignore[no-untyped-call]
    prune(net, 0.9)


def test_record_round_trips_through_json() -> None:
    record = prune(random_net(4, 8, 8, 8), pattern="2:4")
    assert PruneRecord.from_json(record.to_json()) == record
    assert json.loads(record.to_json())["layers"][1] == {
        "name": "1", "numel": 576, "nnz": 288, "pattern": "2:4", "reason": None,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": [{"name": "a"}]}', '{"layers": 3}'])
def test_other_json_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="no pruning record"):
        PruneRecord.from_json(text)


def test_record_prints_as_a_table() -> None:
    record = prune(random_net(4, 8, 8, 8), 0.9)
    assert record.density == pytest.approx((288 + 58 + 576) / (288 + 576 + 576))
    assert str(record).splitlines() == [
        "layer  weights  nonzero  density  pattern",
        "0          288      288   100.0%  dense (first convolution)",
        "1          576       58    10.1%  unstructured",
        "2          576      576   100.0%  dense (output layer)",
        "total    1,440      922    64.0%",
    ]


def test_a_module_under_two_names_answers_to_both() -> None:
    net = random_net(4, 4, 4, 4)
    net.append(net[1])
    assert reasons(prune(net, 0.5, skip=["3"], only=["*"])) == {"0": None, "1": "skip", "2": None}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("arguments", [{}, {"scope": "erk"}, {"pattern": "2:4"}])
def test_layers_without_weights(arguments: dict[str, object]) -> None:
    record = prune(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4), nn.Linear(4, 4)), **arguments)  # type: ignore[arg-type]
    assert [layer.density for layer in record.layers] == [0, 0, 1]
    assert str(record).splitlines()[-1].split() == ["total", "16", "16", "100.0%"]
