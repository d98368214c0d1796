"""Records -> the table that README, terminal and page show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zeroskip.core.layer import PRECISION_DTYPES
from zeroskip.core.record import Record, Times

BASELINES = (
    "dense",
    "torch",
    "torch_channels_last",
    "inductor",
    "onnxruntime",
    "zeroskip_dense",
    "cublas",
    "cublas_epilogue",
    "cublaslt",
    "cublaslt_epilogue",
    "triton",
    "cudnn",
    "cudnn_epilogue",
)
"""Methods that skip no zero.  The fastest of them is what every other one is held against."""
CONTENDED = "CONTENDED"
"""Shown instead of a ratio where the machine did other work while the times were taken."""


@dataclass(frozen=True)
class Comparison:
    """All methods on one case, in one environment."""

    suite: str
    case: dict[str, Any]
    environment: str
    records: dict[str, Record]
    """By method; of a case measured twice, the later."""

    @property
    def label(self) -> str:
        return describe(self.case)

    @property
    def times(self) -> dict[str, Times]:
        """Of the methods that computed the right values, dense ones first."""
        return {
            method: record.times
            for method in ordered(self.records)
            if (record := self.records[method]).status == "OK" and record.times is not None
        }

    @property
    def best_dense(self) -> Record | None:
        return self._fastest(method for method in self.times if method in BASELINES)

    @property
    def best_sparse(self) -> Record | None:
        return self._fastest(method for method in self.times if method not in BASELINES)

    def speedup(self, record: Record) -> float | None:
        """How many times faster than the best dense; None where that cannot be said, for which see ``verdict``."""
        dense = self.best_dense
        if record.times is None or dense is None or dense.times is None or record.contended or dense.contended:
            return None
        return dense.times.median_us / record.times.median_us

    def verdict(self, record: Record) -> str:
        """The speed-up in words, or what stands in its place: a status, contention, or nothing to compare with."""
        if record.status != "OK" or record.times is None:
            return record.status
        speedup = self.speedup(record)
        if speedup is not None:
            return f"{speedup:.2f}×"
        return "-" if self.best_dense is None else CONTENDED

    def _fastest(self, methods: Iterable[str]) -> Record | None:
        times = self.times
        best = min(methods, key=lambda method: times[method].median_us, default=None)
        return None if best is None else self.records[best]


@dataclass(frozen=True)
class Table:
    """Text cells; the columns named in ``numbers`` belong on the right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int]

    def markdown(self) -> str:
        """The table for a README."""
        rule = tuple("---:" if column in self.numbers else "---" for column in range(len(self.head)))
        lines = (_escaped(self.head), rule, *map(_escaped, self.rows))
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def compare(records: Iterable[Record]) -> list[Comparison]:
    """Records of the same suite, case and environment side by side, in the order of their first record."""
    groups: dict[tuple[str, str, str], Comparison] = {}
    for record in records:
        key = (record.suite, record.environment, json.dumps(record.case, sort_keys=True))
        group = groups.setdefault(key, Comparison(record.suite, record.case, record.environment, {}))
        group.records[record.method] = record
    return list(groups.values())


def table(records: Iterable[Record]) -> Table:
    """One row a case, one column a method: ``median ms ±half the interquartile range``, then the best speed-up.

    A record without times shows its status.  The last column is the fastest method that skips zeros over the
    fastest dense one, or the reason why there is no such number.
    """
    comparisons = compare(records)
    methods = ordered(method for comparison in comparisons for method in comparison.records)
    rows = [
        (comparison.label, *(_cell(comparison.records.get(method)) for method in methods), _verdict(comparison))
        for comparison in comparisons
    ]
    return Table(("case", *methods, "speed-up"), tuple(rows), frozenset(range(1, len(methods) + 2)))


def ordered(methods: Iterable[str]) -> list[str]:
    """Each once, the dense ones first, else in the order met."""
    rank = {method: index for index, method in enumerate(BASELINES)}
    return sorted(dict.fromkeys(methods), key=lambda method: rank.get(method, len(BASELINES)))


def column_rank(precision: str) -> int:
    """Where its column stands: fp32 before less; what is unknown comes last."""
    columns: list[str] = [*PRECISION_DTYPES]
    return columns.index(precision) if precision in columns else len(columns)


def describe(case: Mapping[str, Any]) -> str:
    """A case in words: ``1x1 128->128 @56x56, 90% zeros, batch 1, 1 thread``; on a GPU ``..., batch 1, fp32, warm``.

    A name is expected to tell the rest: shape, image, stride.
    """
    parts = [str(case.get("name", "unnamed"))]
    mask, density = str(case.get("mask", "random")), case.get("density")
    if mask != "random":
        parts.append(f"{mask} mask")
    if isinstance(density, int | float) and not mask.startswith("trained"):  # a trained mask brings its own density
        parts.append(f"{(1 - density) * 100:.4g}% zeros")
    if "batch" in case:
        parts.append(f"batch {case['batch']}")
    if "threads" in case:
        parts.append(f"{case['threads']} thread{'s' * (case['threads'] != 1)}")
    parts += [str(case[fact]) for fact in ("precision", "cache") if fact in case]
    return ", ".join(parts)


def duration(time_us: float) -> str:
    """With its unit: microseconds below 100 of them."""
    return f"{time_us:.2f} µs" if time_us < 100 else f"{milliseconds(time_us)} ms"


def milliseconds(time_us: float) -> str:
    """Three decimals, or one above 100 ms."""
    return f"{time_us / 1e3:.3f}" if time_us < 1e5 else f"{time_us / 1e3:.1f}"


def quartiles_us(times: Times) -> tuple[float, float]:
    """The interquartile range that ``Times.spread`` is the width of."""
    ordered_us = sorted(times.samples_us)
    quarter = len(ordered_us) // 4
    return ordered_us[quarter], ordered_us[-1 - quarter]


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    if record.status != "OK" or record.times is None:
        return record.status
    return f"{duration(record.times.median_us)} ±{record.times.spread / 2:.0%}"


def _verdict(comparison: Comparison) -> str:
    best = comparison.best_sparse
    return "-" if best is None else f"{comparison.verdict(best)} {best.method}"


def _escaped(cells: Iterable[str]) -> tuple[str, ...]:
    return tuple(cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for cell in cells)
