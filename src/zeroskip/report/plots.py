"""The figures of the GPU: SVG from records, the same bytes from the same records.

Each draws what there is a record of and leaves out the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zeroskip.core.errors import Unsupported
from zeroskip.report.accuracy import Pareto, front
from zeroskip.report.networks import Network
from zeroskip.report.palette import COLOURS
from zeroskip.report.products import (
    SPUTNIK,
    Products,
    ablated,
    best,
    best_us,
    is_ours,
    ratio,
    searched,
    us,
    vendor_us,
)
from zeroskip.report.tables import Comparison

_STYLE: Any = {
    "svg.hashsalt": "zeroskip",
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
_DENSE = {"fp32": "#6E6E6E", "tf32": "#9C9C9C", "fp16": "#C9C9C9"}
"""cuBLAS by column: grey is dense, as on the page."""
_NAMES = {"fp32": "fp32", "tf32": "TF32", "fp16": "fp16"}
_SPUTNIK, _OTHER, _HALF, _VENDOR = COLOURS[1], COLOURS[0], COLOURS[2], COLOURS[3]


@contextmanager
def _figure(
    path: Path | str, width: float, height: float, columns: int = 1, rows: int = 1
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes (a list, row by row, where there are several), written to ``path`` afterwards."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported("figures need Matplotlib, which is not installed: pip install 'zeroskip[report]'") from error
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for one in axes:
            one.grid(axis="y", linewidth=0.5, color="#DDDDDD")
        yield figure, axes if len(axes) > 1 else axes[0]
        figure.savefig(path, format="svg", metadata={"Date": None})


class _Groups:
    """Bars side by side, a group for each thing compared; a bar without a value leaves its place empty."""

    def __init__(self, axes: Any, labels: Sequence[str], series: int) -> None:
        self.axes, self.count, self.width, self.drawn = axes, series, 0.84 / series, 0
        axes.set_xticks(range(len(labels)), labels)
        axes.tick_params(axis="x", length=0)

    def add(self, name: str, values: Sequence[float | None], colour: str, texts: Sequence[str] = ()) -> None:
        shift = (self.drawn - (self.count - 1) / 2) * self.width
        self.drawn += 1
        known = [(index + shift, value, index) for index, value in enumerate(values) if value]
        if not known:
            return
        self.axes.bar(
            [at for at, _, _ in known], [value for _, value, _ in known], self.width, color=colour, label=name
        )
        for at, value, index in known:
            if texts and texts[index]:
                self.axes.annotate(
                    texts[index],
                    (at, value),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=7.5,
                    fontweight="bold",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
                )


def columns(products: Products, path: Path | str, title: str, cache: str = "warm") -> bool:
    """Figure 10: a group of bars for each shape; above our faster one, how many times faster than dense fp32 it is.

    Returns:
        Whether there was anything to draw.
    """
    facts = {"mask": "random", "batch": 1, "cache": cache, "density": 0.1}
    shapes = products.of(precision="fp32", **facts)
    if not shapes:
        return False
    by_column = {
        column: [products.one(name=item.case["name"], precision=column, **facts) for item in shapes]
        for column in _DENSE
    }
    with _figure(path, 10.5, 3.6) as (_, axes):
        groups = _Groups(axes, [item.case["name"].replace(",", "\n") for item in shapes], 6)
        for column, items in by_column.items():
            groups.add(*_dense(items, column), _DENSE[column])
        winners = [best(item) for item in shapes]
        ratios = [ratio(dense, best_us(item)) for dense, item in zip(_dense(shapes, "fp32")[1], shapes, strict=True)]
        for name, wanted, colour in _ours(shapes):
            texts = [
                f"{over:.2f}x" if over and winner and wanted(winner.method) else ""
                for over, winner in zip(ratios, winners, strict=True)
            ]
            groups.add(f"{name}, fp32", [best_us(item, wanted) for item in shapes], colour, texts)
        groups.add("our best, fp16", [best_us(item) for item in by_column["fp16"]], _HALF)
        axes.set_ylabel("µs")
        _finish(axes, title)
    return True


def _dense(items: Sequence[Comparison | None], column: str) -> tuple[str, list[float | None]]:
    """A name for the fastest dense of a column, and its times: cuBLAS where nothing else was measured."""
    if searched(items):
        return f"dense {_NAMES[column]}", [vendor_us(item) for item in items]
    return f"cuBLAS {_NAMES[column]}", [us(item, "cublas") for item in items]


def _others(items: Sequence[Comparison | None]) -> list[str]:
    """Ours but for Sputnik, in the order met."""
    methods = [method for item in items if item is not None for method in item.times]
    return list(dict.fromkeys(method for method in methods if is_ours(method) and method != SPUTNIK))


def _ours(items: Sequence[Comparison | None]) -> tuple[tuple[str, Callable[[str], bool], str], ...]:
    """Sputnik, and the fastest of the others under one colour."""
    names = _others(items)
    return (
        ("Sputnik", lambda method: method == SPUTNIK, _SPUTNIK),
        (names[0] if len(names) == 1 else "our best other", lambda method: method in names, _OTHER),
    )


def _each(items: Sequence[Comparison | None]) -> list[tuple[str, Callable[[str], bool], str]]:
    """Ours one by one."""
    free = [colour for colour in COLOURS if colour not in (_SPUTNIK, _VENDOR)]
    found: list[tuple[str, Callable[[str], bool], str]] = [("Sputnik", lambda method: method == SPUTNIK, _SPUTNIK)]
    for index, name in enumerate(_others(items)):
        found.append((name, functools.partial(str.__eq__, name), free[index % len(free)]))
    return found


def sparsities(products: Products, path: Path | str, title: str) -> bool:
    """Figure 11: time over sparsity, a line for each method, cuBLAS as level lines.

    Returns:
        Whether there was anything to draw.
    """
    facts = {"mask": "random", "batch": 1, "cache": "warm"}
    if not products.of(**facts):
        return False
    with _figure(path, 7.2, 3.8) as (_, axes):
        for column, colour in _DENSE.items():
            label, times = _dense(products.of(precision=column, **facts), column)
            levels = sorted(value for value in times if value)
            if levels:
                axes.axhline(levels[len(levels) // 2], color=colour, linewidth=2, label=label)
        for column, style in (("fp32", "-"), ("fp16", "--")):
            found = sorted(products.of(precision=column, **facts), key=lambda item: -item.case["density"])
            lines = [*_each(found), ("cuSPARSE", lambda method: method == "cusparse", _VENDOR)]
            for name, wanted, colour in lines:
                points = [(100 * (1 - item.case["density"]), best_us(item, wanted)) for item in found]
                known = [(x, y) for x, y in points if y]
                if known:
                    axes.plot(
                        *zip(*known, strict=True),
                        style,
                        color=colour,
                        marker="o",
                        markersize=4,
                        label=f"{name}, {column}",
                    )
        axes.set(xlabel="% zeros", ylabel="µs", ylim=(0, None))
        _finish(axes, title, loc="upper right", ncols=2)
    return True


def squares(products: Products, path: Path | str, title: str) -> bool:
    """Square products at 90%: time over that of the fastest dense fp32, the microseconds written on the bars.

    Returns:
        Whether there was anything to draw.
    """
    facts = {"mask": "random", "batch": 1, "cache": "warm", "density": 0.1}
    shapes = [item for item in products.of(precision="fp32", **facts) if vendor_us(item)]
    if not shapes:
        return False
    dense, levels = _dense(shapes, "fp32")

    def relative(values: Sequence[float | None]) -> list[float | None]:
        return [value / level if value and level else None for value, level in zip(values, levels, strict=True)]

    def texts(values: Sequence[float | None]) -> list[str]:
        return [f"{value:,.0f}" if value else "" for value in values]

    with _figure(path, 8.4, 3.6) as (_, axes):
        groups = _Groups(axes, [item.case["name"].replace(",", " x ") for item in shapes], 7)

        def add(name: str, values: Sequence[float | None], colour: str) -> None:
            groups.add(name, relative(values), colour, texts(values))

        halves: list[Comparison | None] = []
        for column, colour in _DENSE.items():
            items = [products.one(name=item.case["name"], precision=column, **facts) for item in shapes]
            label, times = _dense(items, column)
            add(label, times, colour)
            halves = items
        add("cuSPARSE, fp32", [us(item, "cusparse") for item in shapes], _VENDOR)
        for name, wanted, colour in _ours(shapes):
            add(f"{name}, fp32", [best_us(item, wanted) for item in shapes], colour)
        add("our best, fp16", [best_us(item) for item in halves], _HALF)
        axes.set_ylabel(f"time over {dense}")
        _finish(axes, title)
    return True


def ablation(products: Products, path: Path | str, title: str) -> bool:
    """For each shape, how many times longer the method takes without one of its ideas, over sparsity.

    Returns:
        Whether there was anything to draw.
    """
    labels = ablated(products.all)
    names = list(dict.fromkeys(item.case["name"] for item in products.of(cache="warm") if ablated([item])))
    if not names:
        return False
    with _figure(path, 3.4 * len(names) + 0.6, 3.4, len(names)) as (figure, found):
        panels = found if len(names) > 1 else [found]
        for panel, name in zip(panels, names, strict=True):
            items = sorted(products.of(cache="warm", name=name), key=lambda item: -item.case["density"])
            panel.axhline(1, color="#444444", linewidth=1)
            for index, label in enumerate(labels):
                points = [
                    (100 * (1 - item.case["density"]), ratio(us(item, label), us(item, label.partition(":")[0])))
                    for item in items
                ]
                known = [(x, y) for x, y in points if y]
                if known:
                    colour = COLOURS[index % len(COLOURS)]
                    panel.plot(
                        *zip(*known, strict=True), color=colour, marker="o", markersize=4, label=label.partition(":")[2]
                    )
            panel.set(xlabel="% zeros", title=name)
        panels[0].set_ylabel("time over the whole method's")
        panels[-1].legend(frameon=False, fontsize=7.5)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return True


def networks(found: Sequence[Network], path: Path | str, title: str) -> bool:
    """A panel for each column, a group for each network and batch: torch, our dense engine, our engine, with the
    microseconds and the two factors behind the bars.

    Returns:
        Whether there was anything to draw.
    """
    panels = [column for column in _DENSE if any(one.precision == column for one in found)]
    if not panels:
        return False
    rows = list(dict.fromkeys((one.name, one.batch) for one in found))
    with _figure(path, 1.2 + 3.6 * len(panels), 0.9 + 0.52 * len(rows), len(panels)) as (figure, drawn):
        for panel, column in zip(drawn if len(panels) > 1 else [drawn], panels, strict=True):
            for one in found:
                if one.precision == column:
                    _network(panel, rows.index((one.name, one.batch)), one)
            panel.set(xlim=(0, 1.75), ylim=(len(rows) - 0.5, -0.5), xticks=[0, 0.5, 1])
            panel.set_yticks(range(len(rows)), [f"{name}, {batch}" for name, batch in rows])
            panel.tick_params(axis="y", length=0, labelleft=column == panels[0])
            panel.grid(visible=False)
            panel.set_title(_NAMES[column], loc="left")
            panel.set_xlabel("time over the best of torch")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return True


def _network(panel: Any, row: int, one: Network) -> None:
    bars = (
        (one.vendor_us, _DENSE["tf32"], f"{one.vendor_us:,.0f} µs, best torch"),
        (one.dense_us, _DENSE["fp16"], f"{one.dense_us:,.0f} µs, our engine dense: {one.fusion:.2f}x"),
        (one.engine_us, _OTHER, f"{one.engine_us:,.0f} µs, with zeros: {one.zeros:.2f}x"),
    )
    for index, (time_us, colour, text) in enumerate(bars):
        at = row + 0.27 * (index - 1)
        panel.barh(at, time_us / one.vendor_us, 0.25, color=colour)
        panel.text(time_us / one.vendor_us + 0.02, at, text, va="center", fontsize=6.5)


_SIDES = {
    "left": ((-5, 0), "right", "center"),
    "right": ((5, 0), "left", "center"),
    "top": ((0, 4), "center", "bottom"),
    "bottom": ((0, -4), "center", "top"),
}
"""Of a point: how far its name is moved, and how that is aligned."""


def paretos(found: Sequence[Pareto], path: Path | str, title: str) -> bool:
    """Top-1 over speed-up, a panel for each setting, two in a row; a line through what nothing else beats.

    Returns:
        Whether there was anything to draw.
    """
    if not found:
        return False
    names = list(dict.fromkeys(network for one in found for network in one.networks))
    columns, rows = min(len(found), 2), -(-len(found) // 2)
    with _figure(path, 5.2 * columns, 3.8 * rows, columns, rows) as (figure, drawn):
        panels = drawn if len(found) > 1 else [drawn]
        for unused in panels[len(found) :]:
            unused.set_axis_off()
        for panel, one in zip(panels, found, strict=False):
            for network, treated in one.networks.items():
                colour, points = COLOURS[names.index(network) % len(COLOURS)], one.points(network)
                best = front(points)
                panel.plot(*zip(*best, strict=True), ":", color=colour, linewidth=1.2)
                panel.plot(*zip(*points, strict=True), "o", color=colour, markersize=5, label=network)
                for row, point, side in zip(treated, points, one.sides(network), strict=True):
                    shift, across, along = _SIDES[side]
                    panel.annotate(
                        row.label,
                        point,
                        shift,
                        textcoords="offset points",
                        ha=across,
                        va=along,
                        color=colour,
                        fontsize=7,
                        parse_math=False,
                    )
            panel.margins(0.12)
            panel.set(xlabel="times faster than dense", ylabel="top-1, %")
            panel.set_title(one.setting.label, loc="left", fontsize=8, parse_math=False)
            panel.legend(frameon=False, fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return True


def _finish(axes: Any, title: str, **legend: Any) -> None:
    axes.set_title(title, loc="left", fontweight="bold", parse_math=False)
    axes.legend(frameon=False, fontsize=8, **legend)
