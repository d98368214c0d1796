"""Dataclasses to JSON and back, and what is said about anything else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.cases import stable
from zeroskip.core.errors import FileFormatError, ZeroskipError
from zeroskip.core.jsonable import from_json, to_json


@dataclass(frozen=True)
class Inner:
    size: int
    ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size must not be negative, got {self.size}")


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    pair: tuple[int, int]
    many: tuple[Inner, ...] = ()
    table: dict[str, Inner] = field(default_factory=dict)
    maybe: Inner | None = None
    flag: bool = False
    free: Any = None


inners = st.builds(Inner, st.integers(0, 2**60), st.floats(allow_nan=False, allow_infinity=False))
outers = st.builds(
    Outer,
    st.text(),
    st.sampled_from(["a", "b"]),
    st.tuples(st.integers(), st.integers()),
    st.lists(inners).map(tuple),
    st.dictionaries(st.text(), inners),
    st.none() | inners,
    st.booleans(),
    st.none() | st.text(),
)


@given(record=outers)
@stable(80)
def test_a_record_survives_json_text(record: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(to_json(record)))) == record


def test_defaults_fill_missing_fields() -> None:
    assert from_json(Outer, {"name": "x", "kind": "b", "pair": [1, 2]}) == Outer("x", "b", (1, 2))


def test_an_integer_is_taken_for_a_float_field_as_a_float() -> None:
    found = from_json(Inner, {"size": 1, "ratio": 3})
    assert isinstance(found.ratio, float)


BASE = to_json(Outer("x", "a", (1, 2), (Inner(1),), {"k": Inner(2)}, Inner(3)))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"name": 3}, r"\$\.name"),
        ({"kind": "c"}, r"\$\.kind"),
        ({"kind": ["a"]}, r"\$\.kind"),
        ({"pair": [1]}, r"\$\.pair"),
        ({"pair": [1, 2, 3]}, r"\$\.pair"),
        ({"pair": [1, "2"]}, r"\$\.pair\[1\]"),
        ({"pair": [1, True]}, r"\$\.pair\[1\]"),
        ({"pair": [1, 2.0]}, r"\$\.pair\[1\]"),
        ({"pair": "12"}, r"\$\.pair"),
        ({"many": {"size": 1}}, r"\$\.many"),
        ({"many": [{"size": 1}, {"size": None}]}, r"\$\.many\[1\]"),
        ({"many": [{"size": -1}]}, r"\$\.many\[0\].*must not be negative"),
        ({"many": [{}]}, r"lacks \['size'\]"),
        ({"many": [{"size": 1, "colour": 2}]}, r"unknown fields \['colour'\]"),
        ({"table": []}, r"\$\.table"),
        ({"table": {"k": 1}}, r"\$\.table\.k"),
        ({"maybe": 5}, r"\$\.maybe"),
        ({"flag": 1}, r"\$\.flag"),
        ({"flag": None}, r"\$\.flag"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(change: dict[str, Any], place: str) -> None:
    with pytest.raises(FileFormatError, match=place):
        from_json(Outer, {**BASE, **change})


@pytest.mark.parametrize("data", [None, [], "text", 3, True])
def test_a_record_is_made_of_an_object_only(data: Any) -> None:
    with pytest.raises(FileFormatError, match="expected Outer"):
        from_json(Outer, data)


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(FileFormatError) as caught:
        from_json(Inner, {"size": "x" * 10_000})
    assert len(str(caught.value)) < 500


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="no JSON form for set"):
        to_json({"a": {1, 2}})


def test_a_format_error_is_both_a_zeroskip_error_and_a_value_error() -> None:
    assert issubclass(FileFormatError, ZeroskipError)
    assert issubclass(FileFormatError, ValueError)
