"""A folder of build results, addressed by the hash of everything they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

MOST_BYTES = 2 * 2**30
"""A network's weights as code (``methods/sparsert``) are some 100 MB."""
_DIGEST = 32

log = logging.getLogger(__name__)


def user_folder() -> Path:
    """``$XDG_CACHE_HOME/zeroskip``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zeroskip"


class BuildCache:
    """Entries are ``sha256(content) + content``; anything else under an entry's name is a miss.

    Built code is executed, so a folder that another user owns or could write to is refused.  Entries are written
    to a temporary name and renamed, so that processes may share the folder.  The oldest entries go when the
    folder outgrows ``MOST_BYTES``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def of_user(kind: str) -> BuildCache:
        """``$XDG_CACHE_HOME/zeroskip/<kind>``."""
        return BuildCache(user_folder() / kind)

    def get(self, *key: str) -> bytes | None:
        """The content stored under ``key``, or None."""
        path = self.folder / self._name(key)
        try:
            if not self._trusted():
                return None
            data = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # gone since
            os.utime(path)
        content = data[_DIGEST:]
        return content if hashlib.sha256(content).digest() == data[:_DIGEST] else None

    def put(self, content: bytes, *key: str) -> None:
        """Store ``content`` under ``key``.  A cache that cannot be written is only slower, so failures are logged."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._trusted():
                log.warning(
                    "not caching in %s: it must belong to this user and be writable by no one else", self.folder
                )
                return
            self._write(self.folder / self._name(key), hashlib.sha256(content).digest() + content)
        except OSError as error:
            log.warning("not cached in %s: %s", self.folder, error)
            return
        try:
            self._shrink()
        except OSError as error:
            log.warning("%s was not searched for old entries: %s", self.folder, error)

    @staticmethod
    def _name(key: tuple[str, ...]) -> str:
        return hashlib.sha256("\0".join(key).encode()).hexdigest()

    def _trusted(self) -> bool:
        facts = self.folder.stat()
        mine = not hasattr(os, "getuid") or facts.st_uid == os.getuid()
        return mine and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    def _write(self, path: Path, data: bytes) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _shrink(self) -> None:
        """Other processes may be doing the same: entries go while this one looks at them."""
        entries = []
        for path in self.folder.iterdir():
            if len(path.name) == 2 * _DIGEST:  # others are temporary and being written
                with contextlib.suppress(FileNotFoundError):
                    facts = path.stat()
                    if stat.S_ISREG(facts.st_mode):
                        entries.append((facts.st_mtime_ns, facts.st_size, path))
        excess = sum(size for _, size, _ in entries) - MOST_BYTES
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size
