"""Ours against the fastest dense of each column: how many times faster, which method, and why not dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zeroskip.core.layer import ConvShape
from zeroskip.core.record import Record
from zeroskip.report.plausible import TF32_PRODUCTS
from zeroskip.report.products import (
    Products,
    best,
    geometric_mean,
    is_ours,
    method_cell,
    ratio,
    ratio_cell,
    time_cell,
    us,
    vendor_best,
)
from zeroskip.report.tables import Comparison, Table

Peaks = Mapping[str, float]
"""TFLOP/s of dense products by column, as the machine was measured."""
COLUMNS = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16"}
"""A column of dense, and that of ours which is held against it."""
NAMES = {"fp32": "fp32", "tf32": "TF32", "fp16": "fp16"}


@dataclass(frozen=True)
class Duel:
    """One layer, dense in one column."""

    name: str
    column: str
    dense: Record | None
    ours: Record | None
    second: Record | None
    """The next of ours."""
    floor_us: float | None
    """Of dense: all its products at the peak of its column, or its bytes."""

    @property
    def over(self) -> float | None:
        return ratio(_us(self.dense), _us(self.ours))

    @property
    def why(self) -> str:
        """Why not dense."""
        over, ours, dense = self.over, _us(self.ours), _us(self.dense)
        if over is None or ours is None or dense is None:
            return ""
        if over < 1:
            return "dense is faster"
        if not self.floor_us:
            return ""
        floor = time_cell(self.floor_us)
        if ours < self.floor_us:
            return f"no dense can: its floor is {floor}"
        return f"dense takes {dense / self.floor_us:.1f} times its floor of {floor}"


def duel(products: Products, item: Comparison, column: str, peaks: Peaks) -> Duel:
    """
    Args:
        item: the layer in fp32.
    """
    same = {key: item.case[key] for key in ("name", "mask", "density", "batch", "cache")}
    dense = vendor_best(products.one(precision=column, **same))
    sparse = products.one(precision=COLUMNS[column], **same)
    ours = best(sparse)
    second = best(sparse, lambda method: is_ours(method) and ours is not None and method != ours.method)
    floor = None if dense is None else dense_floor_us(dense, column, peaks)
    return Duel(str(item.case["name"]), column, dense, ours, second, floor)


def dense_floor_us(record: Record, column: str, peaks: Peaks) -> float:
    """What a dense kernel cannot beat: every product at the column's peak (fp32: or as three TF32 ones), and the bytes
    of the sparse layer, which are fewer than its own.

    Args:
        record: of dense.
    """
    peak = peaks.get(column, 0.0)
    if column == "fp32":
        peak = max(peak, peaks.get("tf32", 0.0) / TF32_PRODUCTS)
    return max(2 * macs(record.case) / (peak * 1e6) if peak else 0.0, record.floor_us)


def macs(case: Mapping[str, Any]) -> int:
    """Multiply-adds of a layer, no zero skipped."""
    stride, padding, groups = case["stride"], case["padding"], case["groups"]
    n, c, h, w, k, kernel = (case[name] for name in ("batch", "c", "h", "w", "k", "kernel"))
    return ConvShape(n, c, h, w, k, kernel, kernel, (stride, stride), (padding, padding), (1, 1), groups).macs


def zeros_cell(item: Comparison) -> str:
    """How much of the weights is zero, from the operations that are left."""
    left = [record.flops for record in item.records.values() if record.flops]
    return f"{1 - left[0] / (2 * macs(item.case)):.0%}" if left else ""


# -- tables -------------------------------------------------------------------------------------------
def versus_table(products: Products, peaks: Peaks, **facts: Any) -> Table:
    """A row for each layer: the fastest dense of each column, our fastest, and how many times faster that is."""
    rows, ratios = [], dict[str, list[float | None]]()
    for item in products.of(precision="fp32", **facts):
        found = {column: duel(products, item, column, peaks) for column in COLUMNS}
        for column, one in found.items():
            ratios.setdefault(column, []).append(one.over)
        rows.append(
            (
                str(item.case["name"]),
                zeros_cell(item),
                *(method_cell(one.dense) for one in found.values()),
                method_cell(found["fp32"].ours),
                method_cell(found["fp32"].second),
                method_cell(found["fp16"].ours),
                *(ratio_cell(one.over) for one in found.values()),
                *(time_cell(one.floor_us) for one in found.values()),
            )
        )
    head = (
        "layer",
        "zeros",
        *(f"dense {name}" for name in NAMES.values()),
        "ours fp32",
        "next",
        "ours fp16",
        *(f"over {name}" for name in NAMES.values()),
        *(f"floor of dense {name}" for name in NAMES.values()),
    )
    means = [ratio_cell(geometric_mean(known)) for known in ratios.values()]
    if len(rows) > 1 and any(means):
        rows.append(("geometric mean", *[""] * 7, *means, "", "", ""))
    return Table(head, tuple(rows), frozenset(range(1, len(head))))


def times_table(products: Products, wanted: Callable[[str], bool], **facts: Any) -> Table:
    """What each of the methods ``wanted`` takes, in every column, bf16 too.  Microseconds."""
    found = [(column, item) for column in (*COLUMNS, "bf16") for item in products.of(precision=column, **facts)]
    methods = list(dict.fromkeys(method for _, item in found for method in sorted(item.times) if wanted(method)))
    timed = [(column, item) for column, item in found if any(method in item.times for method in methods)]
    rows = [
        (str(item.case["name"]), NAMES.get(column, column), *(time_cell(us(item, method)) for method in methods))
        for column, item in timed
    ]
    return Table(("layer", "column", *methods), tuple(rows), frozenset(range(2, len(methods) + 2)))


def variants_table(products: Products, **facts: Any) -> Table:
    """A row for each method and each of its variants, the fastest of a layer first.  Microseconds."""
    found = [(column, item) for column in COLUMNS for item in products.of(precision=column, **facts)]
    rows = [
        (str(item.case["name"]), NAMES[column], method, time_cell(us(item, method)))
        for column, item in found
        for method in sorted(item.times, key=lambda method: us(item, method) or 0.0)
    ]
    return Table(("layer", "column", "variant", "us"), tuple(rows), frozenset({3}))


# -- goals --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Goal:
    """Of one layer: microseconds wanted, and hoped for."""

    layer: str
    suite: str
    facts: dict[str, Any]
    wanted_us: float
    hoped_us: float
    limits: dict[str, str]
    """By the method that won: what keeps it from being less, as the measurements that its README describes say."""
    columns: tuple[str, ...] = ("fp32",)
    """Of ours."""


@dataclass(frozen=True)
class MeanGoal:
    """Times faster than the fastest dense of a column on the nine layers of Figure 10, wanted and hoped for."""

    wanted: float
    hoped: float
    limit: str
    """What keeps it from being more."""


MEANS = {
    "fp32": MeanGoal(
        2.5,
        3.2,
        "sparsert: x from L2, whose output is as busy as plain reads make it (counters.json); slab: launch, two trips "
        "to L2 and the sums' way through a cluster",
    ),
    "tf32": MeanGoal(1.9, 2.4, "ours is the same as in fp32, only dense is faster"),
    "fp16": MeanGoal(1.45, 1.85, "half the bytes of x, but as many loads, and a conversion for each"),
}
"""By column of dense."""
NINE = {"mask": "random", "density": 0.1, "batch": 1}
TRAINED = "trained:resnet50_3x3_sparse.npz:sparse90.stage3.weight"
GOALS = (
    Goal(
        "512,512,6272",
        "fig10",
        {"name": "512,512,196", **NINE, "batch": 32},
        20.0,
        11.0,
        {"sparsert": "instructions: 9.5 of the 15.9 cycles that a warp takes for one (counters.json)"},
    ),
    Goal(
        "2048,2048,2048",
        "squares",
        {"name": "2048,2048,2048", **NINE},
        70.0,
        40.0,
        {
            "sparsert": "x: 4.2 MB for each multiprocessor, at over 90% of what L2 gives (counters.json)",
            "slab": "shared memory gives 32 floats a cycle, a quarter of the multiply-adds: 116 us",
        },
    ),
    Goal(
        "256,256,3x3 @14",
        "conv3x3",
        {"name": "256,256,3x3 @14", "mask": TRAINED, "batch": 1},
        4.5,
        3.0,
        {
            "sparsert": "loads of x that straddle lines: L1 busy for 68%, L2's output for 52% (counters.json)",
            "escort": "2.0 us of loads from shared memory, and 2.7 for launch, the first slab and the last store",
        },
        ("fp32", "fp16"),
    ),
)


SPUTNIK_US = {
    "64,32,12544": (5.43, 5.19),
    "128,64,3136": (4.81, 4.78),
    "128,128,3136": (6.01, 6.78),
    "256,128,784": (4.21, 5.48),
    "256,256,784": (5.49, 8.10),
    "512,256,196": (5.18, 7.74),
    "512,512,196": (6.76, 9.44),
    "1024,512,49": (4.59, 7.42),
    "1024,1024,49": (6.12, 9.68),
}
"""Google's code (github.com/google-research/sputnik) and cuBLAS fp32 beside it, on an H100, 90% zeros, one image, warm:
measured before there were records here, to set the goal."""
LOWER = (1.3, 1.6)
"""Times lower than that ratio to cuBLAS, in the geometric mean, wanted and hoped for."""


def sputnik_table(products: Products) -> Table:
    """Time over that of cuBLAS in the same run: Sputnik's own code, our fastest method, and our Sputnik and slab."""
    rows, lower = [], dict[str, list[float | None]]()
    kinds: dict[str, Callable[[str], bool]] = {
        "ours": is_ours,
        "our sputnik or slab": lambda method: method in ("sputnik", "slab"),
    }
    for name, (own, beside) in SPUTNIK_US.items():
        item = products.one(name=name, precision="fp32", cache="warm", **NINE)
        if item is None:
            continue
        found = {kind: ratio(_us(best(item, wanted)), us(item, "cublas")) for kind, wanted in kinds.items()}
        for kind, value in found.items():
            lower.setdefault(kind, []).append(ratio(own / beside, value))
        rows.append((name, f"{own / beside:.2f}", *(f"{value:.2f}" if value else "" for value in found.values())))
    if rows:
        means = [ratio_cell(geometric_mean(known)) for known in lower.values()]
        rows.append((f"lower by (wanted {LOWER[0]}x, hoped for {LOWER[1]}x)", "", *means))
    return Table(("M,K,N", "Sputnik's own code", *kinds), tuple(rows), frozenset({1, 2, 3}))


