"""Whole networks on a GPU: what fusion and one graph gain, and what the zeros gain on top."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from zeroskip.core.record import Record
from zeroskip.report.products import ratio_cell, time_cell
from zeroskip.report.tables import Comparison, Table, column_rank

VENDORS = ("torch", "torch_channels_last", "inductor")


@dataclass(frozen=True)
class Network:
    """Medians in microseconds of one network, batch and column."""

    comparison: Comparison
    vendor: Record
    """The fastest of torch's ways."""
    vendor_us: float
    dense_us: float
    """Our engine with dense kernels only."""
    engine_us: float

    @property
    def name(self) -> str:
        return str(self.comparison.case["name"])

    @property
    def batch(self) -> int:
        return int(self.comparison.case["batch"])

    @property
    def precision(self) -> str:
        return str(self.comparison.case["precision"])

    @property
    def fusion(self) -> float:
        """The factor that no zero has a part in."""
        return self.vendor_us / self.dense_us

    @property
    def zeros(self) -> float:
        """The factor that is credited to zeros."""
        return self.dense_us / self.engine_us

    @property
    def call_us(self) -> float | None:
        """A call from Python with its copies."""
        return self.comparison.records["zeroskip"].setup.get("call_us")


def networks(comparisons: Iterable[Comparison]) -> list[Network]:
    """Those that were measured whole on a GPU: both engines, and a way of torch's. By batch, name and column."""
    found = []
    for item in comparisons:
        times = item.times
        vendors = [name for name in VENDORS if name in times]
        engines = [times.get(name) for name in ("zeroskip_dense", "zeroskip")]
        if item.case.get("kind") != "model" or item.case.get("device") != "cuda" or not vendors:
            continue
        dense, engine = engines
        if dense is not None and engine is not None:
            vendor = min(vendors, key=lambda name: times[name].median_us)
            medians = times[vendor].median_us, dense.median_us, engine.median_us
            found.append(Network(item, item.records[vendor], *medians))
    return sorted(found, key=lambda one: (one.batch, one.name, column_rank(one.precision)))


def networks_table(found: Iterable[Network]) -> Table:
    """Microseconds a batch, and the two factors."""
    rows = [
        (
            f"{one.name}, batch {one.batch}",
            one.precision,
            f"{time_cell(one.vendor_us)} {one.vendor.method}",
            time_cell(one.dense_us),
            time_cell(one.engine_us),
            ratio_cell(one.fusion),
            ratio_cell(one.zeros),
            ratio_cell(one.fusion * one.zeros),
            time_cell(one.call_us),
        )
        for one in found
    ]
    head = (
        "network",
        "column",
        "best torch",
        "our engine, dense",
        "our engine",
        "fusion, graph",
        "zeros",
        "together",
        "a call from Python",
    )
    return Table(head, tuple(rows), frozenset(range(2, len(head))))
