"""conform gives the tensor itself where it lies right, else a copy that does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zeroskip.core.layout import Layout, allocate, conform, workspace

CONTIGUOUS = Layout("nchw", (0, 0))
ANY_HALO = Layout("nchw")
HALO = Layout("nchw", (1, 2))


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 5, 7))


TWISTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second column": lambda x: torch.stack([x, x], -1).flatten(3)[..., ::2],
    "column slice": lambda x: torch.cat([x, x], 3)[..., :7],
    "row slice": lambda x: torch.cat([x, x], 2)[:, :, :5],
    "channel slice": lambda x: torch.cat([x, x], 1)[:, :3],
    "expanded images": lambda x: x[:1].expand(2, -1, -1, -1),
    "expanded channels": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "expanded rows": lambda x: x[:, :, :1].expand(-1, -1, 5, -1),
    "expanded columns": lambda x: x[..., :1].expand(-1, -1, -1, 7),
    "flipped channels": lambda x: x.flip(1),
}


@pytest.mark.parametrize("layout", [CONTIGUOUS, ANY_HALO, HALO, Layout("nhwc"), Layout("any")], ids=str)
@pytest.mark.parametrize("twist", TWISTS)
def test_values_stay_and_strides_are_as_promised(twist: str, layout: Layout) -> None:
    x = TWISTS[twist](image())
    y = conform(x, (0, 0), layout)
    assert torch.equal(x, y)
    if layout.order == "nhwc":
        assert y.is_contiguous(memory_format=torch.channels_last)
    elif layout == CONTIGUOUS:
        assert (y.stride(3), y.stride(2)) == (1, 7)
    elif layout.order == "nchw":
        assert y.stride(3) == 1
        assert y.stride(2) >= 7
        assert y.stride(1) >= y.stride(2)


def halo_of(y: Tensor, rows: int, columns: int) -> Tensor:
    """The whole buffer around a view of it."""
    n, c, h, w = y.shape
    return y.as_strided(
        (n, c, h + 2 * rows, w + 2 * columns), y.stride(), y.storage_offset() - rows * y.stride(2) - columns
    )


def test_a_copy_with_halo_has_zeros_around_it() -> None:
    x = image()
    whole = halo_of(conform(x, (0, 0), HALO), 1, 2)
    assert torch.equal(whole, torch.nn.functional.pad(x, (2, 2, 1, 1)))


@pytest.mark.parametrize(
    ("have", "is_same"), [((1, 2), True), ((2, 3), True), ((0, 2), False), ((1, 1), False), ((0, 0), False)]
)
def test_a_halo_that_is_large_enough_is_taken_as_it_is(have: tuple[int, int], is_same: bool) -> None:
    x = allocate((2, 3, 5, 7), have).copy_(image())
    y = conform(x, have, HALO)
    assert (y is x) == is_same
    assert torch.equal(x, y)


def test_contiguous_is_taken_as_it_is() -> None:
    x = image()
    assert conform(x, (0, 0), CONTIGUOUS) is x
    assert conform(x, (0, 0), ANY_HALO) is x
    channel_slice = torch.cat([x, x], 1)[:, 1:4]
    assert conform(channel_slice, (0, 0), CONTIGUOUS) is channel_slice


def test_a_buffer_with_halo_is_copied_for_a_reader_of_gapless_planes() -> None:
    x = allocate((2, 3, 5, 7), (1, 1)).copy_(image())
    y = conform(x, (1, 1), CONTIGUOUS)
    assert y is not x
    assert y.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 7), (2, 3, 7, 1), (0, 3, 4, 4)])
@pytest.mark.parametrize("layout", [CONTIGUOUS, ANY_HALO, HALO, Layout("nhwc")], ids=str)
def test_degenerate_images_conform(shape: tuple[int, ...], layout: Layout) -> None:
    for x in (image(*shape), image(*shape).contiguous(memory_format=torch.channels_last)):
        assert torch.equal(conform(x, (0, 0), layout), x)


@pytest.mark.parametrize(
    "twist", [lambda x: x.t(), lambda x: torch.cat([x, x], 1)[:, :4], lambda x: x[:1].expand(4, 4)]
)
def test_matrices_become_contiguous(twist: object) -> None:
    x = twist(torch.randn(4, 4))  # type: ignore[operator]
    y = conform(x, (0, 0), CONTIGUOUS)
    assert y.is_contiguous()
    assert torch.equal(x, y)


def test_allocate_gives_zeros_with_the_border() -> None:
    x = allocate((1, 2, 3, 4), (2, 1), torch.float64)
    assert x.shape == (1, 2, 3, 4)
    assert x.dtype == torch.float64
    assert not halo_of(x, 2, 1).any()
    assert x.untyped_storage().nbytes() == 2 * 7 * 6 * 8


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_workspace_is_aligned_and_as_large_as_asked(size: int) -> None:
    memory = workspace(size)
    assert memory is not None
    assert memory.numel() == size
    assert memory.data_ptr() % 64 == 0


def test_no_workspace_is_none() -> None:
    assert workspace(0) is None
