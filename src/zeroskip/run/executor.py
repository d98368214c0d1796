"""One plan as a list of calls on numbered slots."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.graph import CONV, LINEAR, Node, Ref, refs
from zeroskip.core.layer import Precision
from zeroskip.core.layout import Layout, conform
from zeroskip.core.precision import held
from zeroskip.cpu.max_pool import bind as bind_max_pool
from zeroskip.measure.bound import Bound
from zeroskip.model.program import Program
from zeroskip.run.pooling import max_pool_of
from zeroskip.run.storage import Buffer, BufferSet, operator, plan_storage

Slots = list[Any]
Call = Callable[[Slots], None]

_settings_are_ours = threading.RLock()
"""Precision is a setting of the whole process: who holds this may change it for the time of a call."""


@dataclass(frozen=True)
class Memory:
    """What one call in flight writes to, and the slots that are filled before it starts."""

    buffers: BufferSet
    slots: Slots


class Executor:
    """Runs ``program`` as ``plan`` says.  Safe to call from several threads and on several streams at once.

    Args:
        bounds: the segments that methods run; together they hold every layer, each once.
        device: where, and for a CPU with how many threads the kernels run that are no method's.
    """

    def __init__(self, program: Program, bounds: Sequence[Bound], device: Device) -> None:
        self._graph = graph = program.graph
        self._device, self._place = device, device.torch
        self._bounds = {node: bound for bound in bounds for node in bound.segment.nodes}
        order = self._order()
        static = {name for bound in bounds if not bound.run.allocates for name in bound.segment.outputs}
        self._storage = plan_storage(graph, order, self._bounds, static)
        self._copies: dict[str, Buffer] = {}
        self._slot: dict[str, int] = {}
        for name in (*graph.inputs, *graph.parameters, *(node.name for node in graph.nodes)):
            self._slot[name] = len(self._slot)
        self._workspace_slot = self._number("workspace")
        self._calls = [
            self._call(names, position) for position, names in enumerate(order) if names[-1] not in self._storage.joined
        ]
        self._releases = self._last_uses(order)
        self._parameters = [(self._slot[name], program.tensors[name]) for name in graph.parameters]
        self._own = {tensor.untyped_storage().data_ptr() for _, tensor in self._parameters}
        self._workspace_bytes = max((bound.run.workspace_bytes for bound in bounds), default=0)
        self._input_slots = [self._slot[name] for name in graph.inputs]
        self._pools: dict[int, list[Memory]] = defaultdict(list)
        self._settings: Callable[[], AbstractContextManager[None]] = nullcontext
        if device.kind == "cuda":
            self._settings = partial(_gpu_settings, _rest(program))

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """The model's outputs for ``inputs``, whose shapes, dtypes and device the caller has checked."""
        if self._device.kind == "cuda" and torch.cuda.is_current_stream_capturing():
            # What a graph writes to is its own: between its replays, and for as long as it lives.
            return self.run(inputs, self.memory())
        # Memory that one stream works in is not given to another, which would not wait.
        pool = self._pools[0 if self._device.kind == "cpu" else torch.cuda.current_stream().cuda_stream]
        try:
            memory = pool.pop()
        except IndexError:
            memory = self.memory()
        try:
            return self.run(inputs, memory)
        finally:
            pool.append(memory)

    def on(self, inputs: Sequence[Tensor]) -> Callable[[], Any]:
        """The same call as a function without arguments and with memory of its own, for one stream at a time: what a
        timer repeats, or captures in a graph."""
        return partial(self.run, inputs, self.memory())

    def staged(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Copies of ``inputs`` that lie as those want them that read them: what a graph of this call reads, and so what
        it is timed with."""
        return [x.detach().clone(memory_format=self.input_format(at)) for at, x in enumerate(inputs)]

    def run(self, inputs: Sequence[Tensor], memory: Memory) -> Any:
        """Call with ``memory``, which nothing else uses meanwhile.  Outputs that the caller keeps are new tensors."""
        slots = list(memory.slots)
        for slot, tensor in zip(self._input_slots, inputs, strict=True):
            slots[slot] = tensor
        with torch.no_grad(), self._settings():
            for call, gone in zip(self._calls, self._releases, strict=True):
                call(slots)
                for slot in gone:
                    slots[slot] = None
            return self._collect(self._graph.outputs, slots, memory.buffers, {_storage(x) for x in inputs})

    def input_format(self, at: int) -> torch.memory_format:
        """Of input number ``at``: as those want it that read it, so that they need not copy it."""
        name = self._graph.inputs[at]
        bounds = {id(bound): bound for bound in self._bounds.values()}.values()
        wants = [
            want.order
            for bound in bounds
            for source, want in zip(bound.segment.inputs, bound.candidate.inputs, strict=True)
            if source == name
        ]
        last = len(self._graph.values[name].shape) == 4 and wants and set(wants) == {"nhwc"}
        return torch.channels_last if last else torch.contiguous_format

    def memory(self) -> Memory:
        """Memory for one call at a time."""
        with torch.inference_mode(False):  # or later calls could not write to it outside of that mode
            buffers = BufferSet(self._storage, self._copies, self._workspace_bytes, self._place)
        slots: Slots = [None] * len(self._slot)
        slots[self._workspace_slot] = buffers.workspace
        for slot, tensor in self._parameters:
            slots[slot] = tensor
        for name, tensor in buffers.tensors.items():
            slots[self._slot[name]] = tensor
        for name, (parent, first) in self._storage.slices.items():
            if parent in buffers.tensors:
                slots[self._slot[name]] = buffers.tensors[parent].narrow(1, first, self._graph.values[name].shape[1])
        return Memory(buffers, slots)

    # -- construction -----------------------------------------------------------------------------
    def _number(self, name: str) -> int:
        return self._slot.setdefault(name, len(self._slot))

    def _order(self) -> list[tuple[str, ...]]:
        """Nodes run together by each call: a segment runs where its last node stands."""
        order: list[tuple[str, ...]] = []
        for node in self._graph.nodes:
            bound = self._bounds.get(node.name)
            if bound is None:
                order.append((node.name,))
            elif node.name == bound.segment.nodes[-1]:
                order.append(bound.segment.nodes)
        return order

    def _call(self, names: tuple[str, ...], position: int) -> Call:
        bound = self._bounds.get(names[-1])
        if bound is None:
            return self._torch_call(self._graph.node(names[0]))
        return self._method_call(bound, position)

    def _torch_call(self, node: Node) -> Call:
        slot = self._slot[node.name]
        if node.op == "getitem":
            source, index = self._slot[node.args[0].ref], node.args[1]

            def pick(slots: Slots) -> None:
                slots[slot] = slots[source][index]

            return pick
        if self._device.kind == "cpu" and (shape := max_pool_of(self._graph, node)) is not None:
            source, pool = self._slot[node.args[0].ref], bind_max_pool(shape, self._device.threads)

            def run_pool(slots: Slots) -> None:
                slots[slot] = pool(slots[source])

            return run_pool
        function, fill = operator(node.op), self._filler
        arguments = [fill(argument) for argument in node.args]
        named = {key: fill(value) for key, value in node.kwargs.items()}

        def call(slots: Slots) -> None:
            slots[slot] = function(
                *[argument(slots) for argument in arguments], **{key: value(slots) for key, value in named.items()}
            )

        return call

    def _filler(self, nest: Any) -> Callable[[Slots], Any]:
        """A function from slots to this argument's value."""
        if isinstance(nest, Ref):
            return lambda slots, slot=self._slot[nest.ref]: slots[slot]  # type: ignore[misc]
        if isinstance(nest, (list, tuple)) and refs(nest):
            parts = [self._filler(item) for item in nest]
            return lambda slots: [part(slots) for part in parts]
        return lambda slots: nest

    def _method_call(self, bound: Bound, position: int) -> Call:
        run, segment, scratch = bound.run, bound.segment, self._workspace_slot
        prepare: list[Call] = []
        sources = [
            self._reader(name, want, position, prepare)
            for name, want in zip(segment.inputs, bound.candidate.inputs, strict=True)
        ]
        outputs = [self._slot[name] for name in segment.outputs]
        if not run.allocates:
            prepare += [fresh for name in segment.outputs if (fresh := self._fresh(name)) is not None]
        with_residual = len(segment.layers) == 1 and segment.layer.epilogue.residual != "none"
        residual = sources.pop() if with_residual else None

        def call(slots: Slots) -> None:
            for step in prepare:
                step(slots)
            results = run(
                [source(slots) for source in sources],
                [slots[slot] for slot in outputs],
                slots[scratch],
                None if residual is None else residual(slots),
            )
            for slot, result in zip(outputs, results, strict=True):
                slots[slot] = result

        return call

    def _fresh(self, name: str) -> Call | None:
        """Allocates the output that the caller will keep, if ``name`` is in one."""
        home = self._storage.home(name)
        if home not in self._storage.fresh:
            return None
        value, parent, own = self._graph.values[home], self._slot[home], self._slot[name]
        dtype, place = getattr(torch, value.dtype), self._place
        parts = [part for part, (whole, _) in self._storage.slices.items() if whole == home]
        first = self._storage.slices[name][1] if parts else 0
        width = self._graph.values[name].shape[1] if parts else 0

        def make(slots: Slots) -> None:
            if slots[parent] is None:
                slots[parent] = torch.empty(value.shape, dtype=dtype, device=place)
            if parts:
                slots[own] = slots[parent].narrow(1, first, width)

        return make

    def _reader(self, name: str, want: Layout, position: int, prepare: list[Call]) -> Callable[[Slots], Tensor]:
        """A function from slots to ``name`` in layout ``want``, which converts where it must; what fills a border of
        zeros is added to ``prepare``."""
        source = self._slot[name]
        have = self._storage.halo.get(name, (0, 0))
        known = name in self._storage.halo and (want.aligned == 1 or name not in self._storage.slices)
        if want.order == "any" or (known and want.order == "nchw" and _fits(have, want)):
            return itemgetter(source)
        if want.order == "nchw" and want.halo and want.halo != (0, 0):
            key = f"{name} with halo {want.halo}"
            value = self._graph.values[name]
            if key in self._copies:
                self._copies[key].end = position
                return itemgetter(self._slot[key])
            self._copies[key] = Buffer(value.shape, value.dtype, want.halo, position, position)
            target = self._number(key)

            def pad(slots: Slots) -> None:
                slots[target].copy_(slots[source])

            prepare.append(pad)
            return itemgetter(target)
        return lambda slots: conform(slots[source], have, want)

    def _last_uses(self, order: list[tuple[str, ...]]) -> list[tuple[int, ...]]:
        """For each call, the slots of tensors that torch allocated and nobody reads afterwards."""
        permanent = {*self._graph.inputs, *self._graph.parameters, *self._graph.output_names}
        last: dict[str, int] = {}
        position = -1
        for names in order:
            if names[-1] in self._storage.joined:
                continue
            position += 1
            for name in names:
                last[name] = position
                last.update(dict.fromkeys(self._graph.node(name).inputs, position))
        static = set(self._storage.buffers) | set(self._storage.slices)
        releases: list[list[int]] = [[] for _ in self._calls]
        for name, position in last.items():
            if name not in permanent and name not in static:
                releases[position].append(self._slot[name])
        return [tuple(slots) for slots in releases]

    def _collect(self, nest: Any, slots: Slots, memory: BufferSet, theirs: set[int]) -> Any:
        """The outputs, none in memory of ours, in the inputs' or in another output's (``theirs``)."""
        if isinstance(nest, Ref):
            tensor: Tensor = slots[self._slot[nest.ref]]
            storage = _storage(tensor)
            if storage in memory.storages or storage in self._own or storage in theirs:
                return tensor.clone()
            theirs.add(storage)
            return tensor
        if isinstance(nest, (list, tuple)):
            return type(nest)(self._collect(item, slots, memory, theirs) for item in nest)
        if isinstance(nest, dict):
            return {key: self._collect(item, slots, memory, theirs) for key, item in nest.items()}
        return nest


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _rest(program: Program) -> Precision:
    """What float32 operators that are no layers are run with on a GPU: TF32 where every layer has it."""
    layers = {program.precision(node) for node in program.graph.nodes if node.op in (CONV, LINEAR)}
    return "tf32" if layers == {"tf32"} else "fp32"


@contextmanager
def _gpu_settings(precision: Precision) -> Iterator[None]:
    """The plan's settings in place of the caller's: its precision, and no autocast."""
    with _settings_are_ours, torch.autocast("cuda", enabled=False), held(precision):
        yield


def _fits(have: tuple[int, int], want: Layout) -> bool:
    if want.halo is None:
        return True
    if want.halo == (0, 0):
        return have == (0, 0)
    return have[0] >= want.halo[0] and have[1] >= want.halo[1]
