"""Max pooling of NCHW images, vectorised along rows.

torch computes max pooling of contiguous (not channels_last) images one element at a time; between sparse convolutions
that took longer than the convolutions themselves (docs/ARCHITECTURE.md has the figures).  For each output row: the
maximum over the window's rows into a line buffer with a border of -inf, then over its columns.

Values equal torch's, NaN included; only a zero's sign may differ, where zeros of both signs meet.  Layouts other than
NCHW and other dtypes go to torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from zeroskip.cpu import jit
from zeroskip.cpu.emit import FLOAT_BYTES, Emitter, vector
from zeroskip.cpu.threads import entry, launcher

LANES = 8
SYMBOL = "max_pool"
NEGATIVE_INFINITY = "0xFFF0000000000000"
_X, _Y, _LINES, _TICKET, _THREAD, _PLANES, _CHANNELS, _X_IMAGE, _X_PLANE, _X_ROW = range(10)


@dataclass(frozen=True)
class MaxPool:
    """Window, stride and padding as in ``torch.nn.functional.max_pool2d`` (dilation 1), for ``h x w`` images."""

    h: int
    w: int
    window: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool

    def __post_init__(self) -> None:
        for size, window, stride, padding in zip((self.h, self.w), self.window, self.stride, self.padding, strict=True):
            if not (size >= 1 and window >= 1 and stride >= 1 and 0 <= padding <= window // 2):
                raise ValueError(f"not a max pooling that torch would accept: {self}")
        if self.p < 1 or self.q < 1:
            raise ValueError(f"the window is larger than the image: {self}")

    def _size(self, axis: int) -> int:
        length = (self.h, self.w)[axis]
        rest = length + 2 * self.padding[axis] - self.window[axis]
        size = -(-rest // self.stride[axis]) + 1 if self.ceil_mode else rest // self.stride[axis] + 1
        # A last window that would start beyond the image and its left padding is dropped.
        return size - (self.ceil_mode and (size - 1) * self.stride[axis] >= length + self.padding[axis])

    @property
    def p(self) -> int:
        return self._size(0)

    @property
    def q(self) -> int:
        return self._size(1)

    @property
    def line_floats(self) -> int:
        reach = (self.q - 1) * self.stride[1] + self.window[1]
        return -(-max(reach, self.padding[1] + self.w) // LANES) * LANES + LANES


def write_kernel(pool: MaxPool) -> str:
    """The module text of ``void max_pool(int64 *arguments)``; work items are planes."""
    emit = Emitter()
    x, y, lines = (emit.load_pointer("%args", 8 * field) for field in (_X, _Y, _LINES))
    planes, channels, image, plane, row = (
        emit.load_i64("%args", 8 * field) for field in (_PLANES, _CHANNELS, _X_IMAGE, _X_PLANE, _X_ROW)
    )
    line = emit.at(lines, emit.mul(emit.fetch_add("%args", 8 * _THREAD), pool.line_floats * FLOAT_BYTES))
    with emit.loop(0, pool.line_floats) as i:
        emit.store(NEGATIVE_INFINITY, line, emit.mul(i, FLOAT_BYTES), 1)
    middle = emit.at(line, pool.padding[1] * FLOAT_BYTES)
    again, work, done = emit.name("again"), emit.name("work"), emit.name("done")
    emit.line(f"br label {again}")
    emit.label(again)
    item = emit.fetch_add("%args", 8 * _TICKET)
    emit.line(f"br i1 {emit.let(f'icmp ult i64 {item}, {planes}')}, label {work}, label {done}")
    emit.label(work)
    n, c = emit.let(f"udiv i64 {item}, {channels}"), emit.let(f"urem i64 {item}, {channels}")
    source = emit.at(emit.at(x, emit.mul(n, image)), emit.mul(c, plane))
    target = emit.at(y, emit.mul(item, pool.p * pool.q * FLOAT_BYTES))
    with emit.loop(0, pool.p) as p:
        start = emit.sub(emit.mul(p, pool.stride[0]), pool.padding[0])
        first = emit.let(f"select i1 {emit.let(f'icmp slt i64 {start}, 0')}, i64 0, i64 {start}")
        end = emit.add(start, pool.window[0])
        last = emit.let(f"select i1 {emit.let(f'icmp slt i64 {end}, {pool.h}')}, i64 {end}, i64 {pool.h}")
        _rows(emit, pool, source, row, first, last, middle)
        _columns(emit, pool, line, emit.at(target, emit.mul(p, pool.q * FLOAT_BYTES)))
    emit.line(f"br label {again}")
    emit.label(done)
    emit.line("ret void")
    return emit.function(f"define void @{SYMBOL}(ptr noalias %args)")


def _rows(emit: Emitter, pool: MaxPool, source: str, row: str, first: str, last: str, line: str) -> None:
    """Maximum over input rows ``first .. last`` into ``line``."""

    def part(col: str, width: int) -> None:
        best = emit.slot(vector(width))
        emit.put(best, vector(width), _constant(NEGATIVE_INFINITY, width))
        with emit.loop(first, last) as i:
            value = emit.load(emit.at(source, emit.mul(i, row)), col, width)
            emit.put(best, vector(width), _larger(emit, emit.get(best, vector(width)), value, width))
        emit.store(emit.get(best, vector(width)), line, col, width)

    _each_vector(emit, pool.w, lambda col, width: part(emit.mul(col, FLOAT_BYTES), width))


def _columns(emit: Emitter, pool: MaxPool, line: str, target: str) -> None:
    """Maximum over the window's columns of ``line``, at every stride."""

    def part(col: str, width: int) -> None:
        at = emit.at(line, emit.mul(col, pool.stride[1] * FLOAT_BYTES))
        best = _constant(NEGATIVE_INFINITY, width)
        for j in range(pool.window[1]):
            if pool.stride[1] == 1 or width == 1:
                value = emit.load(at, j * FLOAT_BYTES, width)
            elif pool.stride[1] == 2:
                low = emit.load(at, j * FLOAT_BYTES, width)
                high = emit.load(at, (j + width - 1) * FLOAT_BYTES, width)
                value = emit.shuffle(low, high, width, [*range(0, width, 2), *range(width + 1, 2 * width, 2)])
            else:
                value = "poison"
                for lane in range(width):
                    scalar = emit.load(at, (j + lane * pool.stride[1]) * FLOAT_BYTES, 1)
                    value = emit.let(f"insertelement {vector(width)} {value}, float {scalar}, i32 {lane}")
            best = _larger(emit, best, value, width)
        emit.store(best, target, emit.mul(col, FLOAT_BYTES), width)

    _each_vector(emit, pool.q, part)


