"""The check finds planted faults, every time: a bound that catches nothing would make every other test here worthless.

Weights lie between 0.5 and 1.5 in size, so that no fault hides behind a weight near zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contract.cases import METHODS, OURS, Work, bound, candidates, here, stable, work
from zeroskip.core.layer import ConvShape, Epilogue
from zeroskip.measure.bound import Bound, Oracle, Stage, bind, check
from zeroskip.methods import registry
from zeroskip.pack.stretched import Stretched

SHAPES = (
    ConvShape(1, 12, 9, 11, 8, 3, 3, padding=(1, 1)),
    ConvShape(2, 24, 5, 7, 9, 1, 1),
    ConvShape(1, 6, 12, 13, 8, 3, 3, (2, 2), (1, 1)),
)
pytestmark = pytest.mark.usefixtures("device")
TRIALS = stable(40)
shapes, seeds = st.sampled_from(SHAPES), st.integers(0, 10_000)


def large(shape: Sequence[int], seed: int, density: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(tuple(shape), generator=generator) + 0.5
    sign = torch.where(torch.rand(tuple(shape), generator=generator) < 0.5, -1.0, 1.0)
    weight = torch.where(torch.rand(tuple(shape), generator=generator) < density, size * sign, 0.0)
    weight.view(-1)[seed % weight.numel()] = 1.0
    return weight


def layer(shape: ConvShape, seed: int, **more: Any) -> Work:
    return work(shape, weight=large(shape.weight_shape, seed), seed=seed, **more)


def caught(ready: Bound, job: Work, seed: int, truth: Bound | None = None) -> bool:
    """Whether the check refuses ``ready``; ``truth`` has the segment that ``job`` describes, if it is another one."""
    segment = (truth or ready).segment
    case = job.case(seed)
    return not check(Stage(ready, case), Oracle(segment, job.parameters, case)).right


def nonzero(job: Work, seed: int) -> int:
    where = job.parameters["weight"].reshape(-1).nonzero().reshape(-1)
    return int(where[seed % len(where)])


def with_weight(ready: Bound, job: Work, weight: Tensor) -> Bound:
    """The same binding computing with another weight."""
    return bind(ready.method, ready.segment, {**job.parameters, "weight": weight}, ready.candidate, here())


@pytest.mark.parametrize("name", METHODS)
@given(shape=shapes, seed=seeds)
@TRIALS
def test_a_correct_result_is_never_refused(name: str, shape: ConvShape, seed: int) -> None:
    job = layer(shape, seed)
    assert not caught(bound(name, job), job, seed)


@pytest.mark.parametrize("name", METHODS)
@given(shape=shapes, seed=seeds)
@TRIALS
def test_a_dropped_nonzero_is_caught(name: str, shape: ConvShape, seed: int) -> None:
    job = layer(shape, seed)
    weight = job.parameters["weight"].clone()
    weight.view(-1)[nonzero(job, seed)] = 0
    assert caught(with_weight(bound(name, job), job, weight), job, seed)


@pytest.mark.parametrize("name", METHODS)
@given(shape=shapes, seed=seeds)
@TRIALS
def test_a_weight_wrong_by_a_thousandth_is_caught(name: str, shape: ConvShape, seed: int) -> None:
    job = layer(shape, seed)
    weight = job.parameters["weight"].clone()
    weight.view(-1)[nonzero(job, seed)] *= 1 + 1e-3
    assert caught(with_weight(bound(name, job), job, weight), job, seed)


@pytest.mark.parametrize("missing", ["bias", "activation", "residual"])
@pytest.mark.parametrize("name", METHODS)
@given(shape=shapes, seed=seeds)
@TRIALS
def test_a_skipped_part_of_the_epilogue_is_caught(name: str, missing: str, shape: ConvShape, seed: int) -> None:
    job = layer(shape, seed, activation="relu", residual="before")
    truth = bound(name, job)
    epilogue, parameters = truth.segment.layer.epilogue, dict(job.parameters)
    if missing == "bias":
        epilogue = replace(epilogue, bias=False)
        del parameters["bias"]
    elif missing == "activation":
        epilogue = replace(epilogue, activation="none")
    else:
        epilogue = Epilogue(epilogue.bias, epilogue.activation)
    segment = replace(truth.segment, layers=(replace(truth.segment.layer, epilogue=epilogue),))
    wrong = bind(truth.method, segment, parameters, truth.candidate, here())
    assert caught(wrong, job, seed, truth)


@dataclass
class Forgetful:
    """A run that leaves one output element as it was."""

    run: Any
    element: int

    @property
    def workspace_bytes(self) -> int:
        return int(self.run.workspace_bytes)

    @property
    def allocates(self) -> bool:
        return bool(self.run.allocates)

    def __call__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        workspace: Tensor | None,
        residual: Tensor | None = None,
    ) -> Sequence[Tensor]:
        before = [output.clone() for output in outputs]
        results = self.run(inputs, outputs, workspace, residual)
        old = before[0] if before else torch.full_like(results[0], torch.nan)
        index = torch.unravel_index(torch.tensor(self.element % old.numel()), old.shape)
        results[0][index] = old[index]
        return results  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", METHODS)
@given(shape=shapes, seed=seeds)
@TRIALS
def test_one_unwritten_pixel_is_caught(name: str, shape: ConvShape, seed: int) -> None:
    job = layer(shape, seed, activation="relu")
    ready = bound(name, job)
    assert caught(replace(ready, run=Forgetful(ready.run, seed)), job, seed)


def stretched_field(packed: Any) -> str | None:
    return next(
        (name for name in getattr(packed, "__dataclass_fields__", {}) if isinstance(getattr(packed, name), Stretched)),
        None,
    )


@pytest.mark.parametrize("by", [-4, 4])
@pytest.mark.parametrize("name", OURS)
@given(shape=shapes, seed=seeds)
@TRIALS
def test_an_offset_shifted_by_one_element_is_caught(name: str, by: int, shape: ConvShape, seed: int) -> None:
    """For methods packed as stretched CSR.  An offset in front of the panel is not planted: it could crash."""
    job = layer(shape, seed)
    method = registry()[name]
    segment = job.segment(method)
    found = candidates(method, segment)
    candidate = found[seed % min(len(found), 4)]
    packed = method.pack(segment, job.parameters, candidate.config)
    field = stretched_field(packed)
    if field is None:
        pytest.skip(f"{name} does not pack as stretched CSR")
    weight: Stretched = getattr(packed, field)
    entries = weight.entries.clone()
    entry = seed % len(entries)
    if candidate.config.cols % candidate.config.lanes == 0:
        # Such loads are aligned: code for wide vectors faults on an offset inside one.
        by *= candidate.config.lanes
    if entries[entry, 1] + by < 0:
        by = -by
    entries[entry, 1] += by
    wrong = replace(packed, **{field: replace(weight, entries=entries)})
    run = method.bind(segment, wrong, method.build(wrong, here()), here())
    assert caught(Bound(method, segment, candidate, wrong, run, 0.0, 0.0), job, seed)