def goals_table(suites: Mapping[str, Products], peaks: Peaks) -> Table:
    """What was wanted, what there is, which method it was, why not dense and why not less time.

    Args:
        suites: by name.
    """
    head = (
        "",
        "wanted",
        "hoped for",
        "warm",
        "cold",
        "dense fp32, TF32, fp16",
        "won by",
        "why not dense",
        "why not less time",
    )
    rows = [*_means(suites["fig10"], peaks), *_halves(suites["fig10"], suites["sparsert_halves"], peaks)]
    for goal in GOALS:
        rows += _single(goal, suites[goal.suite], peaks)
    return Table(head, tuple(rows), frozenset(range(1, 5)))


def _means(products: Products, peaks: Peaks) -> list[tuple[str, ...]]:
    rows = []
    for column, goal in MEANS.items():
        found = {
            cache: [duel(products, item, column, peaks) for item in products.of(precision="fp32", cache=cache, **NINE)]
            for cache in ("warm", "cold")
        }
        means = [ratio_cell(geometric_mean(one.over for one in duels)) for duels in found.values()]
        if any(means):
            what = f"ours {COLUMNS[column]} over dense {NAMES[column]}, {len(found['warm'])} pointwise layers"
            said = (_winners(found["warm"]), _reasons(found["warm"]), goal.limit)
            rows.append((what, f"{goal.wanted:.2f}x", f"{goal.hoped:.2f}x", *means, "", *said))
    return rows


