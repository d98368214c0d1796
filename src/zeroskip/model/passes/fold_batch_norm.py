"""Batch norm in evaluation mode is a scale and a shift per channel: both go into the convolution before it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zeroskip.core.graph import CONV, LINEAR, Graph, Node, Ref
from zeroskip.model.program import Program, sole_user

BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"


def fold_batch_norm(program: Program) -> Program:
    """Fold where the normalisation is the only reader; computed in float64, rounded once.  Zeros stay zeros."""
    for name in program.graph.names(BATCH_NORM):
        node = program.graph.node(name)
        if any(isinstance(argument, Ref) and argument.ref not in program.tensors for argument in node.args[1:5]):
            continue  # statistics that the model computes
        before = next((other for other in program.graph.nodes if other.name == node.args[0].ref), None)
        if before is None or before.op not in (CONV, LINEAR) or _only_reader(program.graph, before.name) != node.name:
            continue
        if len(program.graph.values[before.name].shape) not in (2, 4):
            continue  # channels of a linear layer on sequences are not where batch norm looks
        readers = [program.graph.node(name) for name in program.graph.users()[node.name]]
        if any(reader.op != "getitem" or reader.args[1] != 0 for reader in readers):
            continue
        program = _fold(program, before, node, [reader.name for reader in readers])
    return program


def _only_reader(graph: Graph, name: str) -> str | None:
    user = sole_user(graph, name)
    return user.name if user else None


def _fold(program: Program, conv: Node, norm: Node, items: list[str]) -> Program:
    tensors = program.tensors

    def stored(argument: Ref | None, fallback: float, like: Tensor) -> Tensor:
        return (
            torch.full_like(like, fallback, dtype=torch.float64) if argument is None else tensors[argument.ref].double()
        )

    _, gain, shift, mean, variance, _, eps = norm.args
    weight = tensors[conv.args[1].ref]
    mean64, variance64 = tensors[mean.ref].double(), tensors[variance.ref].double()
    scale = stored(gain, 1.0, mean64) / torch.sqrt(variance64 + eps)
    bias = (stored(conv.args[2], 0.0, mean64) - mean64) * scale + stored(shift, 0.0, mean64)
    folded = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    weight_name, bias_name = f"{conv.name}.weight:folded", f"{conv.name}.bias:folded"
    # 0 * inf would turn a pruned weight into NaN; it must stay a zero.
    program = program.with_tensor(weight_name, torch.where(weight == 0, 0.0, folded).to(weight.dtype))
    program = program.with_tensor(bias_name, bias.to(weight.dtype))
    program = program.with_node(replace(conv, args=(conv.args[0], Ref(weight_name), Ref(bias_name), *conv.args[3:])))
    return program.without_nodes({norm.name: conv.name, **dict.fromkeys(items, conv.name)})
