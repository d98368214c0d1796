"""One process at a time measures on a GPU; the others prepare what they will measure.

Two plans that are made at once on one GPU would each time the other's kernels too.  So whatever runs on the GPU to be
measured is done in a ``turn``, which processes of one user take one after the other, by a lock on a file; while a
process packs and compiles, it lets the others have theirs (``pause``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import torch

from zeroskip.core.cache import user_folder
from zeroskip.core.device import Device

try:
    import fcntl
except ImportError:  # Windows: no turns
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_threads = threading.RLock()
"""Of this process, one at a time too."""
_held = threading.local()
"""Of a thread: ``files``, the lock of each turn that it is in, the innermost last."""


@contextmanager
def turn(device: Device) -> Iterator[None]:
    """Within, no other process measures on this GPU.  Turns may be nested; on a CPU there are none."""
    if device.kind == "cpu":
        yield
        return
    with _threads:
        nested = bool(_files())
        file = _files()[-1] if nested else _lock_file()
        if not nested:
            _lock(file)
        _files().append(file)
        try:
            yield
        finally:
            _files().pop()
            if not nested:
                _unlock(file)
                if file is not None:
                    file.close()


@contextmanager
def pause() -> Iterator[None]:
    """Within a turn: others may have theirs meanwhile, and this thread must leave the GPU alone."""
    file = _files()[-1] if _files() else None
    if file is None:
        yield
        return
    _unlock(file)
    try:
        yield
    finally:
        _lock(file)


def _files() -> list[IO[bytes] | None]:
    if not hasattr(_held, "files"):
        _held.files = []
    files: list[IO[bytes] | None] = _held.files
    return files


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
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()  # what was enqueued is over
        torch.cuda.empty_cache()  # what one process keeps for later is another's lack of memory
    if file is not None:
        fcntl.flock(file, fcntl.LOCK_UN)
