"""A traced model: the graph and, beside it, its tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor

from zeroskip.core.graph import CONV, LINEAR, Graph, Node, Ref, Value, substitute
from zeroskip.core.layer import Epilogue, Layer, Precision, Sparsity

PRECISIONS: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
"""Of a layer, by the dtype of its input and weight."""


@dataclass(frozen=True)
class Program:
    """``tensors`` holds one tensor for every name in ``graph.parameters``."""

    graph: Graph
    tensors: dict[str, Tensor]

    def layers(self) -> dict[str, Layer]:
        """The facts of every convolution and linear layer, by node name."""
        found = {}
        for node in self.graph.nodes:
            if node.op in (CONV, LINEAR) and node.conv is not None:
                epilogue = Epilogue(node.args[2] is not None, node.conv.activation, node.conv.residual)
                weight = self.tensors[node.args[1].ref]
                found[node.name] = Layer(
                    node.name,
                    "linear" if node.op == LINEAR else "conv2d",
                    self.graph.shape(node),
                    self.precision(node),
                    Sparsity.of(weight),
                    epilogue,
                )
        return found

    def precision(self, node: Node) -> Precision:
        """Of a ``conv2d`` or ``linear`` node."""
        assert node.conv is not None
        found = PRECISIONS[self.graph.parameters[node.args[1].ref].dtype]
        return "tf32" if found == "fp32" and node.conv.tf32 else found

    @property
    def precisions(self) -> str:
        """Of all its layers, joined by slashes."""
        return "/".join(sorted({self.precision(node) for node in self.graph.nodes if node.conv is not None}))

    def with_tf32(self, ops: Collection[str]) -> Program:
        """The same program with TF32 allowed in the layers of these operators, and in no others."""
        nodes = [
            node if node.conv is None else replace(node, conv=replace(node.conv, tf32=node.op in ops))
            for node in self.graph.nodes
        ]
        return Program(self.graph.with_nodes(nodes), self.tensors)

    def with_tensor(self, name: str, tensor: Tensor) -> Program:
        """The same program with one tensor more, or another in its place."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        parameters = {**self.graph.parameters, name: Value(tuple(tensor.shape), dtype)}
        return Program(replace(self.graph, parameters=parameters), {**self.tensors, name: tensor})

    def without_nodes(self, gone: dict[str, str]) -> Program:
        """Drop the nodes that are keys of ``gone``; their readers read the value named by the dict instead."""
        links = {old: Ref(new) for old, new in gone.items()}
        nodes = [
            replace(node, args=substitute(node.args, links), kwargs=substitute(node.kwargs, links))
            for node in self.graph.nodes
            if node.name not in gone
        ]
        outputs = substitute(self.graph.outputs, links)
        return Program(replace(self.graph, nodes=tuple(nodes), outputs=outputs), self.tensors)

    def with_node(self, node: Node) -> Program:
        """The same program with the node of that name exchanged."""
        nodes = [node if old.name == node.name else old for old in self.graph.nodes]
        return Program(self.graph.with_nodes(nodes), self.tensors)


def sole_user(graph: Graph, name: str) -> Node | None:
    """The only node that reads ``name``, if there is exactly one and it is no output of the graph."""
    if name in graph.output_names:
        return None
    users = graph.users()[name]
    return graph.node(users[0]) if len(users) == 1 else None
