"""Timing by graph replays, on a GPU."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch

from zeroskip.core.device import cuda
from zeroskip.core.errors import ZeroskipError
from zeroskip.core.precision import held
from zeroskip.measure import graphs
from zeroskip.measure.graphs import Replay, Rotation
from zeroskip.measure.timer import measure, once

pytestmark = pytest.mark.gpu


def product(side: int) -> Callable[[], object]:
    a, b = torch.randn(side, side, device="cuda"), torch.randn(side, side, device="cuda")
    y = torch.empty_like(a)

    def call() -> object:
        with held("fp32"):
            return torch.mm(a, b, out=y)

    return call


def negation(floats: int) -> Callable[[], object]:
    """Reads and writes memory.  A copy would be no kernel in a graph, and slower there (on an H100 by a fifth)."""
    source = torch.randn(floats, device="cuda")
    return partial(torch.neg, source, out=torch.empty_like(source))


@pytest.mark.parametrize(
    "make",
    [partial(product, 4096), partial(product, 5120), partial(negation, 2**29)],
    ids=["4096^3", "5120^3", "2 GiB negated"],
)
def test_long_calls_take_as_long_as_triton_says(make: Callable[[], Callable[[], object]]) -> None:
    testing = pytest.importorskip("triton.testing")
    call = make()
    call()
    ours = graphs.measure({"it": call}, 21)["it"].median_us
    theirs = 1e3 * testing.do_bench(call, warmup=100, rep=400, return_mode="median")
    assert ours > 1000
    assert ours == pytest.approx(theirs, rel=0.05)


def test_an_empty_capture_is_an_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroskipError, match="launched nothing on the current stream"):
            Replay(lambda: None)


def test_a_call_that_runs_elsewhere_while_it_is_captured_is_an_error() -> None:
    x = torch.zeros(4, device="cuda")

    def elsewhere() -> None:
        with torch.cuda.stream(torch.cuda.default_stream()):
            x.add_(1)

    elsewhere()
    with pytest.raises(ZeroskipError, match="launched nothing on the current stream"):
        Replay(elsewhere)
    torch.cuda.synchronize()
    assert x.unique().tolist() == [2.0]


def test_a_replay_does_the_work_as_often_as_it_says() -> None:
    x = torch.zeros(4, device="cuda")
    replay = Replay(lambda: x.add_(1), calls=5)
    torch.cuda.synchronize()
    assert x.sum() == 0
    for _ in range(3):
        replay()
    assert x.unique().tolist() == [15.0]


def test_a_rotation_goes_through_all_its_sets_in_whole_turns() -> None:
    counters = [torch.zeros(1, device="cuda") for _ in range(3)]
    rotation = Rotation([partial(counter.add_, 1) for counter in counters])
    replay = Replay(rotation, calls=5)
    assert replay.calls == 6
    replay()
    assert [int(counter) for counter in counters] == [2, 2, 2]


def reserved() -> int:
    """Bytes that torch's allocator holds and cannot give back."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


MANY = 2**26
"""Floats, 256 MiB."""


def test_variants_share_the_memory_that_they_work_in() -> None:
    x, y = torch.randn(MANY, device="cuda"), torch.empty((), device="cuda")
    variants = {str(index): partial(lambda: torch.sum(x + 1, dim=0, out=y)) for index in range(8)}
    variants["0"]()
    before = reserved()
    torch.cuda.reset_peak_memory_stats()
    graphs.measure(variants, 3)
    assert torch.cuda.max_memory_reserved() - before <= 2 * 4 * MANY
    assert reserved() <= before


def test_a_capture_that_fails_gives_its_memory_back() -> None:
    x = torch.randn(MANY, device="cuda")
    before = reserved()

    def waits() -> float:
        return float((x + 1).sum())

    def fail() -> None:
        with pytest.raises(RuntimeError):
            Replay(waits)

    fail()
    assert reserved() - before < 2**22
    assert Replay(lambda: x.add_(1)).calls == 1


def test_a_capture_can_have_the_memory_that_was_cached_before(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(4, device="cuda")
    total = torch.cuda.get_device_properties(0).total_memory

    def call() -> object:
        return torch.zeros(MANY, device="cuda"), x.add_(1)

    torch.cuda.set_per_process_memory_fraction((reserved() + 6 * MANY) / total)  # room for one and a half
    try:
        call()  # cached from now on
        monkeypatch.setattr(graphs, "ROOM", 0.0)
        with pytest.raises(torch.OutOfMemoryError):
            Replay(call)
        monkeypatch.setattr(graphs, "ROOM", 1.0)
        Replay(call)()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert x.unique().tolist() == [2.0]


@pytest.mark.parametrize("sets", [1, 3])
def test_calls_that_allocate_write_where_they_wrote_before(sets: int) -> None:
    xs = [torch.randn(2**20, device="cuda") for _ in range(sets)]
    calls = [partial(torch.add, x, 1.0) for x in xs]
    before = torch.cuda.memory_allocated()
    replay = Replay(calls[0] if sets == 1 else Rotation(calls), calls=24)
    assert len({result.data_ptr() for result in replay.kept}) == sets
    assert torch.cuda.memory_allocated() - before <= sets * xs[0].numel() * 4 + 2**20
    replay()
    assert all(torch.equal(result, x + 1.0) for result, x in zip(replay.kept, xs, strict=True))


def test_times_are_positive_and_one_a_round() -> None:
    x, y = torch.randn(2**16, device="cuda"), torch.randn(2**20, device="cuda")
    variants = {"short": partial(torch.relu, x), "long": partial(torch.relu, y), "turns": Rotation([x.relu, y.relu])}
    for call in variants.values():
        call()
    found = measure(variants, 9, cuda())
    assert not found.contended
    assert set(found.times) == set(variants)
    for times in found.times.values():
        assert times.clock == "cuda"
        assert len(times.samples_us) == 9
        assert min(times.samples_us) > 0
    assert once(variants["short"], cuda()) > 0
