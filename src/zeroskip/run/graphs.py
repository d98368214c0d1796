"""An engine's call on a GPU: one captured graph per shape and stream, replayed.

Launching a network's kernels one by one from Python takes longer than many networks run.  A call copies its inputs into
the graph's own, replays it and returns copies of its outputs.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from zeroskip.core.errors import ZeroskipError
from zeroskip.core.graph import CONV, LINEAR
from zeroskip.measure.graphs import capture
from zeroskip.model.program import Program
from zeroskip.run.executor import Executor
from zeroskip.run.storage import operator

T = TypeVar("T")

WARM_UPS = 2
"""Calls before a capture: libraries search their algorithms and compile, which no graph can hold."""


class Graphs:
    """Calls of ``run`` as replays of a graph.  Safe to call from several threads and on several streams at once.

    Each stream has a graph and memory of its own, captured at the first call on it; calls on one stream take turns.
    While the caller captures a graph, the calls become a part of that one.  Where a call cannot be captured, a warning
    says why, and every call runs without a graph.
    """

    def __init__(self, run: Executor, program: Program) -> None:
        self._run, self._program = run, program
        self._graphs: dict[int, Captured] = {}
        self._index = torch.cuda.current_device()
        # An empty batch launches nothing.
        self._without = any(0 in program.graph.values[name].shape for name in program.graph.inputs)

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                return self(inputs)
        if self._without:
            return self._run(inputs)
        if torch.cuda.is_current_stream_capturing():
            return in_capture_thread(lambda: self._run(inputs))
        stream = torch.cuda.current_stream().cuda_stream
        graph = self._graphs.get(stream) or self._capture(stream, inputs)
        return self._run(inputs) if graph is None else graph(inputs)

    def _capture(self, stream: int, inputs: Sequence[Tensor]) -> Captured | None:
        """A new graph for ``stream``, the current one, or None if there cannot be one."""

        def make() -> Captured | str | None:
            if stream in self._graphs or self._without:
                return self._graphs.get(stream)
            found = captured(self._run, self._program, inputs)
            if isinstance(found, str):
                self._without = True
            else:
                self._graphs[stream] = found
            return found

        found = in_capture_thread(make)
        if isinstance(found, str):
            warnings.warn(f"this engine runs without a CUDA graph, and so slower: {found}", stacklevel=6)
            return None
        return found


class Captured:
    """One graph with its inputs, outputs and memory, for calls on the stream that is the current one now."""

    def __init__(self, run: Executor, inputs: Sequence[Tensor]) -> None:
        self._lock = threading.Lock()
        self._inputs = run.staged(inputs)
        self._call = run.on(self._inputs)  # kept: it holds the memory that the graph works in
        for _ in range(WARM_UPS):
            self._call()
        stream = torch.cuda.current_stream()
        self._graph, self._outputs = capture(_on(_double(stream.device_index, stream.cuda_stream), self._call))

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        with self._lock:  # another thread on the same stream must not come between
            for own, x in zip(self._inputs, inputs, strict=True):
                own.copy_(x.detach() if x.requires_grad else x)
            self._graph.replay()
            outputs = self._outputs
            return outputs.clone() if type(outputs) is Tensor else _cloned(outputs)


def captured(run: Executor, program: Program, inputs: Sequence[Tensor]) -> Captured | str:
    """A graph of ``run``, which runs ``program``, for the current stream, or why there cannot be one."""
    if reason := obstacle(program):
        return reason
    try:
        return Captured(run, inputs)
    except Exception as error:  # without a graph the call works, or fails for the same reason
        cause: BaseException = error
        while cause.__context__ is not None:  # ending a capture that has failed fails too
            cause = cause.__context__
        if isinstance(cause, torch.OutOfMemoryError):
            raise
        return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"


def _cloned(nest: Any) -> Any:
    if isinstance(nest, Tensor):
        return nest.clone()
    if isinstance(nest, (list, tuple)):
        return type(nest)(_cloned(item) for item in nest)
    return {key: _cloned(item) for key, item in nest.items()} if isinstance(nest, dict) else nest


def _on(stream: torch.cuda.Stream, call: Callable[[], T]) -> Callable[[], T]:
    """``call`` on ``stream``, which follows the current one before and is followed by it afterwards."""

    def there() -> T:
        before = torch.cuda.current_stream()
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                return call()
        finally:
            before.wait_stream(stream)

    return there


@functools.cache
def _double(device: int, handle: int) -> torch.cuda.Stream:
    """The stream on which graphs for the stream ``handle`` are captured, and on which nothing ever runs.

    torch keeps one workspace for cuBLAS per thread and stream, and a captured call writes to that of the stream it was
    captured on.  So two graphs share one only if they are replayed on one stream, one after the other.  torch's own
    streams come from a small set that repeats.
    """
    from cuda.bindings import driver

    status, stream = driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise ZeroskipError(f"no stream to capture on: {status.name}")
    return torch.cuda.ExternalStream(int(stream), device)  # type: ignore[no-untyped-call]


_THREAD = "zeroskip-capture"
_thread = ThreadPoolExecutor(1, _THREAD)


def in_capture_thread(function: Callable[[], T]) -> T:
    """``function()`` on the current stream, in the one thread that captures engines.

    cuDNN's choice of algorithms is remembered per thread, and so are the libraries' handles, which cannot be made
    during a capture.  All engines are tuned, compared and captured in this thread: so what was measured is what runs,
    on every stream, and nothing that the caller ran before has a say in it.
    """
    if threading.current_thread().name.startswith(_THREAD):
        return function()
    stream = torch.cuda.current_stream()

    def there() -> T:
        with torch.cuda.device(stream.device_index), torch.cuda.stream(stream):
            return function()

    return _thread.submit(contextvars.copy_context().run, there).result()


def obstacle(program: Program) -> str | None:
    """Why calls of ``program`` cannot be captured, where its operators tell: they wait for the GPU.

    A capture that fails leaves torch's allocator in disorder, so what is known is not tried.
    """
    tags = [torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape]
    tags += [tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) is not None else []
    for node in program.graph.nodes:
        if node.op in (CONV, LINEAR, "getitem"):
            continue
        if any(tag in operator(node.op).tags for tag in tags):
            return f"{node.name} ({node.op}) waits for a value from the GPU"
        if any(device.type != "cuda" for device in _devices((node.args, node.kwargs))):
            return f"{node.name} ({node.op}) works on another device"
        for name in node.inputs:
            if name in program.tensors and program.tensors[name].dim() and not program.tensors[name].is_cuda:
                return f"{node.name} ({node.op}) reads {name}, which is on {program.tensors[name].device}"
    return None


def _devices(nest: Any) -> Iterator[torch.device]:
    if isinstance(nest, torch.device):
        yield nest
    elif isinstance(nest, (list, tuple, dict)):
        for item in nest.values() if isinstance(nest, dict) else nest:
            yield from _devices(item)
