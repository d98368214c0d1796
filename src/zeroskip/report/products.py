"""Records of sparse matrix products on a GPU, looked up by what they are of, and the tables made from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from zeroskip.core.record import Record
from zeroskip.report.records import RecordFile
from zeroskip.report.tables import BASELINES, Comparison, Table, compare

VENDOR_SPARSE = ("cusparse", "cusparselt")
"""Skip zeros, but are the vendor's: shown beside ours and never counted as ours."""
VENDOR_DENSE = ("cublas", "cublas_epilogue", "cublaslt", "cublaslt_epilogue", "triton", "cudnn", "cudnn_epilogue")
"""The vendor's products and convolutions, bare or with bias and ReLU, and Triton's product, which has them inside."""
SEARCHED = ("cublaslt", "triton", "cudnn")
"""Where one of these was measured, the fastest of ``VENDOR_DENSE`` is the best of what there is and not only cuBLAS."""
SPUTNIK = "sputnik"


def latest(file: RecordFile) -> list[Comparison]:
    """The last undisturbed measurement of each case, on the machine of the file's last record."""
    if not file.records:
        return []

    def machine(environment: str) -> object:
        return file.environments[environment].get("device")

    last = machine(file.records[-1].environment)
    quiet = [record for record in file.records if not record.contended]
    found = [item for item in compare(quiet) if machine(item.environment) == last]
    return list({json.dumps(item.case, sort_keys=True): item for item in found}.values())


class Products:
    """The layers among measurements that were taken on a GPU."""

    def __init__(self, comparisons: Iterable[Comparison]) -> None:
        self.all = [item for item in comparisons if item.case.get("kind") == "layer" and "cache" in item.case]

    def of(self, **facts: Any) -> list[Comparison]:
        """Those with these facts, in the order measured; "trained" stands for every trained mask."""
        return [item for item in self.all if all(_matches(item.case, *fact) for fact in facts.items())]

    def one(self, **facts: Any) -> Comparison | None:
        """The only one, or None."""
        found = self.of(**facts)
        return found[0] if len(found) == 1 else None


def _matches(case: dict[str, Any], name: str, value: Any) -> bool:
    if name == "mask" and value == "trained":
        return str(case.get("mask")).startswith("trained:")
    return bool(case.get(name) == value)


def us(comparison: Comparison | None, method: str) -> float | None:
    """The median of a method that was right, in microseconds."""
    times = None if comparison is None else comparison.times.get(method)
    return None if times is None else times.median_us


def is_ours(method: str) -> bool:
    """A whole method of this library that skips zeros."""
    return method not in (*BASELINES, *VENDOR_SPARSE) and ":" not in method


def skips(method: str) -> bool:
    """A whole method that skips zeros, ours or the vendor's."""
    return is_ours(method) or method in VENDOR_SPARSE


def best(comparison: Comparison | None, wanted: Callable[[str], bool] = is_ours) -> Record | None:
    """The fastest of the methods ``wanted``."""
    if comparison is None:
        return None
    times = comparison.times
    name = min(filter(wanted, times), key=lambda method: times[method].median_us, default=None)
    return None if name is None else comparison.records[name]


def best_us(comparison: Comparison | None, wanted: Callable[[str], bool] = is_ours) -> float | None:
    found = best(comparison, wanted)
    return None if found is None or found.times is None else found.times.median_us


def vendor_best(comparison: Comparison | None) -> Record | None:
    """The fastest dense, without bias and ReLU where that is faster."""
    return best(comparison, lambda method: method in VENDOR_DENSE)


def vendor_us(comparison: Comparison | None) -> float | None:
    return best_us(comparison, lambda method: method in VENDOR_DENSE)


def searched(comparisons: Iterable[Comparison | None]) -> bool:
    """Whether more than cuBLAS stands behind ``vendor_best``."""
    return any(method in item.times for item in comparisons if item is not None for method in SEARCHED)


