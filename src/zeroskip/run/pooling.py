"""Which nodes of a graph are max poolings that our own kernel covers."""

from __future__ import annotations

from zeroskip.core.graph import Graph, Node, pair
from zeroskip.cpu.max_pool import MaxPool


def max_pool_of(graph: Graph, node: Node) -> MaxPool | None:
    """The pooling that ``node`` computes, or None where torch must run it."""
    if node.op != "aten.max_pool2d.default" or node.args[0].ref not in graph.values:
        return None
    x = graph.values[node.args[0].ref]
    window, stride, padding, dilation, ceil_mode = (*node.args[1:], *((), 0, 1, False)[len(node.args) - 2 :])
    if len(x.shape) != 4 or x.dtype != "float32" or pair(dilation) != (1, 1):
        return None
    return MaxPool(x.shape[2], x.shape[3], pair(window), pair(stride or window), pair(padding), bool(ceil_mode))
