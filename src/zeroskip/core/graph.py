"""The model as data: a list of operators on named values.  Tensors live beside it, under their names."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.layer import Activation, ConvShape, Layer, ResidualPlace

CONV, LINEAR = "conv2d", "linear"


@dataclass(frozen=True)
class Ref:
    """A use of a value, by name."""

    ref: str


@dataclass(frozen=True)
class Value:
    """What is known of a tensor before it exists: ``shape`` and ``dtype`` ("float32")."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ConvAttributes:
    """Of a ``conv2d`` or ``linear`` node (linear uses the last three only)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: Activation = "none"
    residual: ResidualPlace = "none"
    tf32: bool = False
    """Whether a GPU may round its float32 operands to TF32: decided at compilation, whatever torch's settings later."""


@dataclass(frozen=True)
class Node:
    """One operator.  Its output value carries its name.

    ``op`` is ``conv2d`` or ``linear`` (arguments: x, weight, bias or None, residual or None; ``conv`` holds the
    rest), ``getitem`` (value, index), or the name of a torch operator such as ``aten.relu.default``, whose
    arguments are JSON values in which ``Ref`` stands for a tensor.
    """

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    conv: ConvAttributes | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values and tensors it reads, in order."""
        return tuple(found.ref for found in refs((self.args, self.kwargs)))


@dataclass(frozen=True)
class Graph:
    """Operators in topological order.  ``outputs`` is a nest of lists, tuples and dicts with ``Ref`` leaves.

    ``values`` describes the graph's inputs and every tensor-valued node; ``parameters`` the tensors that
    belong to the model.
    """

    inputs: tuple[str, ...]
    outputs: Any
    nodes: tuple[Node, ...]
    values: dict[str, Value]
    parameters: dict[str, Value]

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def names(self, *ops: str) -> list[str]:
        """The nodes with one of these operators, by name: a list that rewriting the graph does not disturb."""
        return [node.name for node in self.nodes if node.op in ops]

    def users(self) -> dict[str, list[str]]:
        """For every value, the names of the nodes that read it."""
        result: dict[str, list[str]] = {name: [] for name in (*self.inputs, *self.parameters)}
        for node in self.nodes:
            result.setdefault(node.name, [])
            for name in dict.fromkeys(node.inputs):
                result[name].append(node.name)
        return result

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(found.ref for found in refs(self.outputs))

    def shape(self, node: Node) -> ConvShape:
        """The convolution that a ``conv2d`` or ``linear`` node is."""
        x, weight = self.values[node.inputs[0]].shape, self.parameters[node.inputs[1]].shape
        assert node.conv is not None
        if node.op == LINEAR:
            rows = 1
            for size in x[:-1]:
                rows *= size
            return ConvShape(rows, x[-1], 1, 1, weight[0], 1, 1)
        n, c, h, w = x
        return ConvShape(
            n,
            c,
            h,
            w,
            weight[0],
            weight[2],
            weight[3],
            node.conv.stride,
            node.conv.padding,
            node.conv.dilation,
            node.conv.groups,
        )

    def with_nodes(self, nodes: tuple[Node, ...] | list[Node]) -> Graph:
        return dataclasses.replace(self, nodes=tuple(nodes))

    def __str__(self) -> str:
        lines = [f"inputs  {', '.join(f'{name} {list(self.values[name].shape)}' for name in self.inputs)}"]
        for node in self.nodes:
            shape = list(self.values[node.name].shape) if node.name in self.values else ""
            extra = (
                ""
                if node.conv is None
                else "".join(
                    f" {what}={value}"
                    for what, value in vars(node.conv).items()
                    if value != getattr(ConvAttributes, what)
                )
            )
            shown = ", ".join(name for name in node.inputs)
            lines.append(f"{node.name} {shape} = {node.op}({shown}){extra}")
        return "\n".join([*lines, f"outputs {', '.join(self.output_names)}"])


def refs(nest: Any) -> list[Ref]:
    """Every ``Ref`` in a nest of tuples, lists and dicts, in order."""
    if isinstance(nest, Ref):
        return [nest]
    if isinstance(nest, dict):
        nest = list(nest.values())
    if isinstance(nest, (list, tuple)):
        return [found for item in nest for found in refs(item)]
    return []


def pair(value: Any) -> tuple[int, int]:
    """A torch operator's size argument for two dimensions: one number, or one or two in a list."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def substitute(nest: Any, replace: dict[str, Any]) -> Any:
    """``nest`` with each ``Ref`` whose name is a key of ``replace`` exchanged for that value."""
    if isinstance(nest, Ref):
        return replace.get(nest.ref, nest)
    if isinstance(nest, dict):
        return {key: substitute(item, replace) for key, item in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(substitute(item, replace) for item in nest)
    return nest


@dataclass(frozen=True)
class Segment:
    """A piece of the graph that one method runs; most often one layer with its epilogue."""

    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[Layer, ...]

    @property
    def layer(self) -> Layer:
        """Its first layer, for the many methods that run exactly one."""
        return self.layers[0]

    @property
    def name(self) -> str:
        return self.nodes[0] if len(self.nodes) == 1 else f"{self.nodes[0]}..{self.nodes[-1]}"


# -- JSON: refs and tuples inside free-form arguments need marks of their own -------------------------
def nest_to_json(nest: Any) -> Any:
    """Arguments of a node as JSON; raises ``TypeError`` where they hold something that has no JSON form."""
    if isinstance(nest, Ref):
        return {"ref": nest.ref}
    if isinstance(nest, dict):
        return {"dict": {key: nest_to_json(item) for key, item in nest.items()}}
    if isinstance(nest, tuple):
        return {"tuple": [nest_to_json(item) for item in nest]}
    if isinstance(nest, list):
        return [nest_to_json(item) for item in nest]
    if isinstance(nest, float) and not math.isfinite(nest):
        return {"float": str(nest)}
    if isinstance(nest, torch.dtype):
        return {"dtype": str(nest).removeprefix("torch.")}
    return to_json(nest)


def nest_from_json(data: Any) -> Any:
    if isinstance(data, list):
        return [nest_from_json(item) for item in data]
    if isinstance(data, dict):
        if len(data) != 1:
            raise ValueError(f"an argument has one mark, got {sorted(data)}")
        ((mark, item),) = data.items()
        if mark == "ref" and isinstance(item, str):
            return Ref(item)
        if mark == "tuple" and isinstance(item, list):
            return tuple(nest_from_json(part) for part in item)
        if mark == "dict" and isinstance(item, dict):
            return {key: nest_from_json(part) for key, part in item.items()}
        if mark == "float" and item in ("nan", "inf", "-inf"):
            return float(item)
        if mark == "dtype" and isinstance(getattr(torch, str(item), None), torch.dtype):
            return getattr(torch, item)
        raise ValueError(f"unknown mark {mark!r} in an argument")
    return data


def graph_to_json(graph: Graph) -> dict[str, Any]:
    nodes = [
        {
            "name": node.name,
            "op": node.op,
            "args": nest_to_json(node.args),
            "kwargs": nest_to_json(node.kwargs),
            "conv": to_json(node.conv),
        }
        for node in graph.nodes
    ]
    return {
        "inputs": list(graph.inputs),
        "outputs": nest_to_json(graph.outputs),
        "nodes": nodes,
        "values": to_json(graph.values),
        "parameters": to_json(graph.parameters),
    }


def graph_from_json(data: Any) -> Graph:
    """The graph that ``graph_to_json`` wrote.

    Raises:
        ValueError, KeyError, TypeError: the document is something else (``run.file`` turns these into one error).
    """
    nodes = tuple(
        Node(
            from_json(str, item["name"], "$.name"),
            from_json(str, item["op"], "$.op"),
            nest_from_json(item["args"]),
            nest_from_json(item["kwargs"]),
            None if item["conv"] is None else from_json(ConvAttributes, item["conv"], f"$.nodes.{item['name']}.conv"),
        )
        for item in data["nodes"]
    )
    return Graph(
        from_json(tuple[str, ...], data["inputs"], "$.inputs"),
        nest_from_json(data["outputs"]),
        nodes,
        from_json(dict[str, Value], data["values"], "$.values"),
        from_json(dict[str, Value], data["parameters"], "$.parameters"),
    )