def _halves(products: Products, halves: Products, peaks: Peaks) -> list[tuple[str, ...]]:
    """The last mean once more, with what SparseRT takes where it adds products in float16; none without such times."""
    goal, overs, used = MEANS["fp16"], list[float | None](), 0
    for item in products.of(precision="fp32", cache="warm", **NINE):
        one = duel(products, item, "fp16", peaks)
        rounded = halves.one(name=one.name, precision="fp16", cache="warm", **NINE)
        times = [_us(one.ours), _us(best(rounded, lambda method: method.startswith("sparsert:")))]
        used += times[1] is not None
        overs.append(ratio(_us(one.dense), min((us for us in times if us is not None), default=None)))
    if not used:
        return []
    what = f"the same, SparseRT with products added in float16 ({used} of {len(overs)} layers)"
    cells = (f"{goal.wanted:.2f}x", f"{goal.hoped:.2f}x", ratio_cell(geometric_mean(overs)))
    return [(what, *cells, "", "", "", "", "error bounded, but beyond the contract's: suites only, no plan")]


def _single(goal: Goal, products: Products, peaks: Peaks) -> list[tuple[str, ...]]:
    rows = []
    for ours in goal.columns:
        warm = products.one(precision="fp32", cache="warm", **goal.facts)
        if warm is None:
            continue
        times = [best(products.one(precision=ours, cache=cache, **goal.facts)) for cache in ("warm", "cold")]
        if times[0] is None:
            continue
        dense = [duel(products, warm, column, peaks).dense for column in COLUMNS]
        one = duel(products, warm, ours, peaks)
        cells = (time_cell(goal.wanted_us), time_cell(goal.hoped_us), *(time_cell(_us(record)) for record in times))
        beside = ", ".join(method_cell(record) or "-" for record in dense)
        rows.append((f"{goal.layer}, {ours}, us", *cells, beside, _winner(one), one.why, _limit(one, goal)))
    return rows


def _winner(one: Duel) -> str:
    if one.ours is None:
        return ""
    return one.ours.method + (f" (next: {method_cell(one.second)})" if one.second else "")


def _limit(one: Duel, goal: Goal) -> str:
    return goal.limits.get(one.ours.method, "") if one.ours else ""


def _winners(duels: Sequence[Duel]) -> str:
    counted = Counter(one.ours.method for one in duels if one.ours is not None)
    return ", ".join(f"{method} {count}" for method, count in counted.most_common())


def _reasons(duels: Sequence[Duel]) -> str:
    """Of each kind how many, and the layers where dense is faster by name."""
    kinds: dict[str, Callable[[Duel], bool]] = {
        "no dense can: its floor is higher": lambda one: one.why.startswith("no dense"),
        "dense takes longer than its floor": lambda one: one.why.startswith("dense takes"),
        "dense is faster": lambda one: one.why == "dense is faster",
    }
    parts = []
    for text, belongs in kinds.items():
        names = [one.name for one in duels if belongs(one)]
        if names:
            parts.append(f"{text}: {len(names)}" + (f" ({'; '.join(names)})" if text == "dense is faster" else ""))
    return "; ".join(parts)


def _us(record: Record | None) -> float | None:
    return None if record is None or record.times is None else record.times.median_us
