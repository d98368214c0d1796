"""Where every value lives: which buffers exist, who shares them, and which have a border of zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zeroskip.core.graph import Graph, Node, Ref
from zeroskip.core.layout import Layout, allocate, workspace
from zeroskip.measure.bound import Bound

Halo = tuple[int, int]

ALIASES = (
    "aten.view.default",
    "aten.reshape.default",
    "aten.flatten.using_ints",
    "aten.permute.default",
    "aten.transpose.int",
    "aten.squeeze.dims",
    "aten.squeeze.dim",
    "aten.squeeze.default",
    "aten.unsqueeze.default",
    "aten.slice.Tensor",
    "aten.select.int",
    "aten.expand.default",
    "getitem",
    "aten.t.default",
    "aten.chunk.default",
    "aten.split.Tensor",
    "aten.split_with_sizes.default",
)
"""Operators whose result may share memory with their first argument.  Others are caught by ``returns_alias``."""


VIEWS = {"aten.view.default": "aten.reshape.default", "aten._unsafe_view.default": "aten.reshape.default"}


def returns_alias(node: Node) -> bool:
    """Whether ``node``'s output may be a view of its first argument."""
    if node.op in ALIASES:
        return True
    schema = operator(node.op)._schema
    return any(result.alias_info is not None for result in schema.returns)


def operator(name: str) -> torch._ops.OpOverload:
    """The torch operator that runs a node's: ``aten.relu.default``, and reshape for views.

    A value may lie differently here than in torch (channels last, with a halo), where a view would be refused.

    Raises:
        AttributeError: this torch has none of that name.
    """
    namespace, packet, overload = VIEWS.get(name, name).split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    assert isinstance(found, torch._ops.OpOverload)
    return found


@dataclass
class Buffer:
    """A static tensor: alive from step ``start`` to step ``end`` (indices into the order of execution)."""

    shape: tuple[int, ...]
    dtype: str
    halo: Halo
    start: int
    end: int


@dataclass
class Storage:
    """``buffers`` by the value they hold; ``slices``: value -> (buffer, first channel) where a concatenation's inputs
    are written side by side; ``fresh``: values that the caller keeps, allocated anew at every call; ``halo`` of each
    static value; ``joined``: concatenations that need no work."""

    buffers: dict[str, Buffer] = field(default_factory=dict)
    slices: dict[str, tuple[str, int]] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    halo: dict[str, Halo] = field(default_factory=dict)
    joined: set[str] = field(default_factory=set)

    def home(self, name: str) -> str:
        """The buffer that ``name`` lies in."""
        return self.slices[name][0] if name in self.slices else name


def plan_storage(graph: Graph, order: list[tuple[str, ...]], bounds: Mapping[str, Bound], static: set[str]) -> Storage:
    """Assign storage to the outputs of methods that write where they are told.

    Args:
        order: the names of the nodes run by each call, in order of execution.
        bounds: by each covered node, the bound segment that covers it.
        static: the values those methods write.
    """
    users = graph.users()
    wants = _wants(graph, bounds)
    family = _families(graph, bounds)
    outputs = set(graph.output_names)
    storage = Storage()

    kept = {name for name in static if family[name] & outputs}
    for node in graph.nodes:
        images = {name for name in static - kept - set(storage.slices) if _output_layout(bounds, name).order == "nchw"}
        if node.name not in bounds and _joins(graph, node, images):
            first = 0
            for part in node.args[0]:
                storage.slices[part.ref] = (node.name, first)
                first += graph.values[part.ref].shape[1]
            storage.joined.add(node.name)
            if family[node.name] & outputs:
                kept.add(node.name)
    storage.fresh = kept

    index = {name: position for position, names in enumerate(order) for name in names}
    for name in sorted(static | storage.joined, key=lambda name: index[name]):
        home = storage.home(name)
        writers = [part for part, (parent, _) in storage.slices.items() if parent == home] or [home]
        can = all(_output_layout(bounds, writer).writes_halo for writer in writers)
        storage.halo[name] = _halo(wants[home]) if can and home not in kept else (0, 0)
        last = max((index[user] for member in family[name] for user in users[member]), default=index[name])
        buffer = storage.buffers.get(home)
        if buffer is None:
            value = graph.values[home]
            storage.buffers[home] = Buffer(value.shape, value.dtype, storage.halo[name], index[name], last)
        else:
            buffer.start, buffer.end = min(buffer.start, index[name]), max(buffer.end, last)
    return storage


