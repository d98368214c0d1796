"""How many threads work: one compiled function on several, and torch's own.

The kernels take work by atomic tickets, so every thread calls the same function with the same argument.  torch has
already loaded an OpenMP runtime and keeps its threads warm; using that pool avoids a second one that would compete
for the cores.  Where torch ships none that we know how to call, Python's threads do (ctypes releases the GIL).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

Launch = Callable[[int, int, int], None]
"""``launch(function address, argument address, threads)``: returns when every thread has returned."""


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within, torch's operators run on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def entry(address: int) -> Callable[[int], None]:
    """The compiled ``void f(void *)`` at ``address`` as a Python callable."""
    return _ENTRY(address)


@functools.cache
def _found() -> tuple[str, Launch]:
    openmp = _openmp()
    return ("torch's OpenMP", openmp) if openmp else ("Python threads", _python_threads())


def launcher() -> Launch:
    """The way to start threads on this machine."""
    return _found()[1]


def pool_name() -> str:
    """Whose threads ``launcher`` uses, for people."""
    return _found()[0]


def _openmp() -> Launch | None:
    library = Path(torch.__file__).parent
    for folder in (library / "lib", library.parent / "torch.libs"):
        for path in sorted(folder.glob("libgomp*")):
            # GNU OpenMP's entry point for `#pragma omp parallel` (libgomp ABI, GOMP_4.0: fn, data, threads, flags).
            parallel = ctypes.CDLL(str(path)).GOMP_parallel
            parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            parallel.restype = None
            return lambda function, argument, threads: parallel(function, argument, threads, 0)
    return None


def _python_threads() -> Launch:
    pools: dict[int, ThreadPoolExecutor] = {}

    def launch(function: int, argument: int, threads: int) -> None:
        pool = pools.setdefault(threads, ThreadPoolExecutor(threads - 1, "zeroskip"))
        call = entry(function)
        others = [pool.submit(call, argument) for _ in range(threads - 1)]
        call(argument)
        for other in others:
            other.result()

    return launch
