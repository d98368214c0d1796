"""SparseRT: its code runs here, instruction by instruction (tests/ptx), and assembles for every architecture."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from contract.cases import stable
from methods.jobs import EPILOGUES, GPU, Job
from ptx import machine
from ptx.kernel import Interpreted
from ptx.program import Fault
from zeroskip.core.device import Device, cpu
from zeroskip.core.errors import Unsupported
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import ConvShape, Epilogue, Precision
from zeroskip.core.layout import allocate
from zeroskip.cuda import assemble
from zeroskip.cuda.compile import resources, unpack
from zeroskip.methods.sparsert import cuda, estimate
from zeroskip.methods.sparsert.config import SparseRTConfig, SparseRTPacked
from zeroskip.methods.sparsert.emit import SYMBOL, emit
from zeroskip.methods.sparsert.method import METHOD

FLAT = ConvShape(1, 24, 6, 8, 20, 1, 1)
ODD = ConvShape(3, 19, 7, 7, 13, 1, 1)
SAME = ConvShape(1, 9, 9, 11, 14, 3, 3, padding=(1, 1))
SMALL = ConvShape(4, 32, 4, 4, 20, 1, 1)
STRIPS = ConvShape(2, 64, 8, 16, 24, 1, 1)
OLD = replace(GPU, arch="sm_80", num_sms=108, shared_bytes=163 * 1024)
GOLDEN = Path(__file__).with_name("golden")
BUILD = cuda.build


def sparse(shape: ConvShape, density: float = 0.2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape.weight_shape, generator=generator)
    return torch.where(torch.rand(weight.shape, generator=generator) < density, weight, 0.0)


def text(job: Job, config: SparseRTConfig, arch: str = "sm_90a") -> str:
    return emit(METHOD.pack(job.segment, job.parameters, config), arch)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are not assembled but interpreted: ``build`` returns the text."""
    monkeypatch.setattr(cuda, "build", lambda packed, device: emit(packed, device.arch).encode())
    monkeypatch.setattr(cuda, "load", lambda built: Interpreted(built.decode()))


@contextmanager
def readable(job: Job, config: SparseRTConfig) -> Iterator[None]:
    """Inside, kernels may read the halo that ``config`` asks for."""
    halo = job.layer.shape.padding if config.halo else (0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "load", lambda built: Interpreted(built.decode(), halo))
        yield


def share(job: Job, config: SparseRTConfig, device: Device = GPU) -> float:
    """The largest share of its error bound that an element of the result used."""
    with readable(job, config):
        return job.bound_share(METHOD, METHOD.candidate(job.segment, config), device)


def run(job: Job, config: SparseRTConfig) -> Tensor:
    packed = METHOD.pack(job.segment, job.parameters, config)
    with readable(job, config):
        bound = METHOD.bind(job.segment, packed, METHOD.build(packed, GPU), GPU)
    return job.run(bound, METHOD.candidate(job.segment, config))


# -- what is refused ------------------------------------------------------------------------------------
def test_other_devices_and_layers_are_refused() -> None:
    assert METHOD.supports(Job.of(FLAT).layer, cpu(1)) == "runs on NVIDIA GPUs only"
    assert METHOD.supports(Job.of(FLAT).layer, GPU) is None
    assert "sputnik" in str(METHOD.supports(Job.of(ConvShape(3, 8, 1, 1, 8, 1, 1), kind="linear").layer, GPU))
    assert "empty" in str(METHOD.supports(Job.of(replace(FLAT, n=0)).layer, GPU))
    assert "fp64" in str(METHOD.supports(replace(Job.of(FLAT).layer, precision="fp64"), GPU))


def test_more_cores_try_more_of_a_large_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Job.of(FLAT).layer
    weights = replace(layer.weights, nnz=420_000, density=0.1)
    layer = replace(layer, shape=ConvShape(1, 2048, 1, 2048, 2048, 1, 1), weights=weights)
    found = []
    for cores in (2, 16):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        found.append([one for one in estimate.estimates(layer, GPU) if not one.config.gaps])
    assert len(found[0]) == 1
    assert 3 < len(found[1]) < 8


@pytest.mark.parametrize(
    ("shape", "slabs"),
    [
        (ConvShape(32, 512, 14, 14, 512, 1, 1), True),
        (ConvShape(32, 1024, 7, 7, 1024, 1, 1), False),  # short copies
        (ConvShape(1, 512, 14, 14, 512, 1, 1), False),  # few rows to a thread
        (ConvShape(32, 512, 14, 14, 128, 1, 1), False),  # few blocks of rows
        (ConvShape(32, 96, 14, 14, 96, 3, 3), False),
    ],
    ids=str,
)
def test_slabs_are_proposed_where_many_blocks_read_long_runs_of_x(shape: ConvShape, slabs: bool) -> None:
    layer = Job.of(replace(shape, n=1), weight=sparse(shape, 0.1)).layer
    layer = replace(layer, shape=shape)
    found = estimate.estimates(layer, GPU)
    assert any(one.config.slab for one in found) == slabs
    assert not any(one.config.slab for one in estimate.estimates(layer, OLD))


