"""A GPU that is none: tensors stay on the CPU, a graph is the call it was made of.

It shows what the engine does around streams, graphs and memory, on a machine without a GPU.  The real one is in
``test_gpu``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from zeroskip.core.device import Device
from zeroskip.core.record import Times
from zeroskip.measure import graphs as measure_graphs
from zeroskip.run import compile as compile_module
from zeroskip.run import engine as engine_module
from zeroskip.run import graphs as graphs_module

H100 = Device("cuda", "a GPU", 50 * 2**20, arch="sm_90a", num_sms=132, shared_bytes=232448)


class Stream:
    """What the engine asks of a stream."""

    device_index = 0

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Graph:
    """Runs its call again, into the tensors that the first run returned."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.kept = call, call()

    def replay(self) -> None:
        for old, new in zip(pytree.tree_leaves(self.kept), pytree.tree_leaves(self.call()), strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)


class FakeGpu:
    """``captured``: the streams that graphs were made for, in order; ``fails``: what a capture raises."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.captured: list[int] = []
        self.fails: Exception | None = None
        self._thread, self._busy = threading.local(), set[int]()
        for name, value in {
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_name": lambda: H100.name,
            "device": lambda index: nullcontext(),
            "synchronize": lambda: None,
            "current_stream": self.current,
            "stream": self.on,
            "is_current_stream_capturing": lambda: self.current().cuda_stream in self._busy,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(Device, "torch", property(lambda device: torch.device("cpu")))
        patch.setattr(engine_module, "cuda", lambda: H100)
        patch.setattr(compile_module, "this_gpu", lambda: H100)
        patch.setattr(graphs_module, "_double", lambda device, handle: Stream(-1 - handle))
        patch.setattr(graphs_module, "capture", self._capture)
        patch.setattr(measure_graphs, "measure", wall_clock)
        patch.setattr(measure_graphs, "once", lambda call: wall_clock({"": call}, 1)[""].median_us / 1e6)

    def may_be_loaded_for(self, patch: pytest.MonkeyPatch) -> None:
        """``load`` asks torch; nothing may be traced afterwards, torch.export asks too."""
        patch.setattr(torch.cuda, "is_available", lambda: True)

    def current(self) -> Stream:
        return getattr(self._thread, "stream", None) or Stream(0)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._thread.stream = self.current(), stream
        try:
            yield
        finally:
            self._thread.stream = before

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """As if the current stream were being captured by somebody else."""
        self._busy.add(self.current().cuda_stream)
        try:
            yield
        finally:
            self._busy.remove(self.current().cuda_stream)

    def _capture(self, call: Callable[[], Any]) -> tuple[Graph, Any]:
        if self.fails is not None:
            raise self.fails
        self.captured.append(self.current().cuda_stream)
        graph = Graph(call)
        return graph, graph.kept


def wall_clock(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            found[name].append((time.perf_counter() - start) * 1e6)
    return {name: Times(tuple(samples), "cuda") for name, samples in found.items()}
