"""Which nodes of a graph are max poolings that our own kernel covers; it runs on the CPU only."""

from __future__ import annotations

from typing import Any

from zeroskip.core.graph import Graph, Node, pair
from zeroskip.cpu.max_pool import MaxPool


def max_pool_of(graph: Graph, node: Node) -> MaxPool | None:
    """The pooling that ``node`` computes, or None where torch must run it."""
    if node.op != "aten.max_pool2d.default" or node.args[0].ref not in graph.values:
        return None
    x = graph.values[node.args[0].ref]
    given: tuple[Any, ...] = node.args[1:]
    window, stride, padding, dilation, ceil_mode = given + ((), 0, 1, False)[len(given) - 1 :]
    if len(x.shape) != 4 or x.dtype != "float32" or pair(dilation) != (1, 1):
        return None
    return MaxPool(x.shape[2], x.shape[3], pair(window), pair(stride or window), pair(padding), bool(ceil_mode))