@pytest.mark.parametrize(("n", "channels", "walks"), [(32, 512, False), (128, 512, True), (128, 480, False)])
def test_blocks_with_slabs_walk_where_there_are_many_tiles(n: int, channels: int, walks: bool) -> None:
    """Of 480 channels no stage gets an even number of slabs."""
    shape = ConvShape(n, channels, 14, 14, 512, 1, 1)
    layer = replace(Job.of(replace(shape, n=1), weight=sparse(shape, 0.1)).layer, shape=shape)
    config = SparseRTConfig(32, warps=13, stack=2, registers=72)
    (found,) = estimate._slabs(layer, config, GPU)
    assert (found.slab, found.walk) == (estimate.SLAB, GPU.num_sms // found.blocks(shape) if walks else 0)


def test_a_layer_that_would_assemble_too_long_is_not_tried() -> None:
    layer = Job.of(FLAT).layer
    large = replace(layer, weights=replace(layer.weights, nnz=2_000_000))
    assert METHOD.supports(large, GPU) == "not tried: 2000000 weights would assemble 183 s, more than 60 s"


@pytest.mark.parametrize(("nonzeros", "density"), [(570_000, 0.1), (420_000, 0.02), (650_000, 1.0)])
def test_what_is_tried_has_a_configuration(nonzeros: int, density: float) -> None:
    side = int((nonzeros / density) ** 0.5)
    layer = Job.of(FLAT).layer
    weights = replace(layer.weights, nnz=nonzeros, density=density)
    layer = replace(layer, shape=ConvShape(8, side, 14, 14, side, 1, 1), weights=weights)
    assert METHOD.supports(layer, GPU) is None
    assert estimate.estimates(layer, GPU)


def test_rows_too_long_for_any_number_of_parts_are_refused() -> None:
    shape = ConvShape(1, 65_000, 1, 1, 8, 1, 1)
    layer = Job.of(shape, weight=torch.ones(shape.weight_shape)).layer
    with pytest.raises(Unsupported, match="more than 8000 weights"):
        estimate.estimates(layer, OLD)


def test_older_gpus_are_refused() -> None:
    assert "sm_80 or later" in str(METHOD.supports(Job.of(FLAT).layer, replace(GPU, arch="sm_75")))


def test_an_image_that_its_code_does_not_reach_is_refused() -> None:
    layer = Job.of(FLAT).layer
    assert "2 GiB" in str(METHOD.supports(replace(layer, shape=ConvShape(1, 600, 1000, 1000, 1, 1, 1)), GPU))


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 0},
        {"walk": -1},
        {"terms": -1},
        {"vector": 3},
        {"split": 3},
        {"balance": "chance"},
        {"rows": 129},
        {"warps": 33},
        {"registers": 27},
        {"registers": 256},
        {"registers": 160, "warps": 16},
        {"terms": 4},
        {"walk": 2, "split": 2},
        {"rows": 17, "pieces": 2, "warps": 2, "groups": 16, "registers": 56},
        {"slab": -1},
        {"slab": 8, "stages": 0},
        {"slab": 8, "mates": 3},
        {"slab": 6, "mates": 4},
        {"slab": 8, "groups": 2},
        {"slab": 8, "split": 2},
        {"slab": 8, "pieces": 2},
        {"slab": 8, "halo": True},
        {"mates": 2},
        {"stages": 2},
        {"slab": 8, "warps": 32},
    ],
)
def test_a_configuration_checks_itself(change: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"sizes|vector|balance|sums|threads|registers|float16|walk|shared|mates|stages|slabs"
    ):
        replace(SparseRTConfig(8), **change)


@pytest.mark.parametrize(
    ("shape", "config", "precision"),
    [
        (SAME, SparseRTConfig(4, vector=2), "fp32"),
        (replace(FLAT, stride=(2, 2)), SparseRTConfig(4, vector=2), "fp32"),
        (ODD, SparseRTConfig(4, vector=2), "fp32"),
        (FLAT, SparseRTConfig(4, vector=8, registers=96), "fp32"),
        (FLAT, SparseRTConfig(4, vector=2, terms=4), "fp32"),
        (FLAT, SparseRTConfig(4, vector=2, terms=4), "bf16"),
        (FLAT, SparseRTConfig(4, halo=True), "fp32"),
        (FLAT, SparseRTConfig(4, walk=1), "fp32"),
        (SAME, SparseRTConfig(32, registers=60), "fp32"),
        (FLAT, SparseRTConfig(4, vector=2, gaps=True), "fp32"),
        (ConvShape(1, 1, 1, 1, 70_000, 1, 1), SparseRTConfig(1), "fp32"),
        (SAME, SparseRTConfig(4, slab=3), "fp32"),
        (SMALL, SparseRTConfig(4, slab=12), "fp32"),
        (replace(SMALL, n=5), SparseRTConfig(4, warps=2, slab=8), "fp32"),
        (replace(STRIPS, h=9), SparseRTConfig(4, slab=8), "fp32"),
        (replace(SMALL, h=3, w=3), SparseRTConfig(4, slab=2), "fp32"),
        (replace(STRIPS, h=1, w=130), SparseRTConfig(4, warps=1, slab=8), "fp32"),
        (replace(STRIPS, c=4096), SparseRTConfig(4, slab=1024), "fp32"),
        (replace(SMALL, n=10), SparseRTConfig(4, slab=16, stages=2, walk=2), "fp32"),
    ],
    ids=[
        "3x3",
        "stride",
        "odd image",
        "16 bytes",
        "float32",
        "bfloat16",
        "no padding",
        "one tile",
        "ring",
        "gaps",
        "rows",
        "slabs of 3x3",
        "slabs of channels",
        "slabs of images",
        "strips",
        "slabs of 16 bytes",
        "strips of 16 bytes",
        "slabs of shared memory",
        "slabs that walk",
    ],
)
def test_a_configuration_that_does_not_fit_the_layer_is_refused(
    shape: ConvShape, config: SparseRTConfig, precision: Precision
) -> None:
    with pytest.raises(
        ValueError,
        match=r"together|no multiple|16 bytes|float16|halo|walk|leave too few|gaps|more than|slabs|shared memory",
    ):
        METHOD.candidate(Job.of(shape, precision=precision).segment, config)


