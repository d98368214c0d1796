"""Times on a GPU: replays of captured graphs between two events.

A launch from Python costs more than many of these kernels take, so every variant is captured, several calls in a row,
and the graph is replayed.  Nothing else is inside the interval.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zeroskip.core.errors import ZeroskipError
from zeroskip.core.record import Times

Call = Callable[[], object]

LONG_ENOUGH_US = 400.0
"""A graph repeats its call until a replay lasts this long: starting a graph costs about 5 us."""
QUICK_US = 150.0
"""The same for a first look, which drops hopeless candidates."""
MOST_CALLS = 256
WARM_US, IDLE_S = 50_000.0, 0.2
"""The clocks of an idle GPU are low: where nothing was measured for so many seconds, all variants run so long before
the first sample."""
_busy_until = -math.inf
"""When something was last measured, by the host's clock."""


class Rotation:
    """One variant on several sets of memory, in turns: with enough of them no call finds its data in the cache."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = tuple(calls)
        self._next = 0

    def __call__(self) -> object:
        call = self.calls[self._next]
        self._next = (self._next + 1) % len(self.calls)
        return call()


class Replay:
    """``calls`` calls of one variant as a graph.

    Raises:
        ZeroskipError: the call launched nothing that was captured, so that its replays would measure nothing.
    """

    def __init__(self, call: Call, calls: int = 1) -> None:
        turns = len(call.calls) if isinstance(call, Rotation) else 1
        self.calls = math.ceil(calls / turns) * turns
        self._graph, self.kept = capture(lambda: _results(call, self.calls, turns))

    def __call__(self) -> None:
        self._graph.replay()

    def time_us(self) -> Callable[[], float]:
        """Enqueue one timed replay; the function returned waits for it and gives microseconds per call."""
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        self._graph.replay()
        end.record()

        def read() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / self.calls

        return read


def _results(call: Call, calls: int, turns: int) -> deque[object]:
    """What the last ``turns`` of ``calls`` calls returned.

    Earlier results are let go before the next call, so that a library that allocates its output writes where it wrote
    before, as others write into an output that is given: a warm cache then holds both, a rotation moves both.
    """
    kept: deque[object] = deque()
    for _ in range(calls):
        if len(kept) == turns:
            kept.popleft()
        kept.append(call())
    return kept


def capture(call: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The work that ``call`` enqueues, as a graph, and what it returned (which lives in the graph's own memory).

    ``call`` must have run before, so that libraries have searched their algorithms and allocated what they keep.

    Raises:
        ZeroskipError: nothing was captured.
    """
    from cuda.bindings import driver

    graph, pool = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.graph_pool_handle()
    device = torch.cuda.current_device()
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # said below
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            kept = call()
        except BaseException:
            try:
                graph.capture_end()
            except RuntimeError:  # the capture is invalid, and torch's allocator still believes in it
                torch._C._cuda_endAllocateToPool(device, pool)
            raise
        graph.capture_end()
    error, _, count = driver.cuGraphGetNodes(graph.raw_cuda_graph(), 0)
    if error != driver.CUresult.CUDA_SUCCESS or not count:
        raise ZeroskipError(
            f"the captured graph holds {count} nodes ({error.name}): the call launched nothing on the current stream"
        )
    graph.instantiate()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, kept


@functools.cache
def _stream(device: int) -> Any:
    """The one that is captured on: torch keeps workspaces for every stream that cuBLAS has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def measure(variants: Mapping[str, Call], rounds: int) -> dict[str, Times]:
    """Replay every variant once a round; each after an untimed replay of its own, and so with warm caches, unless it is
    a ``Rotation`` through more memory than they hold."""
    global _busy_until
    replays = {name: Replay(call, _calls(call)) for name, call in variants.items()}
    waiting: dict[str, list[Callable[[], float]]] = {name: [] for name in variants}
    for replay in replays.values():
        replay()
    each = sum(replay.time_us()() * replay.calls for replay in replays.values())
    for _ in range(math.ceil(WARM_US / each) if time.monotonic() > _busy_until + IDLE_S else 1):
        for replay in replays.values():
            replay()
    for _ in range(rounds):
        for name, replay in replays.items():
            if not isinstance(variants[name], Rotation):
                replay()
            waiting[name].append(replay.time_us())
    found = {name: Times(tuple(read() for read in reads), "cuda") for name, reads in waiting.items()}
    _busy_until = time.monotonic()
    return found


def once(call: Call) -> float:
    """Seconds of one call, the best of three replays."""
    replay = Replay(call, _calls(call, QUICK_US))
    replay()
    return min(read() for read in [replay.time_us() for _ in range(3)]) / 1e6


def _calls(call: Call, long_enough_us: float = LONG_ENOUGH_US) -> int:
    """How many calls make a graph long enough to time."""
    single = Replay(call)
    single()
    return min(MOST_CALLS, math.ceil(long_enough_us / max(single.time_us()(), 1.0)))
