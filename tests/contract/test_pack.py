"""Every method: what is packed is what was given."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contract.cases import METHODS, Work, bound, candidates, here, some, stable, work
from zeroskip.core.layer import ConvShape
from zeroskip.measure.bound import Stage, bind, packed_bytes
from zeroskip.methods import registry

pytestmark = pytest.mark.usefixtures("device")
MASKS = ("all zero", "all dense", "one nonzero", "one long row", "empty rows", "filters", "random", "negative zero")


def masked(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(shape, generator=generator) + 0.5
    keep = torch.rand(shape, generator=generator) < 0.3
    row = seed % shape[0]
    if kind == "all zero":
        keep[:] = False
    elif kind == "all dense":
        keep[:] = True
    elif kind == "one nonzero":
        keep[:] = False
        keep.view(-1)[seed % keep.numel()] = True
    elif kind == "one long row":
        keep[:] = False
        keep[row] = True
    elif kind == "empty rows":
        keep[row:] = False
    elif kind == "filters":
        keep[:] = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) < 0.5
    return torch.where(keep, weight, -0.0 if kind == "negative zero" else 0.0)


def assert_round_trip(name: str, job: Work, seed: int) -> None:
    method = registry()[name]
    segment = job.segment(method)
    for candidate in some(candidates(method, segment), 2, seed):
        unpacked = method.unpack(method.pack(segment, job.parameters, candidate.config))
        assert tuple(unpacked.shape) == segment.layer.shape.weight_shape
        assert torch.equal(unpacked, job.parameters["weight"].reshape(unpacked.shape))


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
@stable(60)
def test_unpack_returns_the_weights_exactly(name: str, data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    size = st.integers(1, 4)
    c, k, r, s = (
        data.draw(st.integers(1, 9)) * groups,
        data.draw(st.integers(1, 9)) * groups,
        data.draw(size),
        data.draw(size),
    )
    stride, dilation = (
        data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        data.draw(st.sampled_from([(1, 1), (2, 1)])),
    )
    shape = ConvShape(1, c, 12, 10, k, r, s, stride, (r // 2, s // 2), dilation, groups)
    seed = data.draw(st.integers(0, 1000))
    weight = masked(shape.weight_shape, data.draw(st.sampled_from(MASKS)), seed)
    assert_round_trip(name, work(shape, weight=weight, bias=data.draw(st.booleans())), seed)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", METHODS)
def test_unpack_returns_linear_weights_exactly(name: str, kind: str) -> None:
    shape = ConvShape(3, 37, 1, 1, 21, 1, 1)
    assert_round_trip(name, work(shape, linear=True, weight=masked(shape.weight_shape, kind, 5)), 5)


@pytest.mark.parametrize("name", METHODS)
def test_packing_leaves_the_parameters_alone(name: str) -> None:
    job = work(ConvShape(1, 6, 8, 8, 6, 3, 3, padding=(1, 1)), weight=masked((6, 6, 3, 3), "negative zero", 1))
    before = {key: tensor.clone() for key, tensor in job.parameters.items()}
    bound(name, job)
    assert all(torch.equal(before[key], tensor) for key, tensor in job.parameters.items())


def moved(record: Any) -> Any:
    """The same record with every tensor copied elsewhere."""
    if isinstance(record, Tensor):
        return record.clone()
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return dataclasses.replace(
            record, **{field.name: moved(getattr(record, field.name)) for field in dataclasses.fields(record)}
        )
    return record


@pytest.mark.parametrize("name", METHODS)
def test_a_packed_record_computes_the_same_from_other_memory(name: str) -> None:
    job = work(ConvShape(2, 9, 11, 7, 8, 3, 3, padding=(1, 1)), activation="relu")
    first = bound(name, job)
    case = job.case()
    want = Stage(first, case)()[0].clone()
    packed = moved(first.packed)
    built = first.method.build(packed, here())
    other = dataclasses.replace(first, packed=packed, run=first.method.bind(first.segment, packed, built, here()))
    del first
    assert torch.equal(Stage(other, case)()[0], want)
    assert packed_bytes(packed) > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_packed_record_does_not_follow_later_changes_of_the_model(name: str) -> None:
    """Only where the method keeps its own copy; a library may share the model's tensor, never half of it."""
    job = work(ConvShape(1, 9, 11, 7, 8, 1, 1))
    method = registry()[name]
    if method.exploits == "nothing":
        pytest.skip("a dense library may keep the tensor it was given")
    segment = job.segment(method)
    candidate = candidates(method, segment)[0]
    stage = Stage(bind(method, segment, job.parameters, candidate, here()), job.case())
    want = stage()[0].clone()
    job.parameters["weight"].mul_(2)
    assert torch.equal(stage()[0], want)
