"""Packing and building ahead of binding, and tuning what was tuned before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from zeroskip.core.device import Device, cpu
from zeroskip.core.graph import Segment
from zeroskip.core.layer import ConvShape, Layer, Sparsity
from zeroskip.core.method import Candidate
from zeroskip.core.record import Times
from zeroskip.measure.bound import Case, Oracle, Stage, bind, check, prepare
from zeroskip.measure.others import Timing
from zeroskip.measure.timer import Measurement, Variants
from zeroskip.methods import registry
from zeroskip.plan.tune import remembering, tune

DEVICE = cpu(1)


def job(density: float = 0.2) -> tuple[Segment, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((8, 16, 1, 1), generator=generator)
    weight[torch.rand(weight.shape, generator=generator) > density] = 0
    layer = Layer("l", "conv2d", ConvShape(1, 16, 6, 6, 8, 1, 1), "fp32", Sparsity.of(weight))
    return Segment(("l",), ("x",), ("l",), (layer,)), {"weight": weight}


class Clock:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, variants: Variants, rounds: int, device: Device) -> Measurement:
        self.asked += 1
        return Measurement({name: Times((float(len(name)),), "cpu") for name in variants}, False)


@pytest.mark.parametrize("name", ["dense", "escort"])
def test_what_was_prepared_is_bound_to_the_same_values(name: str) -> None:
    segment, parameters = job()
    method = registry()[name]
    candidate = method.configs(segment, DEVICE)[0]
    ready = prepare(method, segment, parameters, candidate, DEVICE)
    bound = bind(method, segment, parameters, candidate, DEVICE, ready)
    assert bound.packed is ready.packed
    assert bound.pack_seconds >= ready.pack_seconds
    assert bound.build_seconds >= ready.build_seconds
    case = Case.random(segment)
    assert check(Stage(bound, case), Oracle(segment, parameters, case)).right


def test_a_kernel_is_compiled_without_a_gpu() -> None:
    from zeroskip.cuda import compile as nvrtc

    if reason := nvrtc.ready():
        pytest.skip(reason)
    segment, parameters = job()
    gpu = Device("cuda", "none", 1, arch="sm_90a", num_sms=132, shared_bytes=200_000)
    method = registry()["sputnik"]
    ready = prepare(method, segment, parameters, method.configs(segment, gpu)[0], gpu)
    assert ready.built
    assert torch.equal(method.unpack(ready.packed).reshape(8, 16, 1, 1), parameters["weight"])


def test_candidates_may_be_given_instead_of_the_methods_own() -> None:
    segment, parameters = job()
    methods = {"dense": registry()["dense"]}
    chosen: Mapping[str, list[Candidate[Any]]] = {"dense": [methods["dense"].configs(segment, DEVICE)[-1]]}
    found = tune(segment, methods, parameters, Timing(DEVICE, Clock()), chosen)
    assert [option.candidate for option in found.options] == chosen["dense"]


def test_a_layer_is_tuned_once_where_that_is_remembered() -> None:
    segment, parameters = job()
    both = {name: registry()[name] for name in ("dense", "escort")}
    dense = {"dense": both["dense"]}
    clock = Clock()
    with remembering():
        first = tune(segment, both, parameters, Timing(DEVICE, clock))
        again = tune(segment, dense, parameters, Timing(DEVICE, clock))
        assert clock.asked == 1
        assert again.options == tuple(option for option in first.options if option.method == "dense")
        other, more = job(0.6)
        tune(other, both, more, Timing(DEVICE, clock))
        assert clock.asked == 2
    tune(segment, both, parameters, Timing(DEVICE, clock))
    assert clock.asked == 3


def test_more_methods_than_were_remembered_are_tuned() -> None:
    segment, parameters = job()
    both = {name: registry()[name] for name in ("dense", "escort")}
    clock = Clock()
    with remembering():
        tune(segment, {"dense": both["dense"]}, parameters, Timing(DEVICE, clock))
        found = tune(segment, both, parameters, Timing(DEVICE, clock))
        assert clock.asked == 2
        assert {option.method for option in found.options} == set(both)


def test_nothing_to_run_is_no_option() -> None:
    segment, parameters = job()
    clock = Clock()
    found = tune(segment, {}, parameters, Timing(DEVICE, clock))
    assert (found.options, found.rejected, clock.asked) == ((), (), 0)
