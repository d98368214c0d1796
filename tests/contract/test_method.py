"""Every method: within the oracle's bound on every kind of layer, whatever the memory looks like."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from contract.cases import METHODS, OURS, assert_right, bound, candidates, lanes, sparse_weight, stable, work
from zeroskip.core.device import cpu
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import Activation, ConvShape, ResidualPlace
from zeroskip.core.layout import conform, workspace
from zeroskip.measure.bound import Bound, Case, Oracle, Stage, bind, check
from zeroskip.methods import registry

SHAPES = {
    "1x1": ConvShape(1, 5, 7, 9, 6, 1, 1),
    "1x1 one pixel": ConvShape(1, 33, 1, 1, 17, 1, 1),
    "1x1 large batch": ConvShape(5, 12, 3, 17, 7, 1, 1),
    "1x1 stride 2": ConvShape(2, 8, 9, 14, 7, 1, 1, (2, 2)),
    "1x1 padded": ConvShape(1, 12, 13, 13, 10, 1, 1, padding=(1, 1)),
    "1x1 padded by 3": ConvShape(1, 4, 2, 3, 5, 1, 1, padding=(3, 2)),
    "3x3": ConvShape(1, 8, 13, 11, 9, 3, 3, padding=(1, 1)),
    "3x3 unpadded": ConvShape(2, 7, 10, 23, 5, 3, 3),
    "3x3 overpadded": ConvShape(1, 3, 5, 4, 4, 3, 3, padding=(4, 3)),
    "3x3 one pixel": ConvShape(1, 9, 1, 1, 8, 3, 3, padding=(1, 1)),
    "3x3 batch 5 of small images": ConvShape(5, 16, 4, 5, 12, 3, 3, padding=(1, 1)),
    "3x3 stride 2": ConvShape(1, 8, 14, 9, 6, 3, 3, (2, 2), (1, 1)),
    "3x3 stride 2x1": ConvShape(2, 5, 9, 12, 6, 3, 3, (2, 1), (1, 1)),
    "3x3 stride 1x2": ConvShape(1, 5, 9, 33, 6, 3, 3, (1, 2), (1, 1)),
    "3x3 stride 3": ConvShape(1, 5, 20, 19, 6, 3, 3, (3, 3)),
    "3x3 stride 4x5": ConvShape(1, 5, 20, 38, 6, 3, 3, (4, 5), (1, 2)),
    "3x3 dilation 2": ConvShape(1, 6, 12, 11, 5, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "3x3 dilation 1x3": ConvShape(2, 6, 8, 16, 5, 3, 3, padding=(1, 3), dilation=(1, 3)),
    "3x3 stride 2 dilation 2": ConvShape(1, 6, 17, 16, 5, 3, 3, (2, 2), (2, 2), (2, 2)),
    "3x3 stride 2 dilation 3": ConvShape(1, 6, 17, 16, 5, 3, 3, (2, 2), (3, 3), (3, 3)),
    "5x5": ConvShape(1, 4, 12, 40, 5, 5, 5, padding=(2, 2)),
    "7x7 stride 2": ConvShape(1, 3, 31, 40, 8, 7, 7, (2, 2), (3, 3)),
    "1x5": ConvShape(1, 6, 9, 14, 7, 1, 5, padding=(0, 2)),
    "5x1": ConvShape(1, 6, 9, 14, 7, 5, 1, padding=(2, 0)),
    "1x7 as large as the image": ConvShape(1, 6, 3, 7, 7, 1, 7),
    "2x2": ConvShape(1, 6, 9, 8, 7, 2, 2),
    "2x2 stride 2": ConvShape(3, 6, 8, 10, 7, 2, 2, (2, 2)),
    "2x2 padded": ConvShape(1, 6, 8, 10, 7, 2, 2, (1, 1), (1, 1)),
    "one column": ConvShape(1, 7, 40, 1, 6, 3, 1, padding=(1, 0)),
    "one row": ConvShape(2, 7, 1, 37, 6, 1, 3, padding=(0, 1)),
    "groups 2": ConvShape(1, 8, 9, 10, 6, 3, 3, padding=(1, 1), groups=2),
    "groups 3 of 1x1": ConvShape(2, 9, 6, 7, 12, 1, 1, groups=3),
    "depthwise": ConvShape(1, 9, 11, 12, 9, 3, 3, padding=(1, 1), groups=9),
    "depthwise stride 2": ConvShape(2, 8, 11, 12, 8, 3, 3, (2, 2), (1, 1), groups=8),
    "depthwise multiplier 2": ConvShape(1, 5, 8, 9, 10, 3, 3, padding=(1, 1), groups=5),
    "one channel": ConvShape(1, 1, 9, 9, 1, 3, 3, padding=(1, 1)),
    "many channels": ConvShape(1, 201, 8, 9, 20, 3, 3, padding=(1, 1)),
    "many channels 1x1": ConvShape(2, 700, 5, 6, 12, 1, 1),
    "empty batch": ConvShape(0, 6, 8, 8, 5, 3, 3, padding=(1, 1)),
}
FEW = ("1x1", "3x3 stride 2", "3x3 batch 5 of small images", "many channels")


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
@pytest.mark.parametrize("name", METHODS)
def test_every_epilogue_is_within_the_bound(name: str, activation: Activation, residual: ResidualPlace) -> None:
    """The weights are large enough that relu6 cuts on both sides."""
    for kind, shape in (
        ("conv", ConvShape(2, 8, 7, 9, 6, 3, 3, padding=(1, 1))),
        ("flat", ConvShape(1, 20, 5, 7, 6, 1, 1)),
        ("linear", ConvShape(3, 20, 1, 1, 6, 1, 1)),
    ):
        for bias in (False, True):
            assert_right(
                name,
                work(
                    shape,
                    linear=kind == "linear",
                    weight=3 * sparse_weight(shape.weight_shape, 0.4),
                    bias=bias,
                    activation=activation,
                    residual=residual,
                ),
                count=1,
            )


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
@stable(25)
def test_random_layers_are_within_the_bound(name: str, data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = data.draw(st.sampled_from([1, 1, 1, 2, 4]))
    n, c, k = data.draw(st.sampled_from([1, 1, 2, 5])), draw(1, 12) * groups, draw(1, 9) * groups
    r, s, h, w = draw(1, 7), draw(1, 7), draw(1, 40), draw(1, 40)
    stride, padding, dilation = (draw(1, 3), draw(1, 3)), (draw(0, 3), draw(0, 3)), (draw(1, 2), draw(1, 2))
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
    assert_right(name, job, count=2, seed=seed)


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("floats", [4, 8, 16])
@pytest.mark.parametrize("name", OURS)
def test_every_vector_width_is_within_the_bound(name: str, floats: int, shape: str) -> None:
    assert_right(name, work(SHAPES[shape], residual="after"), count=2, device=lanes(cpu(1), floats))


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("name", METHODS)
def test_two_threads_are_within_the_bound(name: str, shape: str) -> None:
    assert_right(name, work(SHAPES[shape]), count=3, device=cpu(2))


WEIGHTS = {
    "all zero": torch.zeros(9, 8, 3, 3),
    "one nonzero": torch.zeros(9, 8, 3, 3).index_put(
        (torch.tensor(3), torch.tensor(7), torch.tensor(2), torch.tensor(0)), torch.tensor(2.0)
    ),
    "filters": sparse_weight((9, 8, 3, 3), 1.0) * (torch.arange(9) % 2).reshape(9, 1, 1, 1),
    "one long row": sparse_weight((9, 8, 3, 3), 1.0) * (torch.arange(9) == 4).reshape(9, 1, 1, 1),
    "unused input channels": sparse_weight((9, 8, 3, 3), 0.4) * (torch.arange(8) == 5).reshape(1, 8, 1, 1),
    "corner taps": sparse_weight((9, 8, 3, 3), 0.4) * torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1]]),
    "dense": sparse_weight((9, 8, 3, 3), 1.0),
    "tiny and huge": sparse_weight((9, 8, 3, 3), 0.4) * torch.logspace(-12, 12, 9).reshape(9, 1, 1, 1),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_mask_is_within_the_bound(name: str, kind: str) -> None:
    assert_right(name, work(SHAPES["3x3"], weight=WEIGHTS[kind], activation="relu"), count=2)


@pytest.mark.parametrize("residual", ["none", "before"])
@pytest.mark.parametrize("name", METHODS)
def test_empty_rows_write_what_the_bias_says(name: str, residual: ResidualPlace) -> None:
    job = work(SHAPES["3x3"], weight=WEIGHTS["all zero"], residual=residual)
    ready = bound(name, job)
    stage = Stage(ready, Case.random(ready.segment))
    assert check(stage, Oracle(ready.segment, job.parameters, Case.random(ready.segment))).right
    want = job.parameters["bias"].reshape(-1, 1, 1).expand(9, 13, 11)[None]
    if stage.residual is not None:
        want = want + stage.residual
    assert torch.equal(stage()[0], want)


# -- memory -------------------------------------------------------------------------------------------
def surrounded(x: Tensor, halo: tuple[int, int], value: float) -> Tensor:
    """``x`` inside a larger buffer of ``value``: spare images, channels, rows and columns; ``halo`` zeros around it."""
    if x.dim() == 2:
        big = torch.full((x.shape[0] + 2, x.shape[1]), value)
        big[1:-1] = x
        return big[1:-1]
    n, c, h, w = x.shape
    big = torch.full((n + 2, c + 2, h + 2 * halo[0] + 2, w + 2 * halo[1] + 2), value)
    inner = big[1:-1, 1:-1, 1:-1, 1:-1]
    inner.zero_()
    view = inner[:, :, halo[0] : halo[0] + h, halo[1] : halo[1] + w]
    return view.copy_(x)


@pytest.mark.parametrize("pick", range(3))
@pytest.mark.parametrize(
    "shape", ["1x1 stride 2", "3x3", "3x3 stride 2", "3x3 dilation 2", "5x5", "2x2", "many channels"]
)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_outside_the_input_and_its_halo_is_read(name: str, shape: str, pick: int) -> None:
    job = work(SHAPES[shape])
    ready = bound(name, job, pick)
    case = Case.random(ready.segment)
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
    ["1x1", "1x1 large batch", "3x3", "3x3 batch 5 of small images", "7x7 stride 2", "depthwise", "many channels"],
)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_outside_the_output_is_written(name: str, shape: str, pick: int) -> None:
    """The output is a channel slice of a larger buffer, with a border where the candidate can write into one."""
    job = work(SHAPES[shape])
    ready = bound(name, job, pick)
    if ready.run.allocates:
        pytest.skip(f"{name} returns tensors of its own")
    case = Case.random(ready.segment)
    stage = Stage(ready, case)
    n, k, p, q = ready.segment.layer.shape.output_shape
    rows, cols = (2, 3) if ready.candidate.outputs[0].writes_halo else (0, 0)
    big = torch.full((n, k + 5, p + 2 * rows, q + 2 * cols), 7.0)
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
    case = Case.random(ready.segment)
    stage = Stage(ready, case)
    big = torch.full((9, 12), 7.0)
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
    case = Case.random(ready.segment)
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


@pytest.mark.parametrize("name", METHODS)
def test_the_residual_may_be_a_slice_with_a_border(name: str) -> None:
    job = work(SHAPES["3x3"], residual="before")
    ready = bound(name, job)
    case = Case.random(ready.segment)
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
    case = Case.random(ready.segment)
    geometry, weight = ready.segment.layer.shape, job.parameters["weight"]
    where = (geometry.n - 1, 1, geometry.h // 2, geometry.w // 2)
    case.x[where] = value
    y = Stage(ready, case)()[0]
    met, seen = pixels_met(geometry, where, weight), pixels_met(geometry, where, torch.ones_like(weight))
    assert y[~seen].isfinite().all()
    if value != value:
        assert y[met].isnan().all()
    else:
        want = functional.conv2d(
            case.x, weight, job.parameters["bias"], geometry.stride, geometry.padding, geometry.dilation
        )
        signs = torch.zeros_like(case.x)
        signs[where] = value
        raw = functional.conv2d(signs.sign(), weight.sign(), None, geometry.stride, geometry.padding, geometry.dilation)
        want = torch.where(met, raw * torch.inf, want)
        want = (
            functional.relu(want) if activation == "relu" else functional.relu6(want) if activation == "relu6" else want
        )
        assert torch.equal(y[met], want[met])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", METHODS)
def test_dense_weights_spread_nan_and_inf_as_torch_does(name: str, value: float) -> None:
    job = work(SHAPES["3x3"], density=1.1)
    ready = bound(name, job)
    case = Case.random(ready.segment)
    case.x[0, 2, 5, 5] = value
    want = functional.conv2d(case.x, job.parameters["weight"], job.parameters["bias"], padding=1)
    y = Stage(ready, case)()[0]
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())


@pytest.mark.parametrize("name", METHODS)
def test_a_nan_weight_shows(name: str) -> None:
    weight = sparse_weight((9, 8, 3, 3), 0.2)
    weight[4, 3, 1, 1] = torch.nan
    ready = bound(name, work(SHAPES["3x3"], weight=weight, activation="relu"))
    y = Stage(ready, Case.random(ready.segment))()[0]
    assert y[:, 4].isnan().all()
    assert y[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("residual", ["before", "after"])
@pytest.mark.parametrize("name", METHODS)
def test_a_nan_residual_shows_where_it_is(name: str, residual: ResidualPlace) -> None:
    ready = bound(name, work(SHAPES["3x3"], activation="relu6", residual=residual))
    case = Case.random(ready.segment)
    assert case.residual is not None
    case.residual[0, 3, 4, 5] = torch.nan
    y = Stage(ready, case)()[0]
    assert torch.equal(y.isnan(), case.residual.isnan())


# -- bits ------------------------------------------------------------------------------------------------
def bits(ready: Bound, case: Case) -> Tensor:
    stage = Stage(ready, case)
    if stage.workspace is not None:
        stage.workspace.fill_(255)
    return stage()[0].clone().view(torch.int32)


@pytest.mark.parametrize("pick", range(3))
@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("name", METHODS)
def test_two_runs_give_the_same_bits(name: str, shape: str, pick: int) -> None:
    job = work(SHAPES[shape], residual="after", activation="relu")
    ready = bound(name, job, pick)
    case = Case.random(ready.segment)
    assert torch.equal(bits(ready, case), bits(ready, case))


@pytest.mark.parametrize("pick", range(3))
@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("name", OURS)
def test_one_and_two_threads_give_the_same_bits(name: str, shape: str, pick: int) -> None:
    job = work(SHAPES[shape])
    method = registry()[name]
    segment = job.segment(method)
    found = candidates(method, segment, cpu(2))
    candidate, case = found[pick % len(found)], Case.random(segment)
    results = [bits(bind(method, segment, job.parameters, candidate, cpu(threads)), case) for threads in (1, 2, 3)]
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("name", METHODS)
def test_four_python_threads_may_share_one_bound_segment(name: str) -> None:
    job = work(SHAPES["many channels"], activation="relu")
    ready = bound(name, job)
    cases = [Case.random(ready.segment, seed) for seed in range(4)]
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
    found = candidates(method, segment, cpu(1))
    assert all(len(one.inputs) == 2 and len(one.outputs) == 1 for one in found)
    assert len({one.config for one in found}) == len(found)


@pytest.mark.parametrize("name", METHODS)
def test_configs_survive_json(name: str) -> None:
    method = registry()[name]
    segment = work(SHAPES["3x3"]).segment(method)
    for one in candidates(method, segment, cpu(1)):
        again: Any = from_json(method.config_type, to_json(one.config))
        assert again == one.config


@pytest.mark.parametrize("name", METHODS)
def test_workspace_is_as_large_as_declared(name: str) -> None:
    """A guard behind the workspace stays untouched."""
    ready = bound(name, work(SHAPES["many channels"]), threads=2)
    size = ready.run.workspace_bytes
    if not size:
        pytest.skip(f"{name} needs no workspace")
    stage = Stage(ready, Case.random(ready.segment))
    memory = workspace(size + 4096)
    assert memory is not None
    memory.fill_(123)
    stage.workspace = memory[:size]
    stage()
    assert bool((memory[size:] == 123).all())


@pytest.mark.parametrize("name", METHODS)
def test_cost_counts_no_zero_weight(name: str) -> None:
    method = registry()[name]
    segment = work(SHAPES["3x3"], density=0.1, bias=False).segment(method)
    layer = segment.layer
    assert method.cost(segment).flops == 2 * layer.weights.nnz * 13 * 11
