"""Slab: configurations that cannot exist, refusals, and packing for every mode (values need a GPU: tests/contract)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods.jobs import GPU, Job
from zeroskip.core.device import cpu
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import ConvShape, Epilogue, Precision
from zeroskip.methods.slab.cuda import SlabConfig
from zeroskip.methods.slab.method import METHOD

FLAT, ODD = ConvShape(1, 64, 14, 14, 48, 1, 1), ConvShape(2, 60, 7, 7, 33, 1, 1)
GOOD = SlabConfig("vectors", 4, 8, 1, 1, 8, 64, 1, 2)
RUNS, BOXES = SlabConfig("runs", 1, 32, 2, 1, 8, 64, 1, 6), SlabConfig("boxes", 4, 8, 1, 1, 8, 64, 1, 2)


def sparse(shape: ConvShape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.weight_shape, generator=generator)
    return torch.where(torch.rand(weight.shape, generator=generator) < 0.2, weight, 0.0)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (ConvShape(1, 8, 9, 9, 8, 3, 3), "1x1 convolutions"),
        (ConvShape(1, 8, 9, 9, 8, 1, 1, padding=(1, 1)), "without padding"),
        (ConvShape(0, 8, 9, 9, 8, 1, 1), "empty"),
    ],
)
def test_refusals_say_why(shape: ConvShape, reason: str) -> None:
    assert reason in str(METHOD.supports(Job.of(shape).layer, GPU))


def test_other_devices_and_layers_are_refused() -> None:
    job = Job.of(FLAT)
    assert METHOD.supports(job.layer, cpu(1)) == "runs on NVIDIA GPUs only"
    assert METHOD.supports(job.layer, GPU) is None
    assert "sputnik" in str(METHOD.supports(Job.of(ConvShape(3, 8, 1, 1, 8, 1, 1), kind="linear").layer, GPU))


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "columns"},
        {"lanes": 12},
        {"stages": 5},
        {"rows": 0},
        {"warps": 33},
        {"split": 3},
        {"rows": 64},
        {"lanes": 32, "pieces": 2, "warps": 4, "rows": 1},
        {"wide": 1},
        {"mates": 2},
        {"mode": "boxes", "slab": 264},
        {"mode": "boxes", "stages": 9},
        {"mode": "boxes", "mates": 4},
        {"mode": "boxes", "mates": 2, "slab": 63},
        {"mode": "boxes", "mates": 4, "split": 4, "blocks": 4},
    ],
)
def test_a_configuration_checks_itself(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"lanes|stages|sizes|split|sums|threads|mode|wide|mates|box"):
        replace(GOOD, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        (ODD, GOOD),
        (ConvShape(1, 64, 14, 14, 48, 1, 1, (2, 2)), GOOD),
        (ConvShape(1, 64, 14, 14, 100, 1, 1), GOOD),
        (FLAT, replace(GOOD, slab=32)),
        (FLAT, replace(GOOD, split=2)),
        (FLAT, RUNS),
        (ConvShape(3, 70, 7, 7, 33, 1, 1), replace(RUNS, slab=72)),
        (ConvShape(1, 64, 7, 6, 48, 1, 1), replace(RUNS, wide=4, pieces=1)),
        (ODD, BOXES),
        (FLAT, replace(BOXES, slab=16, stages=2, mates=2)),
    ],
    ids=[
        "odd_image",
        "stride",
        "rows",
        "stages",
        "split",
        "image",
        "images_out_of_line",
        "odd_wide",
        "odd_box",
        "mates_again",
    ],
)
def test_a_configuration_that_does_not_fit_the_layer_is_refused(shape: ConvShape, config: SlabConfig) -> None:
    with pytest.raises(ValueError, match=r"do not fit|no multiple|no neighbouring|more than|no 16 bytes"):
        METHOD.candidate(Job.of(shape).segment, config)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [
        FLAT,
        ODD,
        ConvShape(1, 64, 15, 14, 48, 1, 1, (2, 2)),
        ConvShape(2, 24, 4, 5, 18, 1, 1, groups=3),
        ConvShape(1, 3, 1, 1, 2, 1, 1),
        ConvShape(1, 1024, 7, 7, 1024, 1, 1),
    ],
    ids=str,
)
def test_every_kind_of_candidate_packs_exactly(shape: ConvShape, precision: Precision) -> None:
    job = Job.of(shape, Epilogue(bias=True), precision, weight=sparse(shape))
    found = METHOD.configs(job.segment, GPU)
    assert found
    for mode in {candidate.config.mode for candidate in found}:
        candidate = next(candidate for candidate in found if candidate.config.mode == mode)
        assert from_json(SlabConfig, to_json(candidate.config)) == candidate.config
        unpacked = METHOD.unpack(METHOD.pack(job.segment, job.parameters, candidate.config))
        assert torch.equal(unpacked.to(job.weight.dtype), job.weight)


def test_a_box_of_half_precision_begins_where_the_engine_can_write() -> None:
    job = Job.of(ConvShape(1, 64, 16, 16, 48, 1, 1), precision="fp16")
    METHOD.candidate(job.segment, replace(BOXES, mates=2, slab=60, stages=2))
    with pytest.raises(ValueError, match="128 bytes"):
        METHOD.candidate(job.segment, replace(BOXES, mates=2, slab=58, stages=2))


def test_the_likeliest_of_every_kind_comes_early() -> None:
    found = METHOD.configs(Job.of(ConvShape(1, 512, 14, 14, 512, 1, 1)).segment, GPU)
    assert found[0].run_seconds == min(candidate.run_seconds for candidate in found)
    assert len({(one.config.mode, one.config.split, one.config.mates) for one in found[:24]}) > 4


def test_an_older_gpu_has_no_copy_engine_and_no_clusters() -> None:
    old = replace(GPU, arch="sm_80", num_sms=108, shared_bytes=163 * 1024)
    found = [candidate.config for candidate in METHOD.configs(Job.of(FLAT).segment, old)]
    assert {(config.mode, config.split, config.mates) for config in found} == {("vectors", 1, 1)}


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_120a"])
def test_newer_gpus_have_both(arch: str) -> None:
    found = [one.config for one in METHOD.configs(Job.of(FLAT).segment, replace(GPU, arch=arch))]
    assert {"boxes", "runs"} <= {config.mode for config in found}
    assert max(config.split for config in found) == max(config.mates for config in found) == 8


def test_half_precision_planes_that_the_engine_cannot_take_have_other_ways() -> None:
    found = METHOD.configs(Job.of(FLAT, precision="fp16").segment, GPU)
    assert {candidate.config.mode for candidate in found} == {"vectors", "runs"}