def test_blocks_that_a_gpu_has_no_room_for_are_refused() -> None:
    job, config = Job.of(FLAT), SparseRTConfig(32, warps=8, groups=4, registers=60)
    packed = METHOD.pack(job.segment, job.parameters, config)
    assert config.exchange_bytes > 64 * 1024
    with pytest.raises(Unsupported, match="shared memory"):
        METHOD.bind(job.segment, packed, b"", replace(GPU, shared_bytes=64 * 1024))


def test_there_are_no_clusters_before_hopper() -> None:
    job = Job.of(ConvShape(1, 256, 14, 14, 256, 1, 1), weight=sparse(ConvShape(1, 256, 14, 14, 256, 1, 1), 0.1))
    assert {config.split for config in estimate.menu(job.segment.layer, OLD)} == {1}
    assert {config.split for config in estimate.menu(job.segment.layer, GPU)} == {1, 2, 4, 8}
    for config in (SparseRTConfig(8, split=2), SparseRTConfig(8, warps=7, slab=64)):
        with pytest.raises(Unsupported, match="sm_80 has no clusters"):
            text(job, config, "sm_80")
    with pytest.raises(Unsupported, match="sm_90 copies to several blocks slowly, sm_90a would not"):
        text(job, SparseRTConfig(8, warps=7, slab=64, mates=2), "sm_90")


# -- what is proposed -----------------------------------------------------------------------------------
SHAPES = (
    FLAT,
    ODD,
    SAME,
    ConvShape(1, 64, 15, 14, 48, 1, 1, (2, 2)),
    ConvShape(2, 24, 4, 5, 18, 1, 1, groups=3),
    ConvShape(1, 3, 1, 1, 2, 1, 1),
    ConvShape(2, 6, 9, 9, 12, 5, 3, (2, 1), (2, 0), (1, 2), groups=3),
)


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, ConvShape(1, 512, 7, 7, 1024, 1, 1)], ids=str)
def test_candidates_are_ordered_and_bounded(shape: ConvShape, density: float) -> None:
    job = Job.of(shape, weight=sparse(shape, density / 2))
    for device in (GPU, OLD):
        found = METHOD.configs(job.segment, device)
        assert 0 < len(found) <= estimate.MOST_CANDIDATES
        assert len({candidate.config for candidate in found}) == len(found)
        assert all(before.run_seconds <= after.run_seconds for before, after in itertools.pairwise(found))
        alone = [one.build_seconds for one in found if not one.config.gaps]
        assert len(alone) == 1 or sum(alone) <= estimate.most_together()
        for candidate in found:
            assert from_json(SparseRTConfig, to_json(candidate.config)) == candidate.config