def _each_vector(emit: Emitter, count: int, part: Callable[[str, int], None]) -> None:
    """``part(first column, width)`` over ``count`` columns; the last vector moves back and does some of them again."""
    if count < LANES:
        for col in range(count):
            part(str(col), 1)
        return
    with emit.loop(0, -(-count // LANES)) as i:
        part(emit.minimum(emit.mul(i, LANES), count - LANES), LANES)


def _constant(value: str, width: int) -> str:
    return value if width == 1 else f"<{', '.join([f'float {value}'] * width)}>"


def _larger(emit: Emitter, best: str, value: str, width: int) -> str:
    """``value`` where it is larger or NaN, else ``best``: torch's rule."""
    kind, bits = vector(width), "i1" if width == 1 else f"<{width} x i1>"
    larger = emit.let(f"fcmp ogt {kind} {value}, {best}")
    missing = emit.let(f"fcmp uno {kind} {value}, {value}")
    take = emit.let(f"or {bits} {larger}, {missing}")
    return emit.let(f"select {bits} {take}, {kind} {value}, {kind} {best}")


@functools.cache
def _code(pool: MaxPool) -> jit.Loaded:
    return jit.load(jit.assemble(write_kernel(pool)), SYMBOL)


def bind(pool: MaxPool, threads: int) -> Callable[[Tensor], Tensor]:
    """``max_pool2d`` of float32 images ``[n, c, pool.h, pool.w]`` on that many threads."""
    code = _code(pool)
    call = entry(code.address)

    def run(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.stride(3) != 1 or x.numel() == 0:
            return functional.max_pool2d(x, pool.window, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)
        n, c = x.shape[:2]
        y = torch.empty((n, c, pool.p, pool.q))
        lines = torch.empty((threads, pool.line_floats))
        strides = [step * FLOAT_BYTES for step in x.stride()[:3]]
        arguments = np.array([x.data_ptr(), y.data_ptr(), lines.data_ptr(), 0, 0, n * c, c, *strides], np.int64)
        if threads == 1:
            call(arguments.ctypes.data)
        else:
            launcher()(code.address, arguments.ctypes.data, threads)
        return y

    return run
