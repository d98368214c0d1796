"""Our max pooling computes what torch computes, NaN and -inf included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from contract.cases import stable
from zeroskip.cpu.max_pool import MaxPool, bind


def assert_as_torch(pool: MaxPool, x: Tensor, threads: int = 1) -> None:
    want = functional.max_pool2d(x, pool.window, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)
    y = bind(pool, threads)(x)
    assert y.shape == want.shape
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(
        y.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf),
        want.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf),
    )


def numbers(shape: tuple[int, ...], kind: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    holes = torch.rand(shape, generator=generator) < 0.2
    if kind == "nan":
        return torch.where(holes, torch.nan, x)
    if kind == "inf":
        return torch.where(holes, torch.where(x > 0, torch.inf, -torch.inf), x)
    return torch.full(shape, -torch.inf) if kind == "all -inf" else x


@given(data=st.data())
@stable(60)
def test_random_poolings_equal_torch(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    window, stride = (draw(1, 5), draw(1, 5)), (draw(1, 4), draw(1, 4))
    padding = (draw(0, window[0] // 2), draw(0, window[1] // 2))
    n, c, h, w = draw(1, 3), draw(1, 5), draw(1, 40), draw(1, 40)
    assume(h + 2 * padding[0] >= window[0] and w + 2 * padding[1] >= window[1])
    pool = MaxPool(h, w, window, stride, padding, data.draw(st.booleans()))
    assert_as_torch(
        pool, numbers((n, c, h, w), data.draw(st.sampled_from(["plain", "nan", "inf", "all -inf"])), draw(0, 99))
    )


@pytest.mark.parametrize("kind", ["plain", "nan", "inf", "all -inf"])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    "pool",
    [
        ((3, 3), (2, 2), (1, 1)),
        ((3, 3), (2, 2), (0, 0)),
        ((2, 2), (2, 2), (0, 0)),
        ((3, 3), (3, 3), (1, 1)),
        ((3, 3), (1, 1), (1, 1)),
        ((1, 1), (2, 2), (0, 0)),
        ((2, 5), (3, 1), (1, 2)),
        ((5, 5), (4, 4), (2, 2)),
    ],
)
def test_common_poolings_equal_torch(pool: tuple[tuple[int, int], ...], ceil_mode: bool, kind: str) -> None:
    for h, w in ((13, 21), (16, 17), (5, 33)):
        assert_as_torch(MaxPool(h, w, *pool, ceil_mode), numbers((2, 3, h, w), kind))


@pytest.mark.parametrize("kind", ["plain", "nan", "all -inf"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_images_of_a_pixel_or_a_line(shape: tuple[int, int], kind: str) -> None:
    for ceil_mode in (False, True):
        assert_as_torch(MaxPool(*shape, (3, 3), (2, 2), (1, 1), ceil_mode), numbers((2, 3, *shape), kind))
        assert_as_torch(MaxPool(*shape, (1, 1), (1, 1), (0, 0), ceil_mode), numbers((2, 3, *shape), kind))


@pytest.mark.parametrize(
    "twist",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 1)[:, 2:5],
        lambda x: functional.pad(x, (2, 2, 1, 1), value=torch.nan)[:, :, 1:-1, 2:-2],
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
        lambda x: x.double(),
        lambda x: x[:0],
    ],
)
def test_any_strides_dtype_and_batch_equal_torch(twist: object) -> None:
    x = twist(numbers((2, 3, 12, 19), "nan"))  # type: ignore[operator]
    assert_as_torch(MaxPool(12, 19, (3, 3), (2, 2), (1, 1), False), x)


def test_two_threads_equal_torch() -> None:
    assert_as_torch(MaxPool(24, 31, (3, 3), (2, 2), (1, 1), True), numbers((2, 17, 24, 31), "nan"), threads=2)


def test_the_result_is_a_new_tensor() -> None:
    x, pool = numbers((1, 2, 8, 8), "plain"), bind(MaxPool(8, 8, (2, 2), (2, 2), (0, 0), False), 1)
    first = pool(x)
    kept = first.clone()
    pool(x + 1)
    assert torch.equal(first, kept)
