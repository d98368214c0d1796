"""Drop what does nothing: copies of values, dropout in evaluation mode, and nodes that nobody reads."""

from __future__ import annotations

from dataclasses import replace

from zeroskip.core.graph import Node, Ref, refs
from zeroskip.model.program import Program

COPIES = (
    "aten.clone.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.lift_fresh_copy.default",
    "aten.dropout.default",
    "aten.contiguous.default",
)
"""Operators whose value is their first argument's.  The graph is functional, so nobody can tell the copy, but
for how it lies (``ORDERED``)."""
ORDERED = ("aten.contiguous.default", "aten.clone.default")
"""Those that say how their values lie, which some can tell: who is given them, and ``SEEING``."""
SEEING = ("aten.as_strided", "aten.view_as_", "aten.view.dtype")
"""How the names of operators begin that see how values lie; those that are not torch's may all."""


def remove_dead(program: Program) -> Program:
    """``program`` with only the nodes and tensors that its outputs depend on."""
    same: dict[str, str] = {}
    seen = {ref.ref for ref in refs(program.graph.outputs)}
    seen |= {name for node in program.graph.nodes if _sees(node) for name in node.inputs}
    for node in program.graph.nodes:
        # A dropout that trains would be random: (input, p, train).
        if (
            node.op in COPIES
            and isinstance(node.args[0], Ref)
            and not (node.op.startswith("aten.dropout") and node.args[2])
            and not (node.op in ORDERED and node.name in seen)
        ):
            same[node.name] = same.get(node.args[0].ref, node.args[0].ref)
    program = program.without_nodes(same)
    graph = program.graph
    needed = {ref.ref for ref in refs(graph.outputs)}
    kept = []
    for node in reversed(graph.nodes):
        if node.name in needed:
            kept.append(node)
            needed.update(node.inputs)
    parameters = {name: value for name, value in graph.parameters.items() if name in needed}
    names = {*graph.inputs, *(node.name for node in kept)}
    values = {name: value for name, value in graph.values.items() if name in names}
    graph = replace(graph, nodes=tuple(reversed(kept)), parameters=parameters, values=values)
    return Program(graph, {name: program.tensors[name] for name in parameters})


def _sees(node: Node) -> bool:
    return node.op.startswith(SEEING) or ("." in node.op and not node.op.startswith("aten."))
