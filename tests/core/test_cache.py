"""The build cache: content or a miss, never something else; safe among processes; no one else's code."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zeroskip.core import cache as cache_module
from zeroskip.core.cache import BuildCache


@pytest.fixture
def cache(tmp_path: Path) -> BuildCache:
    return BuildCache(tmp_path / "builds")


def entry(cache: BuildCache) -> Path:
    return next(cache.folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 100])
def test_what_was_put_is_found(cache: BuildCache, content: bytes) -> None:
    cache.put(content, "a", "b")
    assert cache.get("a", "b") == content


def test_another_key_is_a_miss(cache: BuildCache) -> None:
    assert cache.get("a") is None
    cache.put(b"1", "a", "b")
    assert cache.get("a") is None
    assert cache.get("ab") is None
    assert cache.get("b", "a") is None


def test_putting_again_replaces(cache: BuildCache) -> None:
    cache.put(b"1", "a")
    cache.put(b"2", "a")
    assert cache.get("a") == b"2"
    assert len(list(cache.folder.iterdir())) == 1


def test_a_flipped_bit_is_a_miss_wherever_it_is(cache: BuildCache) -> None:
    cache.put(b"content", "a")
    whole = entry(cache).read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        entry(cache).write_bytes(damaged)
        assert cache.get("a") is None
    cache.put(b"content", "a")
    assert cache.get("a") == b"content"


def test_a_truncated_entry_is_a_miss_wherever_it_ends(cache: BuildCache) -> None:
    cache.put(b"content", "a")
    whole = entry(cache).read_bytes()
    for length in range(len(whole)):
        entry(cache).write_bytes(whole[:length])
        assert cache.get("a") is None


def test_a_folder_in_an_entrys_place_is_a_miss(cache: BuildCache) -> None:
    cache.put(b"content", "a")
    path = entry(cache)
    path.unlink()
    path.mkdir()
    assert cache.get("a") is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o722])
def test_a_folder_that_others_may_write_is_refused(
    cache: BuildCache, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put(b"content", "a")
    cache.folder.chmod(mode)
    assert cache.get("a") is None
    with caplog.at_level(logging.WARNING):
        cache.put(b"other", "b")
    assert "must belong to this user" in caplog.text
    assert len(list(cache.folder.iterdir())) == 1


def test_a_folder_of_another_user_is_refused(cache: BuildCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(b"content", "a")
    monkeypatch.setattr(os, "getuid", lambda: cache.folder.stat().st_uid + 1)
    assert cache.get("a") is None


def test_a_new_folder_is_private(cache: BuildCache) -> None:
    cache.put(b"content", "a")
    assert cache.folder.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = BuildCache(tmp_path / "file" / "builds")
    with caplog.at_level(logging.WARNING):
        cache.put(b"content", "a")
    assert "not cached" in caplog.text
    assert cache.get("a") is None


def test_the_oldest_entries_go_first(cache: BuildCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MOST_BYTES", 3 * 132)
    for number in range(6):
        cache.put(bytes(100), str(number))
        for age, path in enumerate(sorted(cache.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
            os.utime(path, (1_000_000 + 10 * number + age,) * 2)
    assert [cache.get(str(number)) is not None for number in range(6)] == [False] * 3 + [True] * 3
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 3 * 132


def test_reading_an_entry_makes_it_young(cache: BuildCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MOST_BYTES", 2 * 132)
    cache.put(bytes(100), "old")
    os.utime(entry(cache), (1_000_000, 1_000_000))
    cache.put(bytes(100), "newer")
    newer = next(path for path in cache.folder.iterdir() if path.stat().st_mtime > 2_000_000)
    os.utime(newer, (2_000_000, 2_000_000))
    assert cache.get("old") is not None
    cache.put(bytes(100), "newest")
    assert cache.get("old") is not None
    assert cache.get("newer") is None


def test_entries_that_others_remove_meanwhile_are_no_trouble(
    cache: BuildCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "MOST_BYTES", 132)
    cache.put(bytes(100), "old")
    os.utime(entry(cache), (1_000_000, 1_000_000))
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: [*listed(folder), folder / ("0" * 64)])
    with caplog.at_level(logging.WARNING):
        cache.put(bytes(100), "new")
    assert not caplog.text
    assert cache.get("new") == bytes(100)
    assert cache.get("old") is None


def test_what_was_cached_is_not_called_uncached_because_old_entries_stay(
    cache: BuildCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(*arguments: object, **more: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(cache_module, "MOST_BYTES", 132)
    cache.put(bytes(100), "old")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "unlink", forbidden)
        cache.put(bytes(100), "new")
    assert "not yours" in caplog.text
    assert "not cached" not in caplog.text
    assert cache.get("new") == bytes(100)


def test_files_that_are_no_entries_stay(cache: BuildCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MOST_BYTES", 132)
    cache.put(bytes(100), "first")
    (cache.folder / "tmpabcdefgh").write_bytes(bytes(1000))  # another process writes it
    (cache.folder / ("0" * 64)).mkdir()
    cache.put(bytes(100), "second")
    assert cache.get("second") == bytes(100)
    assert len(list(cache.folder.iterdir())) == 3


def test_a_write_that_fails_leaves_nothing_behind(
    cache: BuildCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "replace", full)
        cache.put(b"content", "a")
    assert "not cached" in caplog.text
    assert list(cache.folder.iterdir()) == []


def test_of_user_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert BuildCache.of_user("cpu").folder == tmp_path / "zeroskip" / "cpu"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert BuildCache.of_user("cpu").folder == tmp_path / "home" / ".cache" / "zeroskip" / "cpu"


def hammer(folder: Path, worker: int) -> int:
    """Write and read the same keys as every other worker; the number of entries that were neither whole nor a miss."""
    cache, wrong = BuildCache(folder), 0
    deadline = time.monotonic() + 30
    for turn in range(40):
        key = str(turn % 3)
        content = bytes([worker]) * (1000 + 37 * worker)
        cache.put(content, key)
        found = cache.get(key)
        wrong += found is not None and (len(set(found)) != 1 or len(found) != 1000 + 37 * found[0])
        assert time.monotonic() < deadline
    return wrong


def test_eight_processes_at_once_never_see_half_an_entry(cache: BuildCache) -> None:
    with multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver").Pool(8) as pool:
        assert pool.starmap(hammer, [(cache.folder, worker) for worker in range(8)]) == [0] * 8
    assert len(list(cache.folder.iterdir())) == 3


def crowd(folder: Path, worker: int) -> list[str]:
    """Four threads write to a folder that holds a few entries; what was logged, and what was read that is not whole."""
    cache_module.MOST_BYTES = 5000  # of this process
    problems: list[str] = []

    class Problems(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            problems.append(record.getMessage())

    handler = Problems(logging.WARNING)
    cache_module.log.addHandler(handler)
    cache = BuildCache(folder)

    def write(thread: int) -> None:
        for turn in range(40):
            key, content = f"{turn % 7} {worker if turn % 2 else thread}", bytes([turn]) * (500 + turn)
            cache.put(content, key)
            found = cache.get(key)
            if found is not None and (len(set(found)) != 1 or len(found) != 500 + found[0]):
                problems.append(f"read {len(found)} bytes of {set(found)}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    cache_module.log.removeHandler(handler)
    return problems


def test_processes_and_threads_that_all_shrink_the_folder_lose_nothing_but_entries(cache: BuildCache) -> None:
    with multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver").Pool(6) as pool:
        assert pool.starmap(crowd, [(cache.folder, worker) for worker in range(6)], chunksize=1) == [[]] * 6
    left = list(cache.folder.iterdir())
    assert left
    assert all(len(path.name) == 64 for path in left)
    assert sum(path.stat().st_size for path in left) <= 5000
