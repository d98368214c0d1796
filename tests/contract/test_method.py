"""Every method, on CPU and GPU: within the oracle's bound on every kind of layer, whatever the memory looks like."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from contract.cases import METHODS, Work, assert_right, bits, bound, candidates, here, sparse_weight, stable, work
from contract.shapes import FEW, SHAPES
from zeroskip.core.device import cpu
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import Activation, ConvShape, Precision, ResidualPlace
from zeroskip.core.layout import conform, workspace
from zeroskip.measure.bound import Case, Oracle, Stage, check
from zeroskip.methods import registry

pytestmark = pytest.mark.usefixtures("device")

KINDS = {
    **{name: SHAPES[name] for name in ("1x1", "many channels 1x1", "depthwise")},
    "3x3": replace(SHAPES["3x3"], n=2),
    "linear": ConvShape(9, 45, 1, 1, 23, 1, 1),
}
"""A layer for each kind of method: every one of ours takes one of them at least, but those that want 2:4 zeros."""


def of_kind(kind: str, **how: Any) -> Work:
    """A layer of ``KINDS``; ``how`` as for ``work``."""
    return work(KINDS[kind], linear=kind == "linear", **how)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_every_geometry_is_within_the_bound(name: str, shape: str) -> None:
    assert_right(name, work(SHAPES[shape]), count=3)


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("name", METHODS)
def test_every_candidate_is_within_the_bound(name: str, shape: str) -> None:
    assert_right(name, work(SHAPES[shape], activation="relu", residual="before"), count=None)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 17, 70])
@pytest.mark.parametrize("name", METHODS)
def test_linear_layers_are_within_the_bound(name: str, rows: int) -> None:
    assert_right(name, work(ConvShape(rows, 45, 1, 1, 23, 1, 1), linear=True, activation="relu"), count=3)


@pytest.mark.parametrize("name", METHODS)
def test_every_candidate_for_a_linear_layer_is_within_the_bound(name: str) -> None:
    assert_right(name, work(ConvShape(9, 300, 1, 1, 31, 1, 1), linear=True), count=None)


@pytest.mark.parametrize("residual", ["none", "before", "after"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_every_epilogue_is_within_the_bound(
    name: str, kind: str, bias: bool, activation: Activation, residual: ResidualPlace
) -> None:
    """The weights are large enough that relu6 cuts on both sides."""
    weight = 3 * sparse_weight(KINDS[kind].weight_shape, 0.4)
    job = of_kind(kind, weight=weight, bias=bias, activation=activation, residual=residual)
    assert_right(name, job, count=1)


@pytest.mark.parametrize("kind", ["3x3", "1x1", "depthwise"])
@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
@stable(25)
def test_random_layers_are_within_the_bound(name: str, kind: str, data: st.DataObject) -> None:
    """Kernels of any size, or of one pixel without padding, or of one input channel each."""

    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    of_kind(kind).segment(registry()[name])
    groups = draw(1, 40) if kind == "depthwise" else data.draw(st.sampled_from([1, 1, 1, 2, 4]))
    n, k = data.draw(st.sampled_from([1, 1, 2, 5])), draw(1, 2 if kind == "depthwise" else 9) * groups
    c = groups if kind == "depthwise" else draw(1, 12) * groups
    h, w = draw(1, 40), draw(1, 40)
    stride = (1, 1) if data.draw(st.booleans()) else (draw(1, 3), draw(1, 3))
    r, s, padding, dilation = 1, 1, (0, 0), (1, 1)
    if kind != "1x1":
        r, s, padding, dilation = draw(1, 7), draw(1, 7), (draw(0, 3), draw(0, 3)), (draw(1, 2), draw(1, 2))
    assume(h + 2 * padding[0] > dilation[0] * (r - 1) and w + 2 * padding[1] > dilation[1] * (s - 1))
    shape = ConvShape(n, c, h, w, k, r, s, stride, padding, dilation, groups)
    activation = data.draw(st.sampled_from(["none", "relu", "relu6"]))
    residual = data.draw(st.sampled_from(["none", "none", "before", "after"]))
    seed = draw(0, 1000)
    job = work(
        shape,
        density=data.draw(st.sampled_from([0.02, 0.1, 0.5, 1.0])),
        bias=data.draw(st.booleans()),
        activation=activation,
        residual=residual,
        seed=seed,
    )
    try:
        job.segment(registry()[name])
    except pytest.skip.Exception:
        reject()
    assert_right(name, job, count=2, seed=seed)


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_every_precision_is_within_the_bound(name: str, shape: str, precision: Precision) -> None:
    assert_right(name, work(SHAPES[shape], activation="relu", residual="before", precision=precision))


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
@pytest.mark.parametrize("rows", [1, 3, 9, 70])
@pytest.mark.parametrize("name", METHODS)
def test_linear_layers_of_every_precision_are_within_the_bound(name: str, rows: int, precision: Precision) -> None:
    for residual in ("none", "after"):
        job = work(ConvShape(rows, 45, 1, 1, 23, 1, 1), linear=True, residual=residual, precision=precision)
        assert_right(name, job)


def mask(kind: str, shape: ConvShape) -> Tensor:
    """A weight of ``shape`` with zeros as ``MASKS[kind]`` wants them."""
    density, keep = MASKS[kind]
    return keep(*shape.weight_shape).expand(shape.weight_shape) * sparse_weight(shape.weight_shape, density)


def only(index: int, size: int, dim: int) -> Tensor:
    """1 at one place of a dimension, else 0."""
    return (torch.arange(size) == index).float().reshape([-1 if at == dim else 1 for at in range(4)])


MASKS: dict[str, tuple[float, Callable[[int, int, int, int], Tensor]]] = {
    "all zero": (0.0, lambda k, c, r, s: torch.zeros(1)),
    "one nonzero": (1.0, lambda k, c, r, s: only(k // 3, k, 0) * only(c - 1, c, 1) * only(r - 1, r, 2) * only(0, s, 3)),
    "filters": (1.0, lambda k, c, r, s: (torch.arange(k) % 2).reshape(k, 1, 1, 1)),
    "one long row": (1.0, lambda k, c, r, s: only(k // 2, k, 0)),
    "unused input channels": (0.4, lambda k, c, r, s: only(c // 2, c, 1)),
    "corner taps": (0.4, lambda k, c, r, s: (only(0, r, 2) + only(r - 1, r, 2)) * (only(0, s, 3) + only(s - 1, s, 3))),
    "dense": (1.0, lambda k, c, r, s: torch.ones(1)),
    "tiny and huge": (0.4, lambda k, c, r, s: torch.logspace(-12, 12, k).reshape(k, 1, 1, 1)),
}
"""How much is left at random of what a function of k, c, r, s keeps or scales."""


@pytest.mark.parametrize("zeros", MASKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_mask_is_within_the_bound(name: str, kind: str, zeros: str) -> None:
    assert_right(name, of_kind(kind, weight=mask(zeros, KINDS[kind]), activation="relu"), count=2)


@pytest.mark.parametrize("residual", ["none", "before"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_empty_rows_write_what_the_bias_says(name: str, kind: str, residual: ResidualPlace) -> None:
    job = of_kind(kind, weight=mask("all zero", KINDS[kind]), residual=residual)
    ready = bound(name, job)
    case = job.case()
    stage = Stage(ready, case)
    assert check(stage, Oracle(ready.segment, job.parameters, case)).right
    bias = job.parameters["bias"].to(case.x.device)
    want = (bias if kind == "linear" else bias.reshape(-1, 1, 1)).expand_as(stage()[0])
    if stage.residual is not None:
        want = want + stage.residual
    assert torch.equal(stage()[0], want)


# -- memory -------------------------------------------------------------------------------------------
def surrounded(x: Tensor, halo: tuple[int, int], value: float) -> Tensor:
    """``x`` inside a larger buffer of ``value``: spare images, channels, rows and columns; ``halo`` zeros around it."""
    if x.dim() == 2:
        big = x.new_full((x.shape[0] + 2, x.shape[1]), value)
        big[1:-1] = x
        return big[1:-1]
    n, c, h, w = x.shape
    big = x.new_full((n + 2, c + 2, h + 2 * halo[0] + 2, w + 2 * halo[1] + 2), value)
    inner = big[1:-1, 1:-1, 1:-1, 1:-1]
    inner.zero_()
    view = inner[:, :, halo[0] : halo[0] + h, halo[1] : halo[1] + w]
    return view.copy_(x)


@pytest.mark.parametrize("pick", range(3))
@pytest.mark.parametrize(
    "shape",
    [
        "1x1 in vectors",
        "1x1 stride 2",
        "3x3",
        "3x3 stride 2",
        "3x3 dilation 2",
        "5x5",
        "2x2",
        "depthwise",
        "many channels",
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_outside_the_input_and_its_halo_is_read(name: str, shape: str, pick: int) -> None:
    job = work(SHAPES[shape])
    ready = bound(name, job, pick)
    case = job.case()
    want = ready.candidate.inputs[0]
    stage = Stage(ready, case)
    x = surrounded(case.x, want.halo or (0, 0), torch.nan) if want.order == "nchw" else case.x
    if want.halo == (0, 0):
        guard = torch.full_like(case.x, torch.nan)
        x = torch.cat([guard, case.x, guard], 1)[:, x.shape[1] : -x.shape[1]]
    stage.inputs = [conform(x, want.halo or (0, 0), want)]
    assert stage.inputs[0] is x or want.order == "nhwc", "the candidate's own layout must be taken without a copy"
    assert check(stage, Oracle(ready.segment, job.parameters, case)).right


@pytest.mark.parametrize("pick", range(4))
@pytest.mark.parametrize(
    "shape",
    [
        "1x1",
        "1x1 in vectors",
        "1x1 large batch",
        "3x3",
        "3x3 batch 5 of small images",
        "7x7 stride 2",
        "depthwise",
        "many channels",
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_outside_the_output_is_written(name: str, shape: str, pick: int) -> None:
    """The output is a channel slice of a larger buffer, with a border where the candidate can write into one."""
    job = work(SHAPES[shape])
    ready = bound(name, job, pick)
    if ready.run.allocates:
        pytest.skip(f"{name} returns tensors of its own")
    case = job.case()
    stage = Stage(ready, case)
    n, k, p, q = ready.segment.layer.shape.output_shape
    rows, cols = (2, 3) if ready.candidate.outputs[0].writes_halo else (0, 0)
    big = case.x.new_full((n, k + 5, p + 2 * rows, q + 2 * cols), 7.0)
    y = big[:, 2 : 2 + k, rows : rows + p, cols : cols + q]
    stage.outputs = [y]
    assert check(stage, Oracle(ready.segment, job.parameters, case)).right
    y.fill_(7.0)
    assert bool((big == 7.0).all())


@pytest.mark.parametrize("name", METHODS)
def test_linear_output_may_be_a_slice_of_columns(name: str) -> None:
    job = work(ConvShape(9, 30, 1, 1, 7, 1, 1), linear=True)
    ready = bound(name, job)
    if ready.run.allocates:
        pytest.skip(f"{name} returns tensors of its own")
    case = job.case()
    stage = Stage(ready, case)
    big = case.x.new_full((9, 12), 7.0)
    stage.outputs = [big[:, 3:10]]
    assert check(stage, Oracle(ready.segment, job.parameters, case)).right
    assert bool((big[:, :3] == 7.0).all())
    assert bool((big[:, 10:] == 7.0).all())


@pytest.mark.parametrize("kind", ["channels_last", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("shape", ["1x1", "3x3", "3x3 stride 2"])
@pytest.mark.parametrize("name", METHODS)
def test_inputs_of_any_strides_are_conformed(name: str, shape: str, kind: str) -> None:
    job = work(replace(SHAPES[shape], n=2), residual="before")
    ready = bound(name, job)
    case = job.case()
    assert case.residual is not None

    def twist(x: Tensor) -> Tensor:
        if kind == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if kind == "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        if kind == "sliced":
            return torch.stack([x, x], -1).flatten(3)[..., ::2]
        return x[:1].expand(2, -1, -1, -1)

    case = Case(twist(case.x), twist(case.residual))
    assert check(Stage(ready, case), Oracle(ready.segment, job.parameters, case)).right


@pytest.mark.parametrize("shape", ["1x1", "3x3", "depthwise"])
@pytest.mark.parametrize("name", METHODS)
def test_the_residual_may_be_a_slice_with_a_border(name: str, shape: str) -> None:
    job = work(SHAPES[shape], residual="before")
    ready = bound(name, job)
    case = job.case()
    assert case.residual is not None
    stage = Stage(ready, case)
    stage.residual = conform(surrounded(case.residual, (1, 1), torch.nan), (1, 1), ready.candidate.inputs[1])
    assert check(stage, Oracle(ready.segment, job.parameters, case)).right


# -- NaN and Inf ----------------------------------------------------------------------------------------
def pixels_met(shape: ConvShape, where: tuple[int, ...], weight: Tensor) -> Tensor:
    """Which outputs multiply the input pixel ``where`` by a weight that is not zero."""
    x = torch.zeros(shape.input_shape)
    x[where] = 1
    used = (weight != 0).float().reshape(shape.weight_shape)
    return functional.conv2d(x, used, None, shape.stride, shape.padding, shape.dilation, shape.groups) > 0.5


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", ["1x1", "3x3", "3x3 stride 2", "3x3 batch 5 of small images"])
@pytest.mark.parametrize("name", METHODS)
def test_nan_and_inf_in_the_input_reach_what_they_touch(
    name: str, shape: str, value: float, activation: Activation
) -> None:
    job = work(SHAPES[shape], activation=activation)
    ready = bound(name, job)
    case = job.case()
    geometry, weight = ready.segment.layer.shape, job.parameters["weight"]
    where = (geometry.n - 1, 1, geometry.h // 2, geometry.w // 2)
    case.x[where] = value
    x, y = case.x.cpu(), Stage(ready, case)()[0].cpu()
    met, seen = pixels_met(geometry, where, weight), pixels_met(geometry, where, torch.ones_like(weight))
    assert y[~seen].isfinite().all()
    if value != value:
        assert y[met].isnan().all()
    else:
        want = functional.conv2d(
            x, weight, job.parameters["bias"], geometry.stride, geometry.padding, geometry.dilation
        )
        signs = torch.zeros_like(x)
        signs[where] = value
        raw = functional.conv2d(signs.sign(), weight.sign(), None, geometry.stride, geometry.padding, geometry.dilation)
        want = torch.where(met, raw * torch.inf, want)
        want = (
            functional.relu(want) if activation == "relu" else functional.relu6(want) if activation == "relu6" else want
        )
        assert torch.equal(y[met], want[met])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", ["1x1", "3x3", "depthwise"])
@pytest.mark.parametrize("name", METHODS)
def test_dense_weights_spread_nan_and_inf_as_torch_does(name: str, shape: str, value: float) -> None:
    job, geometry = work(SHAPES[shape], density=1.1), SHAPES[shape]
    ready = bound(name, job)
    case = job.case()
    case.x[0, 2, 5, 5] = value
    weight, bias = job.parameters["weight"], job.parameters["bias"]
    want = functional.conv2d(case.x.cpu(), weight, bias, padding=geometry.padding, groups=geometry.groups)
    y = Stage(ready, case)()[0].cpu()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_a_nan_weight_shows(name: str, kind: str) -> None:
    weight = sparse_weight(KINDS[kind].weight_shape, 0.2)
    k, c, r, s = weight.shape
    weight[4, c // 2, r // 2, s // 2] = torch.nan
    job = of_kind(kind, weight=weight, activation="relu")
    ready = bound(name, job)
    y = Stage(ready, job.case())()[0].cpu()
    assert y[:, 4].isnan().all()
    assert y[:, [row for row in range(k) if row != 4]].isfinite().all()


@pytest.mark.parametrize("residual", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_a_nan_residual_shows_where_it_is(name: str, kind: str, residual: ResidualPlace) -> None:
    job = of_kind(kind, activation="relu6", residual=residual)
    ready = bound(name, job)
    case = job.case()
    assert case.residual is not None
    case.residual.flatten()[case.residual.numel() // 2] = torch.nan
    y = Stage(ready, case)()[0]
    assert torch.equal(y.isnan(), case.residual.isnan())


# -- bits ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pick", range(3))
@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("name", METHODS)
def test_two_runs_give_the_same_bits(name: str, shape: str, pick: int) -> None:
    job = work(SHAPES[shape], residual="after", activation="relu")
    ready = bound(name, job, pick)
    case = job.case()
    assert torch.equal(bits(ready, case), bits(ready, case))


@pytest.mark.parametrize("name", METHODS)
def test_four_python_threads_may_share_one_bound_segment(name: str) -> None:
    job = work(SHAPES["many channels"], activation="relu")
    ready = bound(name, job)
    if here().kind == "cuda" and ready.method.exploits == "nothing":
        pytest.skip("cuDNN chooses its algorithms per thread; engines run it in one")
    cases = [job.case(seed) for seed in range(4)]
    want = [bits(ready, case) for case in cases]

    def repeat(index: int) -> bool:
        return all(torch.equal(bits(ready, cases[index]), want[index]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


# -- the contract's small print -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_the_folder_names_the_method_and_it_says_where_it_comes_from(name: str) -> None:
    method = registry()[name]
    assert method.name == name
    assert method.cite
    assert method.exploits in ("weights", "inputs", "both", "nothing")


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("name", METHODS)
def test_candidates_describe_every_edge_and_differ(name: str, shape: str) -> None:
    method, job = registry()[name], work(SHAPES[shape], residual="before")
    segment = job.segment(method)
    found = candidates(method, segment)
    assert all(len(one.inputs) == 2 and len(one.outputs) == 1 for one in found)
    assert all(one.float16_terms == 0 for one in found)
    assert len({one.config for one in found}) == len(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_configs_survive_json(name: str, kind: str) -> None:
    method = registry()[name]
    segment = of_kind(kind).segment(method)
    for one in candidates(method, segment):
        again: Any = from_json(method.config_type, to_json(one.config))
        assert again == one.config


@pytest.mark.parametrize("name", METHODS)
def test_workspace_is_as_large_as_declared(name: str) -> None:
    """A guard behind the workspace stays untouched."""
    job, device = work(SHAPES["many channels"]), here() if here().kind == "cuda" else cpu(2)
    ready = bound(name, job, device=device)
    size = ready.run.workspace_bytes
    if not size:
        pytest.skip(f"{name} needs no workspace")
    stage = Stage(ready, job.case())
    memory = workspace(size + 4096, device.torch)
    assert memory is not None
    memory.fill_(123)
    stage.workspace = memory[:size]
    stage()
    assert bool((memory[size:] == 123).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_cost_counts_no_zero_weight(name: str, kind: str) -> None:
    method, shape = registry()[name], KINDS[kind]
    segment = of_kind(kind, density=0.1, bias=False).segment(method)
    assert method.cost(segment).flops == 2 * segment.layer.weights.nnz * shape.n * shape.p * shape.q