def _wants(graph: Graph, bounds: Mapping[str, Bound]) -> dict[str, list[Layout]]:
    """What the steps that read each value would like it to be."""
    wants: dict[str, list[Layout]] = {name: [] for name in graph.values}
    for bound in {id(bound): bound for bound in bounds.values()}.values():
        for name, layout in zip(bound.segment.inputs, bound.candidate.inputs, strict=True):
            wants[name].append(layout)
    return wants


def _halo(layouts: list[Layout]) -> Halo:
    """The border that saves the most copies: the widest one asked for, or none if more readers want none."""
    halos = [layout.halo for layout in layouts if layout.order == "nchw" and layout.halo is not None]
    wide = [halo for halo in halos if halo != (0, 0)]
    if not wide or len(wide) < len(halos) - len(wide):
        return 0, 0
    return max(halo[0] for halo in wide), max(halo[1] for halo in wide)


def _output_layout(bounds: Mapping[str, Bound], name: str) -> Layout:
    bound = bounds[name]
    return bound.candidate.outputs[bound.segment.outputs.index(name)]


def _families(graph: Graph, bounds: Mapping[str, Bound]) -> dict[str, set[str]]:
    """For each value: itself and every value that may share its memory as a view."""
    family: dict[str, set[str]] = {node.name: {node.name} for node in graph.nodes} | {
        name: {name} for name in graph.inputs
    }
    for node in reversed(graph.nodes):
        first = next(iter(node.inputs), None)
        if node.name not in bounds and first in family and returns_alias(node):
            family[first] |= family[node.name]
    return family


def _joins(graph: Graph, node: Node, static: set[str]) -> bool:
    """Whether ``node`` concatenates channels of images that can be written side by side in the first place."""
    if node.op != "aten.cat.default" or len(node.args) < 2 or node.args[1] not in (1, -3):
        return False
    parts = node.args[0]
    names = [part.ref for part in parts if isinstance(part, Ref)]
    return (
        len(set(names)) == len(parts)
        and all(name in static for name in names)
        and len(graph.values[node.name].shape) == 4
    )


class BufferSet:
    """The memory of one call in flight: reused by later calls, never shared by two at a time."""

    def __init__(
        self, storage: Storage, copies: Mapping[str, Buffer], workspace_bytes: int, device: torch.device
    ) -> None:
        self.device = device
        self.tensors: dict[str, Tensor] = {}
        self.workspace = workspace(workspace_bytes, device)
        everything = {name: buffer for name, buffer in storage.buffers.items() if name not in storage.fresh}
        self._share({**everything, **copies})
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in self.tensors.values()}

    def _share(self, buffers: Mapping[str, Buffer]) -> None:
        """Give buffers that are never alive together the same memory.

        Only buffers of the same shape and halo share: their borders then stay zero for ever.
        """
        free: list[tuple[int, tuple[object, ...], Tensor]] = []
        for name, buffer in sorted(buffers.items(), key=lambda item: item[1].start):
            kind = (buffer.shape, buffer.dtype, buffer.halo)
            match = next((entry for entry in free if entry[0] < buffer.start and entry[1] == kind), None)
            if match is not None:
                free.remove(match)
            dtype = getattr(torch, buffer.dtype)
            tensor = match[2] if match else allocate(buffer.shape, buffer.halo, dtype, self.device)
            free.append((buffer.end, kind, tensor))
            self.tensors[name] = tensor
