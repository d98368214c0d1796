"""Check a graph that came from outside: run it without data and compare every shape with the one written down."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zeroskip.core.errors import FileFormatError
from zeroskip.core.graph import CONV, LINEAR, Graph, Node, Ref, Value, refs
from zeroskip.core.layer import MAX_ELEMENTS
from zeroskip.model.passes.fold_batch_norm import BATCH_NORM
from zeroskip.model.program import Program
from zeroskip.run.pooling import max_pool_of
from zeroskip.run.storage import VIEWS, operator


def check_shapes(program: Program) -> None:
    """Raise ``FileFormatError`` at the first node whose inputs do not fit or whose result is not what ``values`` says.

    Other errors of torch's own shape rules pass through; the caller has one answer to all of them.
    """
    graph = program.graph
    known: dict[str, Any] = {name: torch.empty_like(tensor, device="meta") for name, tensor in program.tensors.items()}
    for name in graph.inputs:
        value = graph.values[name]
        if min(value.shape, default=1) < 0 or math.prod(value.shape) > MAX_ELEMENTS:
            raise FileFormatError(f"input {name} has an impossible shape {value.shape}")
        known[name] = _meta(value.shape, getattr(torch, value.dtype))
    for node in graph.nodes:
        found = known[node.name] = _result(graph, node, known)
        if isinstance(found, Tensor):
            stated, actual = (
                graph.values.get(node.name),
                Value(tuple(found.shape), str(found.dtype).removeprefix("torch.")),
            )
            if stated != actual:
                raise FileFormatError(f"{node.name} computes {actual}, the file says {stated}")
    for ref in refs(graph.outputs):
        if not isinstance(known[ref.ref], Tensor):
            raise FileFormatError(f"output {ref.ref} is no tensor")


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _result(graph: Graph, node: Node, known: dict[str, Any]) -> Any:
    if node.op in (CONV, LINEAR):
        return _layer(graph, node, known)
    if node.op == "getitem":
        return known[node.args[0].ref][node.args[1]]
    # torch's own rules for what follows import sympy or dynamo, which takes longer than all the rest of loading a file.
    if node.op == "aten.cat.default" and (joined := _cat(node, known)) is not None:
        return joined
    if node.op in ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor") and len(node.args) == 2 and not node.kwargs:
        found = [known[part.ref] for part in node.args if isinstance(part, Ref)]
        if len(found) == 2 and found[0].dtype == found[1].dtype:
            return _meta(np.broadcast_shapes(found[0].shape, found[1].shape), found[0].dtype)
    if node.op in VIEWS and len(node.args) == 2 and not node.kwargs:
        x = known[node.args[0].ref]
        return _meta(x.shape, x.dtype).view(node.args[1])
    if (pool := max_pool_of(graph, node)) is not None:
        x = known[node.args[0].ref]
        return _meta((*x.shape[:2], pool.p, pool.q), x.dtype)
    if node.op == "aten.adaptive_avg_pool2d.default":
        x, size = known[node.args[0].ref], node.args[1]
        if len(node.args) != 2 or node.kwargs or len(size) != 2 or x.dim() not in (3, 4) or min(size) < 1:
            raise FileFormatError(f"{node.name} pools {tuple(x.shape)} to {size}")
        return _meta((*x.shape[:-2], *size), x.dtype)
    arguments = _filled(node.args, known)
    if node.op == BATCH_NORM and any(
        part is not None and tuple(part.shape) != tuple(arguments[0].shape[1:2]) for part in arguments[1:5]
    ):  # torch takes any number of elements without data, and reads beyond them with it
        raise FileFormatError(
            f"the statistics of {node.name} are not one for each channel of {tuple(arguments[0].shape)}"
        )
    return operator(node.op)(*arguments, **_filled(node.kwargs, known))


def _cat(node: Node, known: dict[str, Any]) -> Tensor | None:
    """Channels of images joined; other concatenations are left to torch."""
    parts = [known[part.ref] for part in node.args[0]]
    if node.args[1:] != (1,) or node.kwargs or any(part.dim() != 4 or part.dtype != parts[0].dtype for part in parts):
        return None
    if len({(part.shape[0], *part.shape[2:]) for part in parts}) != 1:
        raise FileFormatError(f"{node.name} joins images of different sizes")
    n, _, h, w = parts[0].shape
    return _meta((n, sum(part.shape[1] for part in parts), h, w), parts[0].dtype)


def _layer(graph: Graph, node: Node, known: dict[str, Any]) -> Tensor:
    assert node.conv is not None
    operands: list[Any] = [None if argument is None else known[argument.ref] for argument in node.args]
    x, weight, bias, residual = operands
    shape = graph.shape(node)
    if tuple(weight.shape) not in (shape.weight_shape, shape.weight_shape[:2]):
        raise FileFormatError(f"the weight of {node.name} is {tuple(weight.shape)}, its input says {shape}")
    out = (*x.shape[:-1], shape.k) if node.op == LINEAR else shape.output_shape
    if (bias is not None and tuple(bias.shape) != (shape.k,)) or (
        residual is not None and tuple(residual.shape) != out
    ):
        raise FileFormatError(f"bias or residual of {node.name} does not fit {shape}")
    if any(tensor is not None and tensor.dtype != x.dtype for tensor in (weight, bias, residual)):
        raise FileFormatError(f"the tensors of {node.name} are of different types")
    if (residual is None) != (node.conv.residual == "none"):
        raise FileFormatError(f"{node.name} has a residual and does not say where, or the other way round")
    return _meta(out, x.dtype)


def _filled(nest: Any, known: dict[str, Any]) -> Any:
    if isinstance(nest, Ref):
        return known[nest.ref]
    if isinstance(nest, dict):
        return {key: _filled(item, known) for key, item in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(_filled(item, known) for item in nest)
    return nest
