"""What each arithmetic instruction computes, on arrays with an entry for each thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
SHARED_WINDOW = 1 << 24
"""Shared addresses of another block of the cluster begin at (rank + 1) times this."""


def _signed(value: Any) -> Any:
    return value.view(np.int32).astype(np.int64) if isinstance(value, np.ndarray) else value


def _wide(value: Any) -> Any:
    return value.astype(np.uint64) if isinstance(value, np.ndarray) else np.uint64(value % (1 << 64))


def _low(value: Any) -> Array:
    return np.asarray(value & np.int64(0xFFFFFFFF)).astype(np.uint32)


def _fma(a: Any, b: Any, c: Any) -> Array:
    """Products of float32 are exact in float64; the second rounding is of no account."""
    return np.asarray(a.astype(np.float64) * np.float64(b) + c.astype(np.float64)).astype(np.float32)


def _halves(a: Array) -> npt.NDArray[np.float64]:
    return np.ascontiguousarray(a).view(np.float16).reshape(-1, 2).astype(np.float64)


def _packed(a: Array) -> Array:
    return np.ascontiguousarray(a.astype(np.float16)).view(np.uint32)[:, 0]


def _rounded_bfloat(a: Array) -> npt.NDArray[np.uint32]:
    bits = np.ascontiguousarray(a).view(np.uint32).astype(np.uint64)
    even = (bits >> np.uint64(16)) & np.uint64(1)
    rounded = (bits + np.uint64(0x7FFF) + even) >> np.uint64(16)
    return np.where(np.isnan(a), np.uint64(0x7FFF), rounded).astype(np.uint32)


def _pair(high: Array, low: Array) -> Array:
    return high.astype(np.uint32) << np.uint32(16) | low.astype(np.uint32)


def _half(a: Array) -> npt.NDArray[np.uint16]:
    return a.astype(np.float16).view(np.uint16)


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "mov.u32": lambda a: np.asarray(a if isinstance(a, np.ndarray) else a % (1 << 32), np.uint32),
    "mov.b32": lambda a: np.asarray(a) if isinstance(a, np.ndarray) else np.uint32(a),
    "mov.b16": lambda a: np.uint16(a),
    "mov.f32": lambda a: np.float32(a),
    "cvta.to.global.u64": lambda a: a,
    "add.u32": lambda a, b: _low(a.astype(np.int64) + b),
    "add.s32": lambda a, b: _low(a.astype(np.int64) + b),
    "sub.u32": lambda a, b: _low(a.astype(np.int64) - (b.astype(np.int64) if isinstance(b, np.ndarray) else b)),
    "mul.lo.u32": lambda a, b: _low(a.astype(np.int64) * b),
    "mul.hi.u32": lambda a, b: (a.astype(np.uint64) * np.uint64(b) >> np.uint64(32)).astype(np.uint32),
    "mad.lo.u32": lambda a, b, c: _low(a.astype(np.int64) * b + _signed(c)),
    "mad.lo.s32": lambda a, b, c: _low(_signed(a) * b + _signed(c)),
    "mad.wide.s32": lambda a, b, c: (_signed(a) * _signed(b)).view(np.uint64) + c,
    "shr.u32": lambda a, b: a >> np.uint32(b),
    "shl.b32": lambda a, b: a << np.uint32(b),
    "and.b32": lambda a, b: a & np.uint32(b),
    "min.u32": lambda a, b: np.minimum(a, np.uint32(b)),
    "setp.ge.u32": lambda a, b: a >= b,
    "setp.lt.u32": lambda a, b: a < b,
    "setp.eq.u32": lambda a, b: a == b,
    "and.pred": lambda a, b: a & b,
    "mul.rn.f32": lambda a, b: a * b,
    "add.rn.f32": lambda a, b: a + b,
    "fma.rn.f32": _fma,
    "max.NaN.f32": np.maximum,
    "min.NaN.f32": np.minimum,
    "mul.rn.f16x2": lambda a, b: _packed(_halves(a) * _halves(b)),
    "fma.rn.f16x2": lambda a, b, c: _packed(_halves(a) * _halves(b) + _halves(c)),
    "cvt.f32.f16": lambda a: a.view(np.float16).astype(np.float32),
    "cvt.u32.u16": lambda a: a.astype(np.uint32),
    "cvt.rn.f16.f32": _half,
    "cvt.rn.bf16.f32": lambda a: _rounded_bfloat(a).astype(np.uint16),
    "cvt.rn.f16x2.f32": lambda high, low: _pair(_half(high), _half(low)),
    "cvt.rn.bf16x2.f32": lambda high, low: _pair(_rounded_bfloat(high), _rounded_bfloat(low)),
    "mapa.shared::cluster.u32": lambda a, b: a + np.uint32((b + 1) * SHARED_WINDOW),
}
