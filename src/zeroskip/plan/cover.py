"""The cheapest cover of the graph: which segments, and which option for each, conversions between them included."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from zeroskip.core.device import Device
from zeroskip.core.graph import Graph, Value
from zeroskip.core.layout import Layout
from zeroskip.plan.tune import Option

SWEEPS = 4


@dataclass(frozen=True)
class CopyCost:
    """What copying a tensor into another layout takes: a cautious rate, read and written, and the least time."""

    gbps: float = 8.0
    least_us: float = 0.0

    @staticmethod
    def on(device: Device) -> CopyCost:
        """8 GB/s on a CPU.  On a GPU a launch, and half of what memory gives."""
        if device.kind == "cpu":
            return CopyCost()
        return CopyCost((device.bandwidth_gbps or 1000.0) / 2, 2.0)

    def us(self, value: Value) -> float:
        item: int = getattr(torch, value.dtype).itemsize
        return self.least_us + 2 * item * math.prod(value.shape) / self.gbps / 1e3


@dataclass(frozen=True)
class Choice:
    """The options chosen, in topological order of their first node."""

    options: tuple[Option, ...]
    total_us: float


def cover(graph: Graph, options: Mapping[str, Sequence[Option]], copies: CopyCost = CopyCost()) -> Choice:
    """Choose segments so that every layer is run exactly once and the sum of times is least.

    Args:
        options: by starting node, every option of every segment that starts there.  A node that no segment
            covers runs in torch.

    First an exact search over segments with their own best times, then sweeps that let each segment change its
    option in view of its neighbours' layouts.
    """
    order = [node.name for node in graph.nodes]
    starts = [name for name in order if options.get(name)]
    position = {name: index for index, name in enumerate(starts)}

    @functools.cache
    def best(index: int, taken: frozenset[str]) -> tuple[float, tuple[Option, ...]]:
        while index < len(starts) and starts[index] in taken:
            index += 1
        if index == len(starts):
            return 0.0, ()
        results: list[tuple[float, tuple[Option, ...]]] = []
        for option in _best_of_each_segment(options[starts[index]]):
            nodes = set(option.segment.nodes)
            if nodes & taken:
                continue
            ahead = frozenset(name for name in taken | nodes if position.get(name, -1) > index)
            rest, others = best(index + 1, ahead)
            results.append((option.time_us + rest, (option, *others)))
        return min(results, key=lambda result: result[0], default=(math.inf, ()))

    _, chosen = best(0, frozenset())
    return _settle(graph, list(chosen), options, copies)


def _best_of_each_segment(options: Sequence[Option]) -> list[Option]:
    by_nodes: dict[tuple[str, ...], Option] = {}
    for option in options:
        known = by_nodes.get(option.segment.nodes)
        if known is None or option.time_us < known.time_us:
            by_nodes[option.segment.nodes] = option
    return list(by_nodes.values())


def _settle(graph: Graph, chosen: list[Option], options: Mapping[str, Sequence[Option]], copies: CopyCost) -> Choice:
    """Change one option at a time while that lowers the total with conversions."""
    for _ in range(SWEEPS):
        changed = False
        for index, current in enumerate(chosen):
            alternatives = [
                option for option in options[current.segment.nodes[0]] if option.segment.nodes == current.segment.nodes
            ]

            def price(option: Option, index: int = index) -> float:
                around = [*chosen[:index], option, *chosen[index + 1 :]]
                return option.time_us + _conversions_us(graph, around, option, copies)

            cheapest = min(alternatives, key=price)
            if price(cheapest) < price(current):
                chosen[index], changed = cheapest, True
        if not changed:
            break
    total = sum(option.time_us for option in chosen) + conversions_us(graph, chosen, copies)
    return Choice(tuple(chosen), total)


def conversions_us(graph: Graph, chosen: Sequence[Option], copies: CopyCost = CopyCost()) -> float:
    """Estimated time of every copy between layouts that ``chosen`` implies."""
    produced = _produced(chosen)
    return sum(
        _copy_us(graph.values[name], produced.get(name), want, copies)
        for option in chosen
        for name, want in zip(option.segment.inputs, option.candidate.inputs, strict=True)
    )


def _conversions_us(graph: Graph, chosen: Sequence[Option], around: Option, copies: CopyCost) -> float:
    """The same, for the edges that touch one option."""
    produced, mine = _produced(chosen), set(around.segment.outputs)
    return sum(
        _copy_us(graph.values[name], produced.get(name), want, copies)
        for option in chosen
        for name, want in zip(option.segment.inputs, option.candidate.inputs, strict=True)
        if option is around or name in mine
    )


def _produced(chosen: Sequence[Option]) -> dict[str, Layout]:
    return {
        name: layout
        for option in chosen
        for name, layout in zip(option.segment.outputs, option.candidate.outputs, strict=True)
    }


def _copy_us(value: Value, have: Layout | None, want: Layout, copies: CopyCost) -> float:
    """0 where the consumer can read what the producer leaves; torch operators leave contiguous NCHW."""
    have = have or Layout("nchw")
    if want.order == "any" or have.order == "any":
        return 0.0
    same = have.order == want.order
    if same and (not want.halo or want.halo == (0, 0) or have.writes_halo):
        return 0.0
    return copies.us(value)
