"""One process at a time measures on a GPU; the others prepare what they will measure.

Two plans that are made at once on one GPU would each time the other's kernels too.  So whatever runs on the GPU to be
measured is done in a ``turn``, which processes of one user take one after the other, by a lock on a file; while a
process packs and compiles, it lets the others have theirs (``pause``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import IO

import torch

from zeroskip.core.cache import user_folder
from zeroskip.core.device import Device

try:
    import fcntl
except ImportError:  # Windows: no turns
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


class _Held(threading.local):
    """Whether this thread has its turn, and the lock that says so to other processes."""

    inside = False
    file: IO[bytes] | None = None


_held = _Held()
_threads = threading.Lock()
"""Those of this process take turns too."""


@contextmanager
def turn(device: Device) -> Iterator[None]:
    """Within, no other process measures on this GPU.  A turn within a turn is the same one; on a CPU there are none."""
    if device.kind == "cpu" or _held.inside:
        yield
        return
    with _threads, _lock_file() or nullcontext() as file:
        try:
            _lock(file)
            _held.inside, _held.file = True, file
            yield
        finally:
            _held.inside, _held.file = False, None
            _unlock(file)


@contextmanager
def pause() -> Iterator[None]:
    """Within a turn: others may have theirs meanwhile, and this thread must leave the GPU alone."""
    file = _held.file
    if file is None:
        yield
        return
    _unlock(file)
    try:
        yield
    finally:
        _lock(file)


def _lock_file() -> IO[bytes] | None:
    """Of the current GPU; None where there can be none, and processes disturb each other."""
    if fcntl is None:
        return None
    name = "gpu"
    if torch.cuda.is_available():
        name = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    try:
        folder = user_folder() / "turns"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return (folder / name).open("ab")
    except OSError as error:
        log.warning("no turns with other processes that measure on this GPU: %s", error)
        return None


def _lock(file: IO[bytes] | None) -> None:
    if file is not None:
        fcntl.flock(file, fcntl.LOCK_EX)


def _unlock(file: IO[bytes] | None) -> None:
    try:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # what was enqueued is over
            torch.cuda.empty_cache()  # what one process keeps for later is another's lack of memory
    finally:  # also of a GPU that does not answer
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_UN)
