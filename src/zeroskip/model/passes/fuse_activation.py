"""ReLU and ReLU6 behind a convolution or linear layer become part of it."""

from __future__ import annotations

from dataclasses import replace

from zeroskip.core.graph import CONV, LINEAR, Node
from zeroskip.core.layer import Activation
from zeroskip.model.program import Program, sole_user


def fuse_activation(program: Program) -> Program:
    """Fuse where the activation is the only reader of the layer's output."""
    for name in program.graph.names(CONV, LINEAR):
        node = program.graph.node(name)
        assert node.conv is not None
        if node.conv.activation != "none" or node.conv.residual == "after":
            continue
        user = sole_user(program.graph, name)
        if user is not None and (activation := _activation(user)) != "none":
            program = program.with_node(replace(node, conv=replace(node.conv, activation=activation)))
            program = program.without_nodes({user.name: name})
    return program


def _activation(node: Node) -> Activation:
    if node.op == "aten.relu.default":
        return "relu"
    bounds = node.args[1:3]
    if node.op == "aten.relu6.default" or (
        node.op in ("aten.hardtanh.default", "aten.clamp.default", "aten.clip.default") and tuple(bounds) == (0, 6)
    ):
        return "relu6"
    if node.op in ("aten.clamp_min.default",) and tuple(bounds) == (0,):
        return "relu"
    return "none"
