"""A graph written as JSON is read back as it was."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from contract.cases import Net, stable
from zeroskip.core.graph import (
    CONV,
    ConvAttributes,
    Graph,
    Node,
    Ref,
    Value,
    graph_from_json,
    graph_to_json,
    nest_from_json,
    nest_to_json,
    pair,
    refs,
    substitute,
)
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.model.passes import simplify
from zeroskip.model.trace import trace

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.text(min_size=1, max_size=5).map(Ref)
)
nests = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(nest=nests)
@stable(150)
def test_arguments_survive_json_text(nest: Any) -> None:
    again = nest_from_json(json.loads(json.dumps(nest_to_json(nest), allow_nan=False)))
    assert again == nest
    assert repr(again) == repr(nest)  # tuples stay tuples, floats floats


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_arguments_survive(value: float) -> None:
    assert nest_from_json(nest_to_json((value,))) == (value,)


def test_nan_survives() -> None:
    again = nest_from_json(nest_to_json([math.nan]))
    assert math.isnan(again[0])


@pytest.mark.parametrize(
    "data", [{}, {"ref": 3}, {"ref": "a", "tuple": []}, {"tuple": "ab"}, {"float": "1.5"}, {"dict": []}, {"code": "x"}]
)
def test_an_unknown_mark_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="mark"):
        nest_from_json(data)


def test_what_has_no_json_form_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="no JSON form"):
        nest_to_json((object(),))


def test_a_hand_made_graph_survives() -> None:
    node = Node(
        "y",
        "conv2d",
        (Ref("x"), Ref("w"), None, None),
        {},
        ConvAttributes((2, 1), (1, 0), (1, 2), 4, "relu6", "before"),
    )
    clamp = Node("z", "aten.clamp.default", (Ref("y"), -math.inf, 3), {"size": [1, (2, 3)]})
    graph = Graph(
        ("x",),
        {"out": (Ref("z"), [Ref("y"), None, 3])},
        (node, clamp),
        {"x": Value((1, 2, 3, 4), "float32"), "y": Value((), "float32")},
        {"w": Value((4,), "float16")},
    )
    again = graph_from_json(json.loads(json.dumps(graph_to_json(graph))))
    assert again == graph
    assert str(again) == str(graph)


def test_a_traced_graph_survives() -> None:
    model = Net(
        lambda net, x: {"a": net.conv(x).clamp(min=-1.5), "b": (net.conv(x).flatten(1), x)},
        conv=nn.Conv2d(3, 4, 3, padding=1),
    )
    program = simplify(trace(model, (torch.zeros(1, 3, 5, 5),)))
    assert graph_from_json(json.loads(json.dumps(graph_to_json(program.graph)))) == program.graph


def test_users_and_refs_follow_nested_arguments() -> None:
    node = Node("y", "aten.cat.default", ([Ref("a"), Ref("b"), Ref("a")], 1), {"extra": {"k": (Ref("c"),)}})
    graph = Graph(("a", "b", "c"), Ref("y"), (node,), {}, {})
    assert node.inputs == ("a", "b", "a", "c")
    assert graph.users() == {"a": ["y"], "b": ["y"], "c": ["y"], "y": []}
    assert refs(substitute(node.args, {"a": Ref("z")})) == [Ref("z"), Ref("b"), Ref("z")]


@pytest.mark.parametrize(("value", "expected"), [(3, (3, 3)), ([2], (2, 2)), ([1, 2], (1, 2)), ((4, 5), (4, 5))])
def test_pair_reads_torchs_forms_of_a_size(value: Any, expected: tuple[int, int]) -> None:
    assert pair(value) == expected


def test_a_graph_written_before_tf32_was_known_is_strict() -> None:
    written = to_json(ConvAttributes(stride=(2, 2)))
    del written["tf32"]
    assert from_json(ConvAttributes, written) == ConvAttributes(stride=(2, 2), tf32=False)
    assert from_json(ConvAttributes, to_json(ConvAttributes(tf32=True))).tf32


def test_a_printed_graph_shows_what_is_not_the_rule() -> None:
    conv = ConvAttributes(padding=(1, 1), tf32=True)
    node = Node("a", CONV, (Ref("x"), Ref("w"), None, None), conv=conv)
    values = {"x": Value((1, 2, 3, 3), "float32"), "a": Value((1, 2, 3, 3), "float32")}
    text = str(Graph(("x",), Ref("a"), (node,), values, {"w": Value((2, 2, 3, 3), "float32")}))
    assert "padding=(1, 1) tf32=True" in text
    assert "stride" not in text
