"""A sum of a layer's output with another tensor of the same shape becomes part of the layer."""

from __future__ import annotations

from dataclasses import replace

from zeroskip.core.graph import CONV, LINEAR, Node, Ref
from zeroskip.core.layer import ResidualPlace
from zeroskip.model.program import Program, sole_user


def fuse_residual(program: Program) -> Program:
    """Fuse ``x + y`` into the later of its layers; the other operand exists by then."""
    for name in program.graph.names("aten.add.Tensor"):
        node = program.graph.node(name)
        if node.kwargs.get("alpha", 1) == 1:
            program = _fuse(program, node)
    return program


def _fuse(program: Program, add: Node) -> Program:
    graph = program.graph
    a, b = add.args
    if (
        not (isinstance(a, Ref) and isinstance(b, Ref))
        or a == b
        or b.ref in graph.parameters
        or a.ref in graph.parameters
    ):
        return program
    described = [graph.values[ref.ref] for ref in (a, b)]
    if described[0] != described[1] or described[0] != graph.values[add.name]:
        return program
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    for mine, other in sorted(((a, b), (b, a)), key=lambda pair: order.get(pair[0].ref, -1), reverse=True):
        if mine.ref not in order:
            continue
        layer = graph.node(mine.ref)
        if layer.op not in (CONV, LINEAR) or layer.conv is None or layer.conv.residual != "none":
            continue
        if sole_user(graph, layer.name) != add:
            continue
        place: ResidualPlace = "before" if layer.conv.activation == "none" else "after"
        fused = replace(layer, args=(*layer.args[:3], other), conv=replace(layer.conv, residual=place))
        # The layer moves to where the sum was: only there is the other operand sure to exist.
        nodes = [node if node.name != add.name else fused for node in graph.nodes if node.name != layer.name]
        moved = Program(graph.with_nodes(nodes), program.tensors)
        return moved.without_nodes({add.name: layer.name}) if add.name != layer.name else moved
    return program
