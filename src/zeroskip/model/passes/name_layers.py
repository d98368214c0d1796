"""Recognise convolutions and linear layers, and name them after the module that holds their weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zeroskip.core.graph import CONV, LINEAR, ConvAttributes, Graph, Node, Ref, pair, substitute
from zeroskip.model.program import PRECISIONS, Program


def name_layers(program: Program) -> Program:
    """``aten.conv2d`` and ``aten.linear`` with the model's own weights become ``conv2d`` and ``linear`` nodes."""
    graph = program.graph
    taken = {*graph.inputs, *graph.parameters, *(node.name for node in graph.nodes)}
    nodes, renamed = [], dict[str, str]()
    for node in graph.nodes:
        layer = _layer(graph, node)
        if layer is not None:
            name = layer.args[1].ref.removesuffix(".weight")
            if name not in taken:
                taken.add(name)
                renamed[node.name] = name
            node = layer
        nodes.append(node)
    links = {old: Ref(new) for old, new in renamed.items()}
    nodes = [
        replace(
            node,
            name=renamed.get(node.name, node.name),
            args=substitute(node.args, links),
            kwargs=substitute(node.kwargs, links),
        )
        for node in nodes
    ]
    values = {renamed.get(name, name): value for name, value in graph.values.items()}
    return Program(
        replace(graph, nodes=tuple(nodes), values=values, outputs=substitute(graph.outputs, links)), program.tensors
    )


def _layer(graph: Graph, node: Node) -> Node | None:
    if node.op not in ("aten.conv2d.default", "aten.conv2d.padding", "aten.linear.default"):
        return None
    x, weight, bias = (*node.args, None)[:3] if len(node.args) < 3 else node.args[:3]
    own = weight.ref in graph.parameters and (bias is None or bias.ref in graph.parameters)
    if not own or x.ref in graph.parameters:
        return None
    if graph.parameters[weight.ref].dtype not in PRECISIONS:
        return None
    if node.op == "aten.linear.default":
        sizes = graph.parameters[weight.ref].shape
        broadcast = bias is not None and graph.parameters[bias.ref].shape != sizes[:1]
        if len(graph.values[x.ref].shape) < 2 or len(sizes) != 2 or broadcast:
            return None  # more than a matrix and a number for each output: left to torch
        return Node(node.name, LINEAR, (x, weight, bias, None), {}, ConvAttributes())
    if len(graph.values[x.ref].shape) != 4:
        return None
    given: tuple[Any, ...] = node.args[3:]
    stride, padding, dilation, groups = given + (1, 0, 1, 1)[len(given) :]
    dilation_pair = pair(dilation)
    if isinstance(padding, str):
        kernel = graph.parameters[weight.ref].shape[2:]
        doubled = [
            step * (size - 1) if padding == "same" else 0 for step, size in zip(dilation_pair, kernel, strict=True)
        ]
        if any(total % 2 for total in doubled):
            return None  # torch pads such a kernel on one side only
        padding = [total // 2 for total in doubled]
    attributes = ConvAttributes(pair(stride), pair(padding), dilation_pair, groups)
    return Node(node.name, CONV, (x, weight, bias, None), {}, attributes)
