"""Processes that measure on one GPU take turns."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from run.fake_gpu import H100
from zeroskip.core.device import cpu
from zeroskip.measure.turns import pause, turn

OTHER = """
import sys, time
sys.path[:0] = {path!r}
from run.fake_gpu import H100
from zeroskip.measure.turns import turn
print("ready", flush=True)
with turn(H100):
    print("in", flush=True)
    sys.stdin.readline()
"""
PATIENCE = 60.0
"""Seconds for what must happen."""
MOMENT = 0.3
"""Seconds for what must not."""


class Other:
    """Another process that wants a turn, and has it until it is told to end."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.its_turn = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline() == "in\n":
            self.its_turn.set()

    def end(self) -> None:
        self.process.communicate("\n", timeout=PATIENCE)


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_another_process_waits_for_its_turn_and_gets_it_in_a_pause() -> None:
    with turn(H100), turn(H100):
        other = Other()
        assert not other.its_turn.wait(MOMENT)
        with pause():
            assert other.its_turn.wait(PATIENCE)
            other.end()
        third = Other()
        assert not third.its_turn.wait(MOMENT)
    assert third.its_turn.wait(PATIENCE)
    third.end()


def test_after_a_pause_a_turn_waits_for_the_other() -> None:
    with turn(H100):
        with pause():
            other = Other()
            assert other.its_turn.wait(PATIENCE)
            threading.Timer(MOMENT, other.end).start()
            started = time.monotonic()
        assert time.monotonic() - started >= MOMENT / 2


def test_threads_take_turns_too() -> None:
    inside = []
    with turn(H100):
        thread = threading.Thread(target=lambda: inside.append(_within()))
        thread.start()
        thread.join(MOMENT)
        assert not inside
    thread.join(PATIENCE)
    assert inside == [True]


def _within() -> bool:
    with turn(H100):
        return True


def test_without_a_turn_there_is_nothing_to_pause_and_a_cpu_has_none() -> None:
    with pause():
        other = Other()
        assert other.its_turn.wait(PATIENCE)
        with turn(cpu(1)):
            pass
        other.end()


def test_a_turn_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError, match="lost"), turn(H100), pause():
        raise RuntimeError("lost")
    other = Other()
    assert other.its_turn.wait(PATIENCE)
    other.end()


def test_where_no_file_can_be_made_it_goes_on_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    with turn(H100), pause():
        pass
    assert "no turns with other processes" in caplog.text
