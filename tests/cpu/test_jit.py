"""The IR writer, the compiler behind it, and the two ways to start threads."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from contract.cases import OURS, bound, work
from zeroskip.core.device import cpu
from zeroskip.core.errors import CompileError, ZeroskipError
from zeroskip.core.layer import ConvShape
from zeroskip.cpu import jit, threads
from zeroskip.cpu.emit import Emitter, vector
from zeroskip.cpu.threads import _openmp, _python_threads, entry
from zeroskip.measure.bound import Stage


def build(emit: Emitter, name: str) -> jit.Loaded:
    emit.line("ret void")
    return jit.load(jit.assemble(emit.function(f"define void @{name}(ptr noalias %args)")), name)


def run(code: jit.Loaded, array: np.ndarray) -> np.ndarray:
    entry(code.address)(array.ctypes.data)
    return array


def test_loops_count_as_range_does() -> None:
    for start, stop, step in ((0, 5, 1), (3, 3, 1), (5, 3, 1), (1, 10, 4)):
        emit = Emitter()
        with emit.loop(start, stop, step) as i:
            emit.line(f"store i64 {i}, ptr {emit.at('%args', emit.mul(i, 8))}")
        found = run(build(emit, "count"), np.full(12, -1, np.int64))
        assert [int(i) for i in found if i >= 0] == list(range(start, stop, step))


def test_integers_divide_and_clip() -> None:
    emit = Emitter()
    a = emit.load_i64("%args")
    results = [
        emit.div(a, 7),
        emit.mod(a, 7),
        emit.minimum(a, 30),
        emit.minimum(a, 100),
        emit.div(a, 1),
        emit.mod(a, 1),
        emit.add(a, 5),
        emit.sub(a, 5),
        emit.mul(a, 3),
    ]
    for index, value in enumerate(results, 1):
        emit.line(f"store i64 {value}, ptr {emit.at('%args', 8 * index)}")
    assert run(build(emit, "integers"), np.array([52] + [0] * 9, np.int64)).tolist() == [
        52,
        7,
        3,
        30,
        52,
        52,
        0,
        57,
        47,
        156,
    ]


def test_shortcuts_leave_operands_as_they_are() -> None:
    emit = Emitter()
    assert emit.add("%a", 0) == emit.mul("%a", 1) == emit.div("%a", 1) == emit.at("%a", 0) == "%a"
    assert emit.mod("%a", 1) == "0"
    assert emit.broadcast("%a", 1) == "%a"


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_vectors_of_every_width_multiply_and_add(lanes: int) -> None:
    emit, size = Emitter(), 4 * lanes
    a, b = emit.load("%args", 0, lanes), emit.load("%args", size, lanes)
    scalar = emit.broadcast(emit.load("%args", 0, 1), lanes)
    emit.store(emit.fma(a, b, scalar, lanes), "%args", 2 * size, lanes)
    emit.store(emit.fadd(a, b, lanes), "%args", 3 * size, lanes)
    data = np.zeros(4 * lanes, np.float32)
    data[: 2 * lanes] = np.arange(1, 2 * lanes + 1)
    found = run(build(emit, "vectors"), data).reshape(4, lanes)
    assert np.array_equal(found[2], found[0] * found[1] + found[0, 0])
    assert np.array_equal(found[3], found[0] + found[1])


def test_shuffle_picks_lanes_of_both() -> None:
    emit = Emitter()
    low, high = emit.load("%args", 0, 4), emit.load("%args", 16, 4)
    emit.store(emit.shuffle(low, high, 4, [0, 2, 5, 7]), "%args", 32, 4)
    emit.store(emit.shuffle(low, "poison", 4, [3]), "%args", 48, 1)
    data = np.arange(16, dtype=np.float32)
    found = run(build(emit, "shuffle"), data)
    assert found[8:13].tolist() == [0, 2, 5, 7, 3]


def test_vector_types_are_named() -> None:
    assert (vector(1), vector(8)) == ("float", "<8 x float>")


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "define void @f() {\n ret i32 0\n}",
        "define void @f() {\nentry:\n}",
        "define i32 @f(i32 %a) {\nentry:\n %b = add i32 %a, %c\n ret i32 %b\n}",
    ],
)
def test_broken_ir_is_a_compile_error_with_the_compilers_words(text: str) -> None:
    with pytest.raises(CompileError, match="refused") as caught:
        jit.assemble(text)
    assert caught.value.log
    assert isinstance(caught.value, ZeroskipError)


def test_the_same_text_gives_the_same_code_from_the_cache_too() -> None:
    text = "define void @same(ptr %args) {\nentry:\n ret void\n}"
    assert jit.assemble(text) == jit.assemble(text)


def test_assembly_is_readable() -> None:
    assert "same:" in jit.assembly("define void @same(ptr %args) {\nentry:\n ret void\n}")


# -- threads -----------------------------------------------------------------------------------------------
def counting() -> jit.Loaded:
    """Adds one to slot ``ticket`` until 1000 tickets are taken; counts the threads that came."""
    emit = Emitter()
    emit.fetch_add("%args", 8)
    again, work, done = emit.name("again"), emit.name("work"), emit.name("done")
    emit.line(f"br label {again}")
    emit.label(again)
    ticket = emit.fetch_add("%args", 0)
    emit.line(f"br i1 {emit.let(f'icmp ult i64 {ticket}, 1000')}, label {work}, label {done}")
    emit.label(work)
    slot = emit.at("%args", emit.add(emit.mul(ticket, 8), 16))
    emit.line(f"store i64 {emit.add(emit.load_i64(slot), 1)}, ptr {slot}")
    emit.line(f"br label {again}")
    emit.label(done)
    return build(emit, "counting")


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["openmp", "python"])
def test_every_ticket_is_worked_on_once_by_that_many_threads(kind: str, count: int) -> None:
    launch = _openmp() if kind == "openmp" else _python_threads()
    if launch is None:
        pytest.skip("torch ships no OpenMP runtime that we know how to call")
    code = counting()
    for _ in range(20):
        data = np.zeros(1002, np.int64)
        launch(code.address, data.ctypes.data, count)
        assert data[1] == count
        assert (data[2:] == 1).all()


@pytest.mark.parametrize("name", OURS)
def test_pythons_threads_give_the_methods_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = work(ConvShape(2, 20, 13, 11, 17, 3, 3, padding=(1, 1)), activation="relu")
    ready, case = bound(name, job, device=cpu(2)), job.case()
    want = Stage(ready, case)()[0].clone()
    monkeypatch.setattr(threads, "_found", lambda: ("Python threads", _python_threads()))
    assert torch.equal(Stage(ready, case)()[0], want)


def test_entry_passes_the_pointer_on() -> None:
    seen = []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(seen.append)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    entry(address)(1234)
    assert seen == [1234]
