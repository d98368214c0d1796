"""The cover: every layer once, the least total time, copies between layouts included."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.cases import stable
from zeroskip.core.cost import Cost
from zeroskip.core.device import Device, cpu
from zeroskip.core.graph import CONV, ConvAttributes, Graph, Node, Ref, Segment, Value
from zeroskip.core.layer import ConvShape, Layer, Sparsity
from zeroskip.core.layout import Layout
from zeroskip.core.method import Candidate
from zeroskip.plan.cover import Choice, CopyCost, conversions_us, cover
from zeroskip.plan.tune import Option

SHAPE = (1, 8, 10, 10)
COPY_US = 2 * 4 * 800 / CopyCost().gbps / 1e3
NCHW, NHWC, ANY, PLANES, HALO = (
    Layout("nchw"),
    Layout("nhwc"),
    Layout("any"),
    Layout("nchw", (0, 0)),
    Layout("nchw", (1, 1)),
)
WRITES = Layout("nchw", writes_halo=True)


def chain(length: int, extra: dict[int, str] | None = None) -> Graph:
    """Convolutions ``c0``, ``c1``, ...; ``extra``: a torch operator in front of that one."""
    nodes, values, last = [], {"x": Value(SHAPE, "float32")}, "x"
    for index in range(length):
        if extra and index in extra:
            nodes.append(Node(f"t{index}", extra[index], (Ref(last),)))
            last = f"t{index}"
            values[last] = Value(SHAPE, "float32")
        nodes.append(Node(f"c{index}", CONV, (Ref(last), Ref("w"), None, None), conv=ConvAttributes()))
        last = f"c{index}"
        values[last] = Value(SHAPE, "float32")
    return Graph(("x",), Ref(last), tuple(nodes), values, {"w": Value((8, 8, 1, 1), "float32")})


@dataclass(frozen=True)
class Config:
    number: int


def option(
    graph: Graph,
    nodes: tuple[str, ...],
    time_us: float,
    method: str = "m",
    want: Layout = ANY,
    leave: Layout = ANY,
    number: int = 0,
) -> Option:
    first = graph.node(nodes[0])
    layers = tuple(
        Layer(name, "conv2d", ConvShape(1, 8, 10, 10, 8, 1, 1), "fp32", Sparsity(6, 0.1, "unstructured", 0.0))
        for name in nodes
    )
    segment = Segment(nodes, (first.inputs[0],), (nodes[-1],), layers)
    return Option(method, Candidate(Config(number), (want,), (leave,)), segment, time_us, 0.0, 0.0, 0, Cost(0, 0, 0))


def methods(choice: Choice) -> list[tuple[str, tuple[str, ...]]]:
    return [(one.method, one.segment.nodes) for one in choice.options]


def test_the_fastest_option_of_each_layer_wins() -> None:
    graph = chain(2)
    choice = cover(
        graph,
        {
            "c0": [option(graph, ("c0",), 5, "a"), option(graph, ("c0",), 3, "b")],
            "c1": [option(graph, ("c1",), 1, "a"), option(graph, ("c1",), 2, "b")],
        },
    )
    assert methods(choice) == [("b", ("c0",)), ("a", ("c1",))]
    assert choice.total_us == 4


@pytest.mark.parametrize(("fused", "wins"), [(5.9, True), (6.1, False)])
def test_a_segment_of_two_layers_wins_or_loses_by_its_time(fused: float, wins: bool) -> None:
    graph = chain(3)
    options = {name: [option(graph, (name,), 3, "single")] for name in ("c0", "c1", "c2")}
    options["c1"].append(option(graph, ("c1", "c2"), fused, "pair"))
    choice = cover(graph, options)
    assert (("pair", ("c1", "c2")) in methods(choice)) == wins
    assert choice.total_us == pytest.approx(min(9.0, 3 + fused))


def test_of_overlapping_segments_the_best_set_is_taken() -> None:
    """Greedy from the left would take c0+c1 and pay for c2 alone."""
    graph = chain(4)
    options = {name: [option(graph, (name,), 10, "single")] for name in ("c0", "c1", "c2", "c3")}
    options["c0"].append(option(graph, ("c0", "c1"), 11, "pair"))
    options["c1"].append(option(graph, ("c1", "c2", "c3"), 12, "triple"))
    assert methods(cover(graph, options)) == [("single", ("c0",)), ("triple", ("c1", "c2", "c3"))]


def test_a_layer_that_only_a_longer_segment_covers_is_covered_by_it() -> None:
    graph = chain(2)
    options = {"c0": [option(graph, ("c0",), 1, "single"), option(graph, ("c0", "c1"), 50, "pair")], "c1": []}
    del options["c1"]
    assert methods(cover(graph, options)) == [("single", ("c0",))]  # c1 is nobody's: torch runs it


@given(st.integers(1, 7), st.integers(0, 10_000))
@stable(60)
def test_the_cover_is_the_best_of_all(length: int, seed: int) -> None:
    """Against brute force, where every layout is free."""
    graph, chance = chain(length), random.Random(seed)
    names = [f"c{index}" for index in range(length)]
    options = {name: [option(graph, (name,), chance.randint(1, 20), "single")] for name in names}
    for start, end in itertools.combinations(range(length), 2):
        if chance.random() < 0.4:
            options[names[start]].append(option(graph, tuple(names[start : end + 1]), chance.randint(1, 40), "long"))

    def brute(position: int) -> float:
        if position == length:
            return 0.0
        return min(one.time_us + brute(position + len(one.segment.nodes)) for one in options[names[position]])

    choice = cover(graph, options)
    assert choice.total_us == brute(0)
    assert sorted(name for one in choice.options for name in one.segment.nodes) == sorted(names)


# -- layouts ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("leave", "want", "copies"),
    [
        (NCHW, NCHW, 0),
        (NHWC, NHWC, 0),
        (NHWC, NCHW, 1),
        (NCHW, NHWC, 1),
        (ANY, NHWC, 0),
        (NHWC, ANY, 0),
        (NCHW, PLANES, 0),
        (NCHW, HALO, 1),
        (WRITES, HALO, 0),
        (WRITES, PLANES, 0),
        (NHWC, HALO, 1),
    ],
)
def test_a_copy_is_priced_where_layouts_differ(leave: Layout, want: Layout, copies: int) -> None:
    graph = chain(2)
    chosen = [option(graph, ("c0",), 1, leave=leave), option(graph, ("c1",), 1, want=want)]
    assert conversions_us(graph, chosen) == pytest.approx(copies * COPY_US)


def test_torch_leaves_contiguous_images() -> None:
    graph = chain(2, {1: "aten.sin.default"})
    assert conversions_us(
        graph, [option(graph, ("c0",), 1, leave=NHWC), option(graph, ("c1",), 1, want=NHWC)]
    ) == pytest.approx(COPY_US)


@pytest.mark.parametrize(("difference", "expected"), [(0.5 * COPY_US, "same"), (2.5 * COPY_US, "fast")])
def test_an_option_in_another_layout_must_gain_more_than_its_copies_cost(difference: float, expected: str) -> None:
    graph = chain(3)
    options = {name: [option(graph, (name,), 10, "same", NCHW, NCHW)] for name in ("c0", "c1", "c2")}
    options["c1"].append(option(graph, ("c1",), 10 - difference, "fast", NHWC, NHWC))
    choice = cover(graph, options)
    assert methods(choice)[1][0] == expected
    assert choice.total_us == pytest.approx(30 if expected == "same" else 30 - difference + 2 * COPY_US)


def test_neighbours_move_to_a_common_layout_together_or_stay() -> None:
    """Whatever the sweeps find, it is never worse than the best isolated choice with its copies."""
    graph = chain(4)
    options = {
        f"c{index}": [
            option(graph, (f"c{index}",), 10, "a", NCHW, NCHW),
            option(graph, (f"c{index}",), 9.9, "b", NHWC, NHWC),
        ]
        for index in range(4)
    }
    choice = cover(graph, options)
    assert choice.total_us <= 4 * 9.9 + COPY_US + 1e-9
    assert len({one.method for one in choice.options}) == 1


def test_a_copy_on_a_gpu_costs_a_launch_and_its_bytes() -> None:
    small, large = Value((1, 8), "float32"), Value((1, 2**28), "float16")
    device = Device("cuda", "a GPU", 50 << 20, bandwidth_gbps=2000.0)
    assert CopyCost.on(cpu(1)) == CopyCost()
    assert CopyCost.on(device).us(small) == pytest.approx(2.0, abs=0.01)
    assert CopyCost.on(device).us(large) == pytest.approx(2.0 + 2 * 2 * 2**28 / 1000.0 / 1e3)
    assert CopyCost.on(Device("cuda", "never measured", 50 << 20)).us(large) > 100
