"""What of graph timing needs no GPU."""

from __future__ import annotations

from collections import deque

import pytest

from zeroskip.measure.graphs import Rotation, _results


def test_a_rotation_turns_through_all_sets_and_starts_again() -> None:
    seen: list[int] = []
    rotation = Rotation([lambda index=index: seen.append(index) for index in range(3)])  # type: ignore[misc]
    for _ in range(7):
        rotation()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


class Result:
    alive = 0

    def __init__(self) -> None:
        Result.alive += 1

    def __del__(self) -> None:
        Result.alive -= 1


@pytest.mark.parametrize("turns", [1, 4])
def test_results_are_let_go_before_the_next_call_that_would_write_there(turns: int) -> None:
    most: list[int] = []

    def call() -> Result:
        most.append(Result.alive)
        return Result()

    kept = _results(call, 12, turns)
    assert isinstance(kept, deque)
    assert len(kept) == turns
    assert max(most) == turns - 1