def ratio(dense: float | None, ours: float | None) -> float | None:
    """How many times faster than dense."""
    return None if dense is None or ours is None else dense / ours


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of what there is."""
    known = [math.log(value) for value in values if value]
    return math.exp(sum(known) / len(known)) if known else None


# -- tables -------------------------------------------------------------------------------------------
def time_cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def method_cell(record: Record | None) -> str:
    """Its time and its name."""
    return "" if record is None or record.times is None else f"{time_cell(record.times.median_us)} {record.method}"


def ratio_cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def columns_table(products: Products, batch: int = 1, cache: str = "warm", **facts: Any) -> Table:
    """Figure 10: the dense library in its three columns, the rest in fp32, and how many times faster than cuBLAS fp32
    the best of ours is.  Microseconds."""
    facts = {"mask": "random", "density": 0.1} | facts | {"batch": batch, "cache": cache}
    rows, ratios = [], []
    for fp32 in products.of(precision="fp32", **facts):
        name = fp32.case["name"]
        others = {column: products.one(name=name, precision=column, **facts) for column in ("tf32", "fp16")}
        ours, cublas = best(fp32), us(fp32, "cublas")
        ratios.append(ratio(cublas, best_us(fp32)))
        rows.append(
            (
                name,
                time_cell(cublas),
                time_cell(us(fp32, "cublas_epilogue")),
                time_cell(us(fp32, "dense")),
                *(time_cell(us(item, "cublas")) for item in others.values()),
                time_cell(us(fp32, "cusparse")),
                time_cell(us(fp32, SPUTNIK)),
                time_cell(best_us(fp32, lambda method: is_ours(method) and method != SPUTNIK)),
                time_cell(best_us(others["fp16"])),
                f"{ratio_cell(ratios[-1])} {ours.method}" if ours and ratios[-1] else "",
                time_cell(fp32.records[ours.method].floor_us) if ours else "",
            )
        )
    head = (
        "M,K,N",
        "cuBLAS fp32",
        "with bias, ReLU",
        "best dense fp32",
        "cuBLAS TF32",
        "cuBLAS fp16",
        "cuSPARSE",
        "Sputnik",
        "our best other",
        "our best fp16",
        "over cuBLAS fp32",
        "floor",
    )
    if (mean := geometric_mean(ratios)) and len(rows) > 1:
        rows.append(("geometric mean", *[""] * (len(head) - 3), ratio_cell(mean), ""))
    return _table(head, rows)


def masks_table(products: Products, batch: int = 1) -> Table:
    """Does the pattern of the zeros matter?  Our best in fp32 on each kind of mask, and how far these lie apart."""
    rows = []
    masks = ("random", "clustered", "trained")
    for random in products.of(precision="fp32", batch=batch, cache="warm", mask="random", density=0.1):
        same = {"name": random.case["name"], "precision": "fp32", "batch": batch, "cache": "warm"}
        times = [best_us(products.one(mask=mask, **same)) for mask in masks]
        known = [time for time in times if time is not None]
        if len(known) > 1:
            spread = max(known) / min(known)
            rows.append((random.case["name"], *map(time_cell, times), f"{spread - 1:.0%}"))
    return _table(("M,K,N", *masks, "apart"), rows)


def batches_table(products: Products) -> Table:
    """Our best over cuBLAS fp32, and over the best dense of the fp32 column, for several images; warm and cold."""
    rows = []
    batches = sorted({item.case["batch"] for item in products.of(precision="fp32", mask="random", density=0.1)})
    columns = [(batch, cache) for batch in batches for cache in ("warm", "cold")]
    for name in dict.fromkeys(item.case["name"] for item in products.of(precision="fp32", mask="random")):
        cells = []
        for batch, cache in columns:
            found = products.one(name=name, precision="fp32", mask="random", density=0.1, batch=batch, cache=cache)
            over = ratio(us(found, "cublas"), best_us(found))
            dense = ratio(best_us(found, lambda method: method in BASELINES), best_us(found))
            cells.append(f"{time_cell(best_us(found))} ({ratio_cell(over)}, {ratio_cell(dense)})" if over else "")
        if any(cells):
            rows.append((name, *cells))
    return _table(("M,K,N", *(f"{batch}, {cache}" for batch, cache in columns)), rows)


def sparsity_table(products: Products, batch: int = 1) -> Table:
    """Figure 11: every method at every sparsity, warm, fp32 and fp16.  Microseconds."""
    rows = []
    for precision in ("fp32", "fp16"):
        found = products.of(precision=precision, batch=batch, cache="warm", mask="random")
        methods = list(dict.fromkeys(method for item in found for method in item.times if ":" not in method))
        for method in methods:
            cells = {item.case["density"]: us(item, method) for item in found}
            rows.append((method, precision, *(time_cell(cells.get(density)) for density in _densities(products))))
    return _table(("", "", *(f"{1 - density:.0%}" for density in _densities(products))), rows)


def _densities(products: Products) -> list[float]:
    return sorted({float(item.case["density"]) for item in products.of(mask="random")}, reverse=True)


def ablation_table(products: Products) -> Table:
    """How many times longer a method takes without one of its ideas."""
    rows = []
    labels = ablated(products.all)
    for item in products.of(cache="warm"):
        cells = [
            ratio_cell(ratio(us(item, label), us(item, label.partition(":")[0]))) if us(item, label) else ""
            for label in labels
        ]
        if any(cells):
            whole = us(item, labels[0].partition(":")[0])
            zeros = f"{1 - item.case['density']:.0%}"
            rows.append((item.case["name"], zeros, time_cell(us(item, "cublas")), time_cell(whole), *cells))
    return _table(("M,K,N", "zeros", "cuBLAS fp32", "whole", *(label.partition(":")[2] for label in labels)), rows)


def ablated(comparisons: Sequence[Comparison]) -> list[str]:
    """The ``method:label`` entries among the records, in the order met."""
    return list(dict.fromkeys(method for item in comparisons for method in item.times if ":" in method))


def _table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    return Table(tuple(head), tuple(rows), frozenset(range(1, len(head))))
