"""``nn.Module`` -> ``Program`` through ``torch.export``."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from zeroskip.core.errors import Unsupported
from zeroskip.core.graph import Graph, Node, Ref, Value, refs
from zeroskip.model.bake import bake
from zeroskip.model.program import Program


def trace(model: nn.Module, example: Sequence[Tensor]) -> Program:
    """The operators that ``model`` runs on inputs shaped like ``example``, in evaluation mode.

    Args:
        example: the positional inputs; shapes and dtypes are fixed to theirs.

    Raises:
        Unsupported: ``torch.export`` refuses the model, or it returns something else than a nest of tuples,
            lists and dicts of tensors; the message holds torch's reason.
    """
    baked = bake(model)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # run_decompositions deep-copies tree specs, which torch itself has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            exported = torch.export.export(baked, tuple(example)).run_decompositions({})
    except Exception as error:  # torch.export raises a dozen unrelated types
        raise Unsupported(
            f"torch.export could not capture {type(model).__name__}: {type(error).__name__}: {_first_lines(error)}\n"
            "What to do: make `torch.export.export(model, example)` succeed first (data-dependent control flow and "
            "non-tensor inputs are the usual causes)."
        ) from error
    return _program(exported, type(model).__name__)


def _first_lines(error: Exception) -> str:
    return "\n".join(str(error).strip().splitlines()[:6])


def _program(exported: ExportedProgram, model_name: str) -> Program:
    signature = exported.graph_signature
    tensors: dict[str, Tensor] = {}
    rename: dict[str, str] = {}
    inputs: list[str] = []
    for spec in signature.input_specs:
        placeholder = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(placeholder)
            continue
        assert spec.target is not None
        stored = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
        if not isinstance(stored, Tensor):
            raise Unsupported(
                f"{model_name} holds {spec.target}, a {type(stored).__name__}; only tensors are supported"
            )
        rename[placeholder] = spec.target
        tensors[spec.target] = stored.detach()
    changed = [spec.target for spec in signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
    if changed:
        raise Unsupported(f"{model_name} changes {changed} when it is called; only models without state are supported")

    nodes: list[Node] = []
    values: dict[str, Value] = {}
    outputs: Any = None
    for fx in exported.graph.nodes:
        if isinstance(fx.meta.get("val"), Tensor):
            values[rename.get(fx.name, fx.name)] = _value(fx.meta["val"])
        if fx.op == "call_function":
            nodes.append(
                Node(fx.name, _operator(fx.target, model_name), _convert(fx.args, rename), _convert(fx.kwargs, rename))
            )
        elif fx.op == "output":
            flat = [_convert(item, rename) for item in fx.args[0]]
            outputs = _plain(pytree.tree_unflatten(flat, exported.call_spec.out_spec), model_name)
    if not refs(outputs):
        raise Unsupported(f"{model_name} returns no tensor")
    parameters = {name: _value(tensor) for name, tensor in tensors.items()}
    values = {name: value for name, value in values.items() if name not in parameters}
    return Program(Graph(tuple(inputs), outputs, tuple(nodes), values, parameters), tensors)


def _value(tensor: Tensor) -> Value:
    return Value(tuple(int(size) for size in tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _operator(target: Any, model_name: str) -> str:
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    raise Unsupported(f"{model_name} uses {target}, which is no plain torch operator (control flow is not supported)")


def _convert(nest: Any, rename: dict[str, str]) -> Any:
    if isinstance(nest, torch.fx.Node):
        return Ref(rename.get(nest.name, nest.name))
    if isinstance(nest, (list, tuple)):
        return (list if isinstance(nest, list) else tuple)(_convert(item, rename) for item in nest)
    if isinstance(nest, dict):
        return {key: _convert(item, rename) for key, item in nest.items()}
    return nest


def _plain(nest: Any, model_name: str) -> Any:
    if nest is None or isinstance(nest, (Ref, int, float, str)):
        return nest
    if type(nest) in (tuple, list):
        return type(nest)(_plain(item, model_name) for item in nest)
    if isinstance(nest, dict) and all(isinstance(key, str) for key in nest):
        return {key: _plain(item, model_name) for key, item in nest.items()}
    raise Unsupported(f"{model_name} returns a {type(nest).__name__}; return tensors, tuples, lists or dicts instead")
