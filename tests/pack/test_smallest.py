"""Every form gives back the same bits, the smallest is taken, and no array makes reading crash or ask for memory."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from contract.cases import sparse_weight, stable
from zeroskip.pack.compact_csr import CompactCsr
from zeroskip.pack.gaps import Gaps
from zeroskip.pack.nonzeros import EXPANSION, bits, packed, unsigned
from zeroskip.pack.smallest import FORMS, restored, size, stored

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(bits(a), bits(b))


def at(count: int, places: list[int]) -> Tensor:
    """1, 2, 3, ... at these places of a float32 row that is zero elsewhere."""
    row = torch.zeros(count)
    row[places] = torch.arange(1.0, len(places) + 1)
    return row


def again(tensor: Tensor, form: str | None = None) -> Tensor:
    forms = FORMS if form is None else {form: FORMS[form]}
    dtype = str(tensor.dtype).removeprefix("torch.")
    return restored(stored("a", tensor, forms), "a", tuple(tensor.shape), dtype)


def form_of(tensor: Tensor) -> str:
    arrays = stored("a", tensor)
    parts = {name.partition(":")[2] for name in arrays} - {"values"}
    width = {torch.uint8: "8", torch.int16: "16"}
    if parts == {"gaps"}:
        return "gaps" + width[arrays["a:gaps"].dtype]
    return {frozenset({""}): "dense", frozenset({"mask"}): "bitmask"}.get(frozenset(parts), "csr")


@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.4, 0.95, 1.1]),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from([*FORMS, None]),
)
@stable(300)
def test_round_trip(shape: tuple[int, ...], density: float, seed: int, dtype: torch.dtype, form: str | None) -> None:
    tensor = sparse_weight(shape, density, seed).to(dtype)
    assert same(again(tensor, form), tensor)
    if form is not None:
        assert same(FORMS[form](tensor).dense(shape), tensor)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_comes_back(form: str, dtype: torch.dtype) -> None:
    """-0.0, infinities, the smallest numbers, and NaN of every sign and payload."""
    size_of = torch.empty((), dtype=dtype).element_size()
    chance = np.random.default_rng(0)
    patterns = chance.integers(0, 256, (4000, size_of), dtype=np.uint8)
    patterns[chance.random(4000) < 0.7] = 0
    patterns[::50, -2:] = 0xFF  # NaNs, with what they carry in the bytes before
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45, 65520.0]).to(dtype)
    tensor = torch.cat([special, torch.from_numpy(patterns.reshape(-1)).view(dtype)])
    assert tensor.isnan().sum() > 80
    assert same(again(tensor, form), tensor)
    assert same(FORMS[form](tensor).dense(tuple(tensor.shape)), tensor)


@pytest.mark.parametrize("most", [255, 65535])
@pytest.mark.parametrize("more", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_gaps_around_the_largest(most: int, more: int, times: int) -> None:
    """Before the first nonzero, between two, and behind the last."""
    gap = most * times + more
    width = 8 if most == 255 else 16
    run = 200  # nonzeros without a gap, for which a file may hold so many zeros
    for before, behind in itertools.product((0, gap), repeat=2):
        tensor = at(before + run + gap + 1 + behind, [*range(before, before + run), before + run + gap])
        form = Gaps.of(tensor, width)
        assert same(form.dense(tuple(tensor.shape)), tensor)
        assert form.values.tolist() == list(range(1, run + 2))
        assert form.gaps.numel() == run + 1 + before // most + gap // most + behind // most


def test_gaps_as_documented() -> None:
    form = Gaps.of(at(1000, [2, 3, 259, 515]), 8)
    assert form.gaps.tolist() == [2, 0, 255, 0, 255, 0, 255]
    assert form.values.tolist() == [1, 2, 3, 4]
    assert unsigned(Gaps.of(at(70000, [65534, 65536]), 16).gaps, "").tolist() == [65534, 1]


def test_compact_csr_as_documented() -> None:
    form = CompactCsr.of(torch.tensor([[0.0, 5.0, 0.0, 6.0], [0.0, 0.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0]]))
    assert form.counts.tolist() == [2, 0, 1]
    assert form.columns.tolist() == [1, 3, 0]
    assert form.counts.dtype == form.columns.dtype == torch.uint8
    assert CompactCsr.of(at(70000, [300])).columns.dtype == torch.int16
    assert CompactCsr.of(at(70000, [65536])).columns.dtype == torch.int32


@pytest.mark.parametrize("largest", [0, 255, 256, 65535, 65536, 2**32 - 1, 2**32])
def test_numbers_take_as_few_bytes_as_the_largest_needs(largest: int) -> None:
    form = packed(np.array([0, largest], np.int64))
    assert unsigned(form, "").tolist() == [0, largest]
    assert form.element_size() == next(n for n in (1, 2, 4, 8) if largest < 256**n)


def by_density(density: float, shape: tuple[int, ...] = (500, 1000)) -> Tensor:
    return torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density, torch.pi, 0.0)


def few_rows() -> Tensor:
    """Every third row has nonzeros; over 65,536 zeros a 16-bit gap takes two bytes, a count of zero one."""
    tensor = torch.zeros(30, 65536)
    tensor[::3, :250] = torch.pi
    return tensor


@pytest.mark.parametrize(
    ("tensor", "form"),
    [
        (by_density(1.0), "dense"),
        (by_density(0.98), "dense"),
        (by_density(0.95), "bitmask"),
        (by_density(0.3), "bitmask"),
        (by_density(0.13), "bitmask"),
        (by_density(0.12), "gaps8"),
        (by_density(0.01), "gaps8"),
        (by_density(0.001), "gaps16"),
        (by_density(0.0), "gaps8"),  # gaps16 would be smaller, but so few bytes may not ask for so much memory
        (torch.zeros(0, 3), "dense"),
        (torch.tensor(0.0), "gaps8"),
        (torch.tensor(1.0), "dense"),
        (few_rows(), "csr"),
        (torch.zeros(512, 256), "csr"),  # a count for each row of 256, against a gap for 255 elements
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value.shape)),
)
def test_the_smallest_is_taken(tensor: Tensor, form: str) -> None:
    assert form_of(tensor) == form
    sizes = {"dense": tensor.nbytes}
    for name, make in FORMS.items():
        arrays = vars(make(tensor))
        if tensor.nbytes <= EXPANSION * (size(arrays) + 1):
            sizes[name] = size(arrays)
    assert sizes[form] == min(sizes.values())
    if not same(tensor, tensor.half().float()):  # whose values are kept in half the bytes, in every form alike
        assert size(stored("a", tensor)) == sizes[form]


def test_float32_that_are_float16_numbers_take_two_bytes() -> None:
    dense, sparse = torch.randn(64, 64).half().float(), by_density(0.1).half().float()
    assert size(stored("a", dense)) == 2 * 64 * 64
    assert stored("a", sparse)["a:values"].dtype == torch.float16
    assert same(again(dense), dense)
    assert same(again(sparse), sparse)
    for other in (1e-9, 1.0001, 70000.0, torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)):
        sparse[3, 3] = other
        assert stored("a", sparse)["a:values"].dtype == torch.float32
        assert same(again(sparse), sparse)


def test_whole_numbers_and_booleans_are_stored_as_they_are() -> None:
    for tensor in (torch.zeros(900, dtype=torch.int64), torch.zeros(900, dtype=torch.bool)):
        assert stored("a", tensor).keys() == {"a"}


def test_strided_tensors_are_stored_by_their_values() -> None:
    tensor = by_density(0.1, (20, 30)).t()
    assert same(again(tensor), tensor.contiguous())
    tensor = by_density(1.0, (2, 3, 4, 5)).contiguous(memory_format=torch.channels_last)
    assert stored("a", tensor)["a"].is_contiguous()
    part = by_density(1.0)[3:5]
    assert stored("a", part)["a"].untyped_storage().nbytes() == part.nbytes


# -- what a file may hold instead --------------------------------------------------------------------------
SHAPE = (6, 700)


def good(form: str) -> dict[str, Tensor]:
    tensor = sparse_weight(SHAPE, 0.02, 5)
    return {f"a:{part}": array for part, array in vars(FORMS[form](tensor)).items()}


def u8(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.uint8)


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("form", "shape", "why"),
    [
        (Gaps(u8(), torch.ones(0)), (255,), "cover 0"),
        (Gaps(u8(9), ONE), (9,), "cover 10"),
        (Gaps(u8(9), ONE), (265,), "cover 10"),
        (Gaps(u8(255), torch.ones(0)), (254,), "cover 255"),
        (Gaps(u8(255, 255), ONE), (600,), "places of 0"),
        (Gaps(u8(1), torch.ones(2)), (9,), "places of 1"),
        (Gaps(u8(1), torch.ones(1, 1)), (9,), "places of 1"),
        (Gaps(u8(1).to(torch.int8), ONE), (9,), "8 or 16 bits"),
        (Gaps(u8(1).to(torch.int32), ONE), (9,), "8 or 16 bits"),
        (Gaps(u8(1).reshape(1, 1), ONE), (9,), "one row"),
        (Gaps(u8(1), ONE), (3, -3), "no shape"),
        (Gaps(u8(1), ONE), (-3, -3), "no shape"),
        (Gaps(u8(1), ONE), (2**62, 2**62), "cannot stand"),
        (Gaps(torch.full((9,), -1, dtype=torch.int16), torch.ones(0)), (9 * 65535,), "cannot stand"),
        (CompactCsr(u8(1, 0), u8(4), ONE), (2, 4), "column 4"),
        (CompactCsr(u8(1), u8(3), ONE), (2, 4), "counts"),
        (CompactCsr(u8(1, 1), u8(3), ONE), (2, 4), "counts"),
        (CompactCsr(u8(0, 0), u8(3), ONE), (2, 4), "counts"),
        (CompactCsr(u8(5, 0), u8(0, 1, 2, 3, 3), torch.ones(5)), (2, 4), "counts"),
        (CompactCsr(torch.tensor([-1, 2]), u8(3), ONE), (2, 4), "counts"),
        (CompactCsr(u8(2, 0), u8(1, 1), torch.ones(2)), (2, 4), "ascending"),
        (CompactCsr(u8(2, 0), u8(2, 1), torch.ones(2)), (2, 4), "ascending"),
        (CompactCsr(u8(1, 0), torch.tensor([-4]), ONE), (2, 4), "column"),
        (CompactCsr(u8(1, 0), u8(1), torch.ones(2)), (2, 4), "places of 1"),
        (CompactCsr(u8(1, 0), torch.ones(1), ONE), (2, 4), "whole numbers"),
        (CompactCsr(u8(1, 0), u8(1), ONE), (2, 2**61), "cannot stand"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(form: Gaps | CompactCsr, shape: tuple[int, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        form.dense(shape)


def test_a_tensor_has_one_form() -> None:
    mask, gaps = good("bitmask"), good("gaps8")
    with pytest.raises(KeyError, match="2 forms"):
        restored(mask | gaps, "a", SHAPE, "float32")
    with pytest.raises(KeyError, match="2 forms"):
        restored(gaps | {"a": torch.zeros(SHAPE)}, "a", SHAPE, "float32")
    with pytest.raises(KeyError, match="0 forms"):
        restored({}, "a", SHAPE, "float32")
    with pytest.raises(KeyError, match="a:columns"):
        restored({name: array for name, array in good("csr").items() if "columns" not in name}, "a", SHAPE, "float32")


def mutated(arrays: dict[str, Tensor], chance: random.Random) -> dict[str, Tensor]:
    name = chance.choice(sorted(arrays))
    old = arrays[name].clone()
    kind = chance.choice(["flip", "flip", "number", "cut", "grow", "type", "swap", "reverse"])
    if kind == "flip":
        data = old.view(torch.uint8).numpy() if old.numel() else np.zeros(0, np.uint8)
        for _ in range(chance.choice([1, 1, 3, 9]) if data.size else 0):
            data[chance.randrange(data.size)] ^= 1 << chance.randrange(8)
    elif kind == "number" and old.numel():
        old[chance.randrange(old.numel())] = chance.choice([0, 1, -1 if old.dtype != torch.uint8 else 255, 127])
    elif kind == "cut":
        old = old[: chance.randrange(old.numel() + 1)].clone()
    elif kind == "grow":
        old = torch.cat([old, old[:3]])
    elif kind == "type":
        dtypes = [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bool]
        old = old.to(chance.choice(dtypes))
    elif kind == "swap":
        other = chance.choice(sorted(arrays))
        return {**arrays, name: arrays[other], other: old}
    elif kind == "reverse":
        old = old.flip(0)
    return {**arrays, name: old}


@pytest.mark.parametrize("form", FORMS)
def test_mutated_arrays_are_refused_or_give_a_tensor(form: str) -> None:
    for seed in range(2000):
        chance = random.Random(seed)
        arrays = good(form)
        for _ in range(chance.choice([1, 1, 2])):
            arrays = mutated(arrays, chance)
        shape = chance.choice([SHAPE, SHAPE, SHAPE, (700, 6), (4200,), (6, 701), (2**31, 3), (0,), ()])
        try:
            tensor = restored(arrays, "a", shape, "float32")
        except (ValueError, KeyError):
            continue
        assert tuple(tensor.shape) == shape, f"seed {seed}"
        assert math.prod(shape) <= EXPANSION * (size(arrays) + 1), f"seed {seed}"
