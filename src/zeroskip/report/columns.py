"""What the columns of precision say of each other: what half the bytes gain, and where tensor cores win."""

from __future__ import annotations

from dataclasses import dataclass

from zeroskip.report.products import (
    Products,
    best,
    best_us,
    geometric_mean,
    ratio,
    ratio_cell,
    searched,
    us,
    vendor_us,
)
from zeroskip.report.rivals import NINE, Peaks
from zeroskip.report.tables import Table

BATCHES = (1, 8, 32)
HALVES = tuple((batch, cache) for batch in BATCHES for cache in ("warm", "cold"))
WANTED = 1.3
"""Times faster in half precision, where bytes dominate."""


def images(batch: int) -> str:
    """So many, in words."""
    return "one image" if batch == 1 else f"{batch} images"


@dataclass(frozen=True)
class Gain:
    """How many times faster ours is in fp16 than in fp32, and whether what a layer must read and write takes more than
    half of our time in fp32, and longer than its operations."""

    times: float | None
    of_bytes: bool

    @property
    def cell(self) -> str:
        return f"**{ratio_cell(self.times)}**" if self.of_bytes and self.times else ratio_cell(self.times)


def gains(layers: Products, peaks: Peaks) -> dict[str, tuple[Gain, ...]]:
    """Of each of the nine layers, in the order of ``HALVES``."""
    found, peak = {}, peaks.get("fp32", 0.0) * 1e6
    for item in layers.of(precision="fp32", cache="warm", **NINE):
        row = []
        for batch, cache in HALVES:
            facts = {"name": item.case["name"], **NINE, "batch": batch, "cache": cache}
            single, half = (layers.one(precision=precision, **facts) for precision in ("fp32", "fp16"))
            took, fastest, bytes_us = best_us(single), best(single), 0.0
            if fastest is not None and fastest.flops < 0.99 * peak * fastest.floor_us:
                bytes_us = fastest.floor_us
            row.append(Gain(ratio(took, best_us(half)), took is not None and bytes_us > took / 2))
        if any(gain.times for gain in row):
            found[str(item.case["name"])] = tuple(row)
    return found


def halves_table(layers: Products, peaks: Peaks) -> Table:
    """``gains``, by batch and cache; in bold where bytes take most of the time."""
    rows = tuple((name, *(gain.cell for gain in row)) for name, row in gains(layers, peaks).items())
    head = ("M,K,N", *(f"{batch}, {cache}" for batch, cache in HALVES))
    return Table(head, rows, frozenset(range(1, len(head))))


def halves_said(layers: Products, peaks: Peaks) -> str:
    """What was wanted of half the bytes, and where it is reached."""
    text = f"Our fastest in fp32 over our fastest in fp16 (sums in fp32). Wanted where bytes dominate: {WANTED}x."
    there = [gain.times for row in gains(layers, peaks).values() for gain in row if gain.of_bytes and gain.times]
    if not there:
        return text
    return (
        f"{text} In bold: bytes take more than half of our fp32 time; {sum(one >= WANTED for one in there)} of "
        f"{len(there)} reach it, {ratio_cell(geometric_mean(there))} in the geometric mean."
    )


def tensor_cores(layers: Products, squares: Products) -> list[str]:
    """Where they win, in words."""
    facts = NINE | {"cache": "warm"}
    every = searched(layers.of(**facts))
    what = "The fastest of cuBLAS, cublasLt and Triton" if every else "cuBLAS"

    def won(among: Products, column: str, ours: str, batch: int) -> tuple[int, int]:
        """How often dense is faster, of how many layers."""
        pairs = []
        for item in among.of(precision="fp32", **facts | {"batch": batch}):
            same = {"name": item.case["name"], **facts, "batch": batch}
            dense = among.one(precision=column, **same)
            sparse = best_us(among.one(precision=ours, **same))
            pairs.append((vendor_us(dense) if every else us(dense, "cublas"), sparse))
        known = [(dense, sparse) for dense, sparse in pairs if dense and sparse]
        return sum(dense < sparse for dense, sparse in known), len(known)

    lines = []
    for column, ours in (("tf32", "fp32"), ("fp16", "fp16")):
        counts = [(f"layers with {images(batch)}", *won(layers, column, ours, batch)) for batch in BATCHES]
        counts.append(("square products", *won(squares, column, ours, 1)))
        said = ", ".join(f"{faster} of {many} {which}" for which, faster, many in counts if many)
        if said:
            lines.append(f"in {column.replace('tf', 'TF')} than our best {ours} on {said}")
    return ["", f"{what} is faster {'; '.join(lines)}."] if lines else []