@pytest.mark.parametrize("balance", ["ranges", "nonzeros", "columns"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_is_exact(shape: ConvShape, precision: Precision, balance: Any) -> None:
    job = Job.of(shape, Epilogue(bias=True), precision, weight=sparse(shape, 0.4))
    config = SparseRTConfig(4, stack=2, groups=3, split=2, balance=balance)
    unpacked = METHOD.unpack(METHOD.pack(job.segment, job.parameters, config))
    assert torch.equal(unpacked.to(job.weight.dtype), job.weight)


@pytest.mark.parametrize(
    ("shape", "density", "precision"),
    [
        (ConvShape(1, 256, 14, 14, 256, 1, 1), 0.1, "fp32"),
        (ConvShape(1, 128, 14, 14, 128, 3, 3, padding=(1, 1)), 0.1, "fp32"),
        (ConvShape(2, 128, 14, 14, 128, 1, 1), 0.1, "fp16"),
    ],
)
def test_the_estimate_counts_the_instructions(shape: ConvShape, density: float, precision: Precision) -> None:
    job = Job.of(shape, Epilogue(True, "relu"), precision, weight=sparse(shape, density))
    found = estimate.estimates(job.layer, GPU)
    for one in (found[0], found[len(found) // 2], found[-1]):
        code = text(job, one.config)
        written = sum(
            line.startswith("\t") and ".reg" not in line and ".param" not in line for line in code.splitlines()
        )
        assert one.build_seconds == pytest.approx(0.1 + estimate.ASSEMBLED * written, rel=0.4)


# -- what is computed -----------------------------------------------------------------------------------
BASE = SparseRTConfig(8, warps=1)
FITTING = {
    "one row": (FLAT, replace(BASE, rows=1)),
    "all rows": (FLAT, replace(BASE, rows=32)),
    "pieces": (ODD, replace(BASE, pieces=3)),
    "vectors of 2": (FLAT, replace(BASE, vector=2)),
    "vectors of 4": (replace(FLAT, n=3), replace(BASE, vector=4)),
    "vectors in pieces": (replace(FLAT, n=3), replace(BASE, vector=2, pieces=2, warps=2)),
    "warps": (ODD, replace(BASE, warps=3)),
    "stack": (ODD, replace(BASE, rows=3, stack=4)),
    "groups": (ODD, replace(BASE, groups=5)),
    "groups of vectors": (FLAT, replace(BASE, groups=3, vector=4)),
    "split": (ODD, replace(BASE, split=4)),
    "split of vectors": (FLAT, replace(BASE, split=2, vector=4)),
    "groups and split": (ODD, replace(BASE, rows=13, groups=3, split=8, stack=2)),
    "more parts than rows": (ODD, replace(BASE, rows=2, groups=2, split=8)),
    "walk": (ODD, replace(BASE, walk=2)),
    "walk of groups": (ODD, replace(BASE, walk=2, groups=2, stack=2)),
    "gaps": (ODD, replace(BASE, gaps=True, groups=2)),
    "gaps of one image": (SAME, replace(BASE, gaps=True, pieces=2, registers=128)),
    "border": (SAME, BASE),
    "border in pieces": (SAME, replace(BASE, pieces=2, groups=2, registers=128)),
    "border with a short ring": (SAME, replace(BASE, registers=44)),
    "halo": (SAME, replace(BASE, halo=True)),
    "halo of an image": (replace(SAME, n=2), replace(BASE, halo=True, split=2)),
    "slabs": (SMALL, replace(BASE, slab=16, stages=2)),
    "slabs in one stage": (SMALL, replace(BASE, slab=16)),
    "one slab": (SMALL, replace(BASE, slab=32, stages=3)),
    "slabs of mates": (SMALL, replace(BASE, rows=2, stack=2, slab=16, stages=2, mates=4)),
    "slabs of more mates than rows": (SMALL, replace(BASE, rows=10, slab=16, mates=8)),
    "slabs for idle lanes": (replace(SMALL, h=5, n=1), replace(BASE, warps=2, slab=8, stages=2, mates=2)),
    "slabs of odd images": (replace(ODD, n=4, c=32), replace(BASE, rows=7, warps=4, slab=16, stages=2, mates=2)),
    "slabs of vectors": (SMALL, replace(BASE, vector=2, slab=16, stages=2, mates=2)),
    "strips": (STRIPS, replace(BASE, slab=16, stages=2)),
    "strips of mates": (STRIPS, replace(BASE, rows=6, warps=2, stack=2, slab=32, stages=2, mates=2)),
    "slabs that walk": (replace(SMALL, n=10), replace(BASE, slab=8, stages=2, walk=2)),
    "slabs of mates that walk": (replace(SMALL, n=10), replace(BASE, rows=2, slab=4, stages=2, mates=4, walk=2)),
    "strips that walk": (STRIPS, replace(BASE, warps=2, slab=4, stages=1, mates=2, walk=2)),
    "strips of many channels": (replace(STRIPS, n=1), replace(BASE, vector=2, warps=2, slab=64, stages=1)),
}


@pytest.mark.parametrize("epilogue", EPILOGUES[1::4], ids=str)
@pytest.mark.parametrize("kind", FITTING)
def test_every_kind_of_configuration_is_within_the_bound(kind: str, epilogue: Epilogue) -> None:
    shape, config = FITTING[kind]
    assert share(Job.of(shape, epilogue, weight=2 * sparse(shape)), config) <= 1


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", FITTING)
def test_every_precision_is_within_the_bound(kind: str, precision: Precision) -> None:
    shape, config = FITTING[kind]
    assert share(Job.of(shape, Epilogue(True, "relu", "before"), precision, weight=sparse(shape)), config) <= 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_eight_halves_are_loaded_at_once(precision: Precision) -> None:
    job = Job.of(FLAT, Epilogue(True, "relu6", "after"), precision, weight=sparse(FLAT))
    for config in (replace(BASE, vector=8, rows=4), replace(BASE, vector=8, rows=4, groups=2), BASE):
        assert share(job, config) <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_proposals_are_within_the_bound(shape: ConvShape) -> None:
    job = Job.of(shape, Epilogue(True, "relu", "before"), weight=sparse(shape))
    found = METHOD.configs(job.segment, GPU)
    for candidate in (found[0], found[len(found) // 2], found[-1]):
        assert share(job, candidate.config) <= 1


def any_job(draw: st.DrawFn, shape: ConvShape) -> Job:
    """A layer of that shape, with any epilogue, precision and share of zeros."""
    seed = draw(st.integers(0, 1000))
    return Job.of(
        shape,
        draw(st.sampled_from(EPILOGUES)),
        draw(st.sampled_from(["fp32", "fp32", "fp16", "bf16"])),
        weight=sparse(shape, draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])), seed),
        seed=seed,
    )


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Job, SparseRTConfig]:
    """A layer and a configuration that fits it."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    n, c, k = draw(st.sampled_from([1, 1, 2, 3])), groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 9))
    h, w = draw(st.integers(1, 12)), draw(st.integers(1, 14))
    shape = ConvShape(n, c, h, w, k, 1, 1, groups=groups)
    if draw(st.booleans()):
        pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
        r, s = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
        try:
            shape = ConvShape(n, c, h, w, k, r, s, draw(pair), padding, draw(pair), groups)
        except ValueError:
            assume(False)
    job = any_job(draw, shape)
    tile = {
        "rows": draw(st.sampled_from([1, 2, 3, 8, 16, 31])),
        "vector": draw(st.sampled_from([1, 1, 2, 4])),
        "pieces": draw(st.integers(1, 2)),
        "warps": draw(st.integers(1, 2)),
        "stack": draw(st.integers(1, 3)),
        "groups": draw(st.sampled_from([1, 1, 2, 5])),
        "split": draw(st.sampled_from([1, 1, 2, 8])),
        "walk": draw(st.sampled_from([0, 0, 1, 2])),
        "balance": draw(st.sampled_from(["ranges", "nonzeros", "columns"])),
        "halo": draw(st.booleans()),
        "gaps": draw(st.booleans()),
        "terms": draw(st.sampled_from([0, 0, 3, 8])),
        "registers": 176,
    }
    for change in ({}, {"terms": 0}, {"walk": 0}, {"halo": False}, {"vector": 1}, {"rows": 4}):
        tile |= change
        try:
            config = SparseRTConfig(**tile)
            METHOD.candidate(job.segment, config)
            return job, config
        except ValueError:
            continue
    assume(False)
    raise AssertionError


@st.composite
def slab_jobs(draw: st.DrawFn) -> tuple[Job, SparseRTConfig]:
    """A layer whose x comes in slabs."""
    mates = draw(st.sampled_from([1, 2, 4]))
    slab = mates * draw(st.sampled_from([1, 2, 4, 6]))
    n, c, k = draw(st.integers(1, 4)), slab * draw(st.integers(1, 8)), draw(st.integers(1, 24))
    h, w = draw(st.sampled_from([(1, 4), (2, 2), (3, 4), (4, 8), (1, 12), (8, 16)]))
    shape = ConvShape(n, c, h, w, k, 1, 1)
    job = any_job(draw, shape)
    tile: dict[str, Any] = {
        "rows": draw(st.sampled_from([1, 3, 8, 16])),
        "vector": draw(st.sampled_from([1, 1, 2, 4])),
        "warps": draw(st.integers(1, 3)),
        "stack": draw(st.integers(1, 3)),
        "stages": draw(st.integers(1, 4)),
        "walk": draw(st.sampled_from([0, 0, 1, 2])),
    }
    try:
        config = SparseRTConfig(**tile, slab=slab, mates=mates, registers=120)
        METHOD.candidate(job.segment, config)
    except ValueError:
        assume(False)
    return job, config


@given(case=jobs())
@stable(90)
def test_random_layers_are_within_the_bound(case: tuple[Job, SparseRTConfig]) -> None:
    job, config = case
    assert share(job, config, GPU if config.split > 1 else OLD) <= 1


@given(case=slab_jobs())
@stable(60)
def test_random_slabs_are_within_the_bound(case: tuple[Job, SparseRTConfig]) -> None:
    job, config = case
    assert share(job, config) <= 1


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        (ConvShape(1, 512, 14, 14, 512, 1, 1), SparseRTConfig(64, warps=7, registers=112)),
        (ConvShape(1, 512, 14, 14, 512, 1, 1), SparseRTConfig(32, warps=4, stack=2, split=8, registers=72)),
        (ConvShape(1, 128, 14, 14, 128, 3, 3, padding=(1, 1)), SparseRTConfig(32, warps=7, split=4, registers=96)),
    ],
    ids=["512x512x196", "512x512x196 split", "3x3"],
)
def test_whole_layers_are_within_the_bound(shape: ConvShape, config: SparseRTConfig) -> None:
    """At 90% zeros; rows of the first are longer than what is scheduled in one piece."""
    assert share(Job.of(shape, Epilogue(True, "relu"), weight=sparse(shape, 0.1)), config) <= 1


def test_long_code_is_cut_by_branches_that_nobody_takes() -> None:
    shape = ConvShape(1, 150, 4, 4, 32, 1, 1)
    job = Job.of(shape, weight=sparse(shape, 1.0))
    assert text(job, SparseRTConfig(32, registers=72)).count("bra END") == 2
    assert text(job, SparseRTConfig(32, registers=72, groups=3)).count("bra END") == 0


def test_float16_sums_are_within_their_own_bound() -> None:
    """And not within the contract's, which has no room for products rounded to float16, however few are added."""
    shape = ConvShape(1, 96, 8, 8, 16, 1, 1)
    job = Job.of(shape, Epilogue(True), "fp16", weight=sparse(shape, 0.5))
    exact = job.expected
    for terms in (1, 4, 16):
        config = SparseRTConfig(8, vector=4, warps=1, terms=terms, registers=96)
        y = run(job, config).double()
        assert bool(((y - exact.value).abs() <= exact.rounded(terms)).all())
        assert bool(((y - exact.value).abs() > exact.bound).any())
        assert METHOD.candidate(job.segment, config).float16_terms == terms
    assert all(candidate.config.terms == 0 for candidate in METHOD.configs(job.segment, GPU))


def test_the_bound_of_float16_sums_grows_with_their_terms() -> None:
    exact = Job.of(FLAT, Epilogue(True), "fp16", weight=sparse(FLAT)).expected
    assert torch.equal(exact.rounded(0), exact.bound)
    assert bool((exact.rounded(8) > exact.rounded(4)).all())


def test_nothing_but_what_a_weight_touches_sees_nan() -> None:
    for shape, config in (FITTING["border"], FITTING["halo"], FITTING["groups and split"]):
        job = Job.of(shape, weight=sparse(shape))
        where = (shape.n - 1, 1, shape.h // 2, shape.w // 2)
        job.x[where] = torch.nan
        ones = torch.zeros_like(job.x)
        ones[where] = 1
        used = (job.weight != 0).float()
        met = torch.nn.functional.conv2d(ones, used, None, shape.stride, shape.padding, shape.dilation) > 0
        assert torch.equal(run(job, config).isnan(), met)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_shows(value: float) -> None:
    weight = sparse(SAME)
    weight[4, 3, 1, 1] = value
    job = Job.of(SAME, Epilogue(activation="relu"), weight=weight)
    y = run(job, BASE)
    assert not y[:, 4].isfinite().any() or value == torch.inf
    assert y[:, [row for row in range(SAME.k) if row != 4]].isfinite().all()


def test_rows_without_nonzeros_write_what_the_bias_says() -> None:
    for shape, config in (FITTING["split"], FITTING["border"]):
        job = Job.of(shape, Epilogue(True, "relu"), weight=torch.zeros(shape.weight_shape))
        assert job.bias is not None
        assert torch.equal(run(job, config), job.bias.relu().reshape(-1, 1, 1).expand(shape.output_shape))


# -- memory ---------------------------------------------------------------------------------------------
def test_the_output_may_be_a_slice_with_a_border() -> None:
    job = Job.of(replace(SAME, n=2), Epilogue(True, "none", "after"), weight=sparse(SAME))
    packed = METHOD.pack(job.segment, job.parameters, replace(BASE, gaps=True))
    bound = METHOD.bind(job.segment, packed, METHOD.build(packed, GPU), GPU)
    n, k, p, q = job.layer.shape.output_shape
    big = torch.full((n, k + 3, p + 4, q + 6), 7.0)
    y = big[:, 1 : k + 1, 2 : p + 2, 3 : q + 3]
    bound([job.x], [y], None, job.residual)
    assert bool(((y.double() - job.expected.value).abs() <= job.expected.bound).all())
    y.fill_(7.0)
    assert bool((big == 7.0).all())


def test_what_has_gaps_where_the_code_has_none_is_copied() -> None:
    job = Job.of(FLAT, Epilogue(residual="before"), weight=sparse(FLAT))
    assert job.residual is not None
    packed = METHOD.pack(job.segment, job.parameters, BASE)
    bound = METHOD.bind(job.segment, packed, METHOD.build(packed, GPU), GPU)
    wide = torch.full((1, 2 * FLAT.c, FLAT.h, FLAT.w), torch.nan)
    wide[:, ::2] = job.x
    y = torch.full((1, FLAT.k, FLAT.h, 2 * FLAT.w), torch.nan)[..., : FLAT.w]
    bound([wide[:, ::2]], [y], None, torch.cat([job.residual] * 2, -1)[..., : FLAT.w])
    assert bool(((y.double() - job.expected.value).abs() <= job.expected.bound).all())


def test_a_wider_halo_is_copied_and_an_exact_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    job, config = Job.of(SAME, weight=sparse(SAME)), replace(BASE, halo=True)
    packed = METHOD.pack(job.segment, job.parameters, config)
    monkeypatch.setattr(cuda, "load", lambda built: Interpreted(built.decode(), (1, 1)))
    bound = METHOD.bind(job.segment, packed, METHOD.build(packed, GPU), GPU)
    for halo in ((1, 1), (2, 3)):
        x = allocate(SAME.input_shape, halo)
        x.copy_(job.x)
        assert (cuda.as_written(x, (1, 1)) is x) == (halo == (1, 1))
        y = torch.full(SAME.output_shape, torch.nan)
        bound([x], [y], None, None)
        assert bool(((y.double() - job.expected.value).abs() <= job.expected.bound).all())


@pytest.mark.parametrize(("change", "by"), [("border", -4), ("border", 4), ("pieces", 4), ("split", 4)])
def test_an_offset_shifted_by_an_element_is_caught(change: str, by: int) -> None:
    """Either as a load from where no pixel is, or as a wrong result."""
    shape, config = FITTING[change]
    job = Job.of(shape, weight=sparse(shape, 0.3))
    right = text(job, config)
    line = next(line for line in right.splitlines() if "ld.global" in line)
    offset = int(line.rpartition("+")[2].rstrip("];"))
    wrong = right.replace(line, line.replace(f"+{offset}]", f"+{offset + by}]"), 1)
    packed = METHOD.pack(job.segment, job.parameters, config)
    bound = METHOD.bind(job.segment, packed, wrong.encode(), GPU)
    try:
        y = job.run(bound, METHOD.candidate(job.segment, config))
    except Fault:
        return
    assert bool(((y.double() - job.expected.value).abs() > job.expected.bound).any())


# -- text -----------------------------------------------------------------------------------------------
def _golden() -> Iterator[tuple[str, Job, SparseRTConfig]]:
    """Small enough to be read."""
    flat = ConvShape(1, 4, 2, 3, 3, 1, 1)
    weight = torch.tensor([[0.5, 0.0, 0.0, -2.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.5, 0.0, 4.0]])
    job = Job.of(flat, Epilogue(True, "relu"), weight=weight)
    job = replace(job, bias=torch.tensor([0.25, -1.0, 0.0]))
    yield "flat.ptx", job, SparseRTConfig(3, vector=2, warps=1)
    border = ConvShape(2, 2, 3, 3, 2, 3, 3, padding=(1, 1))
    taps = torch.zeros(border.weight_shape)
    taps[0, 0, 0, 0], taps[0, 1, 1, 1], taps[1, 0, 0, 0], taps[1, 1, 2, 1] = 0.5, 1.0, -1.0, 2.0
    yield (
        "border.ptx",
        Job.of(border, Epilogue(residual="before"), "fp16", weight=taps),
        SparseRTConfig(2, warps=1, split=2),
    )


@pytest.mark.parametrize(("name", "job", "config"), [pytest.param(*case, id=case[0]) for case in _golden()])
def test_the_text_is_what_was_read_and_approved(name: str, job: Job, config: SparseRTConfig) -> None:
    """After a change on purpose, read the new text and store it there."""
    written = text(job, config)
    assert written == (GOLDEN / name).read_text()
    assert share(job, config) <= 1


def test_the_text_depends_on_nothing_else() -> None:
    job = Job.of(SAME, weight=sparse(SAME))
    other = replace(job, layer=replace(job.layer, name="another"))
    assert text(job, BASE) == text(other, BASE)
    assert "%ctaid.x" in text(job, BASE)


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        # The warps that compute: do not wait for a slab; do not leave one.
        ("SLAB_1:", "bra SLAB_1_OVER;\nSLAB_1:", "was not waited for"),
        ("@%p0 mbarrier.arrive.shared::cta.b64 _, [%r4+16]", "mov.u32 %r17, 0", "never come"),
        # The warp that asks: does not wait until a slab was read here, or by mates; expects too much; copies elsewhere.
        ("READ_2:", "bra READ_2_OVER;\nREAD_2:", "was not waited for|never come|more arrivals"),
        ("CLEAR_2:", "bra CLEAR_2_OVER;\nCLEAR_2:", "was not waited for|never come"),
        ("_, [%r12+0], 1024", "_, [%r12+0], 1040", "never come"),
        ("[%r14+128]", "[%r14+640]", "nobody stored"),
        ("[%r14+128]", "[%r14+0]", "copies over one"),
        ("[%r14+128]", "[%r14+136]", "no multiple of 16"),
        ("[%r4+16], 2", "[%r4+16], 3", "never come"),
        # For the slabs of another tile: does not wait.
        ("bra FRESH_1;", "bra FRESH_1;\nbra FRESH_1;", "was not waited for|never come|more arrivals"),
    ],
)
def test_slabs_that_would_race_are_found(right: str, wrong: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, config = SMALL, SparseRTConfig(5, stack=2, warps=1, slab=8, stages=2, mates=2)
    if "FRESH" in right:
        shape, config = replace(SMALL, n=10), replace(config, walk=2)
    job = Job.of(shape, weight=sparse(shape, 0.5))
    written = text(job, config)
    assert right in written
    monkeypatch.setattr(cuda, "build", lambda packed, device: written.replace(right, wrong).encode())
    for seed in range(20):  # some show only if threads come in a certain order
        monkeypatch.setattr(machine, "SEED", seed)
        try:
            run(job, config)
        except Fault as fault:
            assert re.search(words, str(fault))  # noqa: PT017 -- any of the runs may raise it
            return
    pytest.fail("no order of threads shows it")


@pytest.mark.parametrize("seed", range(20))
def test_slabs_do_not_depend_on_the_order_of_threads(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SEED", seed)
    for kind in ("slabs of mates", "strips of mates", "slabs of mates that walk", "strips that walk"):
        shape, config = FITTING[kind]
        assert share(Job.of(shape, weight=sparse(shape)), config) <= 1


# -- code -----------------------------------------------------------------------------------------------
def _assembled() -> Iterator[tuple[str, ConvShape, Epilogue, Precision, SparseRTConfig]]:
    """Configurations as proposed for real layers, on smaller ones: what CI assembles for every architecture."""
    flat, same = ConvShape(2, 64, 14, 14, 64, 1, 1), ConvShape(2, 32, 14, 14, 64, 3, 3, padding=(1, 1))
    relu, added = Epilogue(True, "relu"), Epilogue(True, "relu6", "before")
    yield "rows", flat, relu, "fp32", SparseRTConfig(64, warps=4, stack=1, registers=112)
    yield "vectors", flat, added, "fp32", SparseRTConfig(16, vector=4, warps=2, registers=128)
    yield "halves", flat, added, "fp16", SparseRTConfig(8, vector=8, warps=2, registers=128)
    yield "bfloat16", flat, Epilogue(True, "relu", "after"), "bf16", SparseRTConfig(8, vector=4, warps=2, registers=88)
    yield "float16 sums", flat, relu, "fp16", SparseRTConfig(8, vector=4, warps=2, terms=8, registers=112)
    yield "groups", flat, added, "fp32", SparseRTConfig(16, warps=4, groups=4, registers=72)
    yield "walk", flat, added, "fp32", SparseRTConfig(32, warps=2, walk=2, registers=96)
    yield "split", flat, added, "fp32", SparseRTConfig(32, warps=4, stack=2, split=8, registers=96)
    yield "border", same, added, "fp32", SparseRTConfig(32, warps=4, groups=2, registers=104)
    yield "border, halves", same, relu, "fp16", SparseRTConfig(16, warps=4, split=4, registers=88)
    yield "halo", same, added, "fp32", SparseRTConfig(32, warps=4, split=2, halo=True, registers=88)
    yield "slabs", flat, added, "fp16", SparseRTConfig(16, warps=7, slab=16, stages=2, registers=80)
    mates = SparseRTConfig(32, warps=7, slab=16, stages=2, mates=2, registers=88)
    yield "slabs of mates", flat, relu, "fp32", mates
    yield "slabs of mates that walk", replace(flat, n=4), relu, "fp32", replace(mates, walk=2)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize(
    ("shape", "epilogue", "precision", "config"), [pytest.param(*case[1:], id=case[0]) for case in _assembled()]
)
def test_code_assembles_without_spills(
    shape: ConvShape, epilogue: Epilogue, precision: Precision, config: SparseRTConfig, arch: str
) -> None:
    if (config.split > 1 or config.slab) and arch == "sm_80":
        pytest.skip("there are no clusters and no copy engine")
    arch = f"{arch}a" if config.mates > 1 and not arch.endswith("a") else arch
    job = Job.of(shape, epilogue, precision, weight=sparse(shape, 0.15))
    found = resources(assemble.build(text(job, config, arch), SYMBOL, arch))
    assert found.warnings == ""
    assert (found.spill_bytes, found.stack_bytes) == (0, 0)
    assert found.registers <= config.registers


@pytest.mark.parametrize("registers", [64, 128])
def test_weights_are_operands_of_their_instructions(registers: int) -> None:
    """No instruction more than a load for each column and a multiply-add for each nonzero, but for the ends."""
    shape = ConvShape(1, 256, 8, 8, 32, 1, 1)
    job = Job.of(shape, Epilogue(True, "relu"), weight=sparse(shape, 0.1))
    built = assemble.build(text(job, SparseRTConfig(32, warps=2, registers=registers)), SYMBOL, "sm_90a")
    nonzeros, columns = job.layer.weights.nnz, int((job.weight != 0).any(0).sum())
    assert len(unpack(built).cubin) / 16 < 1.1 * (nonzeros + columns) + 700


def test_text_is_written_only_for_code_that_is_not_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[SparseRTConfig] = []

    def writing(packed: SparseRTPacked, arch: str) -> str:
        written.append(packed.config)
        return emit(packed, arch)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "emit", writing)
    config = SparseRTConfig(4)
    job = Job.of(SAME, Epilogue(bias=True), weight=sparse(SAME))
    packed = METHOD.pack(job.segment, job.parameters, config)
    tf32 = replace(packed, layer=replace(packed.layer, precision="tf32", name="another"))
    first = BUILD(packed, GPU)
    assert len(written) == 1
    assert BUILD(tf32, GPU) == first == BUILD(METHOD.pack(job.segment, job.parameters, config), GPU)
    assert len(written) == 1
    shape = replace(packed.layer.shape, h=10)
    for count, other in enumerate(
        (
            replace(packed, bias=packed.bias + 1),
            replace(packed, weight=replace(packed.weight, values=packed.weight.values * 2)),
            replace(packed, layer=replace(packed.layer, shape=shape)),
            replace(packed, layer=replace(packed.layer, epilogue=Epilogue(bias=True, activation="relu"))),
            replace(packed, layer=replace(packed.layer, precision="fp16")),
            replace(packed, config=replace(config, warps=2)),
        ),
        start=2,
    ):
        assert BUILD(other, GPU) != first
        assert len(written) == count
