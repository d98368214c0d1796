"""The kernels of a replay are told apart by their place in it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tools import timeline
from tools.timeline import REPLAYS, Kernel, kernels

CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


@dataclass
class Event:
    of: str
    start: int
    duration: int
    where: Any = CUDA

    def name(self) -> str:
        return self.of

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.duration

    def device_type(self) -> Any:
        return self.where


class Seen:
    """What a profiler saw: of every replay two kernels, the second of which begins before the first has ended."""

    def __init__(self, last: int) -> None:
        found = [Event("launch", 0, 9, CPU)]
        for replay in range(REPLAYS):
            found += [Event("second", 10_000 * replay + 1_900, 3_000), Event("first", 10_000 * replay, 2_000)]
        self.profiler = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: found[: len(found) - last]))

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_kernels_come_in_order_with_their_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[None] = []
    monkeypatch.setattr(timeline, "profile", lambda activities: Seen(0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = list(kernels(lambda: replays.append(None)))  # type: ignore[arg-type]
    assert found == [Kernel("first", 0.0, 2.0), Kernel("second", -0.1, 3.0)]
    assert len(replays) == REPLAYS


def test_a_replay_that_was_not_seen_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "profile", lambda activities: Seen(1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(SystemExit, match=f"{2 * REPLAYS - 1} kernels"):
        list(kernels(lambda: None))  # type: ignore[arg-type]
