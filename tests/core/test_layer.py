"""Shapes refuse what no kernel could run; sparsity is what is found in the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional

from contract.cases import sparse_weight, stable
from zeroskip.core.layer import MAX_ELEMENTS, ConvShape, Epilogue, Layer, Sparsity

GOOD = ConvShape(1, 4, 8, 8, 6, 3, 3, padding=(1, 1))
sizes = st.integers(1, 9)


@given(
    n=st.integers(0, 3),
    c=sizes,
    h=sizes,
    w=sizes,
    k=sizes,
    r=sizes,
    s=sizes,
    stride=st.tuples(sizes, sizes),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
@stable(60)
def test_output_shape_is_torchs(
    n: int,
    c: int,
    h: int,
    w: int,
    k: int,
    r: int,
    s: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    assume(h + 2 * padding[0] > dilation[0] * (r - 1) and w + 2 * padding[1] > dilation[1] * (s - 1))
    shape = ConvShape(n, c, h, w, k, r, s, stride, padding, dilation)
    y = functional.conv2d(
        torch.empty(shape.input_shape, device="meta"),
        torch.empty(shape.weight_shape, device="meta"),
        None,
        stride,
        padding,
        dilation,
    )
    assert tuple(y.shape) == shape.output_shape
    m, pixels, depth = shape.gemm
    assert m * pixels * depth == shape.macs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"h": 0}, "must be positive"),
        ({"c": -4}, "must be positive"),
        ({"n": -1}, "must be positive"),
        ({"stride": (0, 1)}, "must be positive"),
        ({"dilation": (1, 0)}, "must be positive"),
        ({"padding": (-1, 0)}, "must be positive"),
        ({"groups": 0}, "must be positive"),
        ({"groups": 4}, "divide by groups"),
        ({"groups": 3}, "divide by groups"),
        ({"r": 11}, "larger than the padded input"),
        ({"dilation": (5, 1)}, "larger than the padded input"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(GOOD, **change)


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ({"n": 2**23}, "input|output"),
        ({"c": 2**22, "h": 32, "w": 32, "k": 1}, "input"),
        ({"k": 2**26}, "output"),
        ({"c": 2**16, "k": 2**16, "h": 3, "w": 3, "padding": (0, 0)}, "weight"),
    ],
)
def test_more_than_2_to_the_31_elements_are_refused(shape: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=rf"the ({what}) would have \d+ elements; at most {MAX_ELEMENTS}"):
        replace(GOOD, **shape)


def test_exactly_2_to_the_31_less_one_elements_are_accepted() -> None:
    assert ConvShape(1, 1, 1, MAX_ELEMENTS, 1, 1, 1).w == MAX_ELEMENTS


def test_an_empty_batch_is_a_shape() -> None:
    shape = replace(GOOD, n=0)
    assert shape.macs == 0
    assert shape.output_shape == (0, 6, 8, 8)


# -- sparsity ------------------------------------------------------------------------------------------
def test_full_weights_are_dense() -> None:
    found = Sparsity.of(torch.ones(4, 3, 3, 3))
    assert (found.pattern, found.density, found.nnz, found.row_nnz_cv) == ("dense", 1.0, 108, 0.0)


def test_no_weights_at_all_have_density_zero() -> None:
    found = Sparsity.of(torch.zeros(4, 3, 3, 3))
    assert (found.nnz, found.density, found.row_nnz_cv) == (0, 0.0, 0.0)


def test_nan_counts_as_a_weight_and_minus_zero_does_not() -> None:
    weight = torch.zeros(2, 3)
    weight[0, 0], weight[1, 1] = torch.nan, -0.0
    assert Sparsity.of(weight).nnz == 1


@pytest.mark.parametrize("shape", [(6, 8, 3, 3), (6, 8)])
def test_two_of_every_four_input_channels_is_2_4(shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape)
    weight[:, ::4] = 0
    weight[:, 3::4] = 0
    assert Sparsity.of(weight).pattern == "2:4"
    weight[:, 0] = 1
    weight[:, 4] = 0
    weight[:, 5] = 0
    assert Sparsity.of(weight).density == 0.5
    assert Sparsity.of(weight).pattern == "unstructured"


def test_a_2_4_pattern_broken_in_the_last_row_is_unstructured() -> None:
    weight = torch.zeros(6, 8)
    weight[:, :2] = 1
    weight[5, :3] = 1
    assert Sparsity.of(weight).pattern == "unstructured"


def test_whole_filters_of_zeros_are_filter() -> None:
    weight = torch.ones(6, 5, 3, 3)
    weight[[1, 4]] = 0
    found = Sparsity.of(weight)
    assert found.pattern == "filter"
    assert found.row_nnz_cv == pytest.approx(0.5**0.5)


def test_scattered_zeros_are_unstructured() -> None:
    assert Sparsity.of(sparse_weight((8, 7, 3, 3), 0.3)).pattern == "unstructured"


def test_the_key_of_a_layer_ignores_its_name_and_a_thousandth_of_density() -> None:
    def layer(name: str, nnz: int, **more: object) -> Layer:
        return Layer(name, "conv2d", GOOD, "fp32", Sparsity(nnz, nnz / 10_000, "unstructured", 0.1), **more)

    assert layer("a", 1000).key == layer("b", 1003).key
    assert layer("a", 1000).key != layer("a", 2000).key
    assert layer("a", 1000).key != layer("a", 1000, epilogue=Epilogue(bias=True)).key
