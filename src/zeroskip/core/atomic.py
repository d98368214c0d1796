"""Files that are whole or absent."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in place, as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(data))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path` and put it in place when it is on disk.

    An interruption at any moment leaves the old file or the new one. One process may write to a path at a time. What
    `write` gets may be read as well. Links are followed; a device, as /dev/null, is written to and not replaced.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            write(file)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
