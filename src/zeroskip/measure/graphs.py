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
Pool = Any
"""A pool of torch's allocator: what ``torch.cuda.graph_pool_handle`` returns."""

LONG_ENOUGH_US = 400.0
"""A graph repeats its call until a replay lasts this long: starting a graph costs about 5 us."""
QUICK_US = 150.0
"""The same for a first look, which drops hopeless candidates."""
MOST_CALLS = 256
WARM_US, IDLE_S = 50_000.0, 0.2
"""The clocks of an idle GPU are low: where nothing was measured for so many seconds, all variants run so long before
the first sample."""
ROOM = 0.5
"""Where less of the GPU's memory is free, what the allocator has cached is given back before a capture."""
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
    """``calls`` calls of one variant as a graph, in the memory of ``pool`` (see ``capture``).

    Raises:
        ZeroskipError: the call launched nothing that was captured, so that its replays would measure nothing.
    """

    def __init__(self, call: Call, calls: int = 1, pool: Pool | None = None) -> None:
        turns = len(call.calls) if isinstance(call, Rotation) else 1
        self.calls = math.ceil(calls / turns) * turns
        self._graph, self.kept = capture(lambda: _results(call, self.calls, turns), pool)

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


def capture(call: Call, pool: Pool | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The work that ``call`` enqueues, as a graph, and what it returned.

    ``call`` must have run before, so that libraries have searched their algorithms and allocated what they keep.

    Args:
        pool: the memory that the call allocates, which graphs may share that are replayed one after the other and
            whose results nobody reads; one of them must be there as long as others come. Default: the graph's own.

    Raises:
        ZeroskipError: nothing was captured.
    """
    from cuda.bindings import driver

    graph, pool = torch.cuda.CUDAGraph(keep_graph=True), pool or torch.cuda.graph_pool_handle()
    device = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(device)
    if free < ROOM * total:  # during a capture the allocator cannot give back what it cached, not even for itself
        torch.cuda.empty_cache()
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
                torch._C._cuda_releasePool(device, pool)  # as the graph would, had it become one
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
    pool = torch.cuda.graph_pool_handle()
    replays = {name: _long_enough(call, LONG_ENOUGH_US, pool) for name, call in variants.items()}
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
    replay = _long_enough(call, QUICK_US, torch.cuda.graph_pool_handle())
    replay()
    return min(read() for read in [replay.time_us() for _ in range(3)]) / 1e6


def _long_enough(call: Call, us: float, pool: Pool) -> Replay:
    """So many calls that a replay lasts ``us``."""
    single = Replay(call, pool=pool)
    single()
    calls = min(MOST_CALLS, math.ceil(us / max(single.time_us()(), 1.0)))
    return single if calls <= single.calls else Replay(call, calls, pool)
