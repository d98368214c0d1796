"""Plotly figures as plain data; the page draws them with the Plotly it carries.

Plotly reads some HTML and templates in the texts it shows, so names go in through ``_plain``.  Colours of text, axes
and grid belong to the page (page.js), which knows whether it is light or dark.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zeroskip.plan.plan import Plan
from zeroskip.report.accuracy import Pareto, front
from zeroskip.report.palette import ERROR
from zeroskip.report.plausible import MARGIN
from zeroskip.report.tables import CONTENDED, Comparison, duration, ordered, quartiles_us

Chart = dict[str, Any]
_BAR_PX, _STEP_PX, _MARGIN_PX = 27, 72, 12
_TICKS = [digit * 10.0**power for power in range(-2, 6) for digit in (1, 2, 5)]


def layer_bars(plan: Plan, colours: Mapping[str, str]) -> Chart:
    """For every step the chosen method's time and, unless that is the dense one, dense beneath it."""
    bars, names = [], []
    timed = [(step, step.time_us) for step in plan.steps if step.time_us]
    for index, (step, time_us) in enumerate(timed):
        label = f"{_plain(step.method)} <b>{duration(time_us)}</b>"
        hover = "<br>".join(filter(None, (_plain(step.name), _plain(step.method), _config(step.config))))
        if step.dense_us and step.method != "dense":
            label += f"  {step.dense_us / time_us:.2f}×"
            dense = f"dense {duration(step.dense_us)}"
            bars.append(_Bar(index + 0.27, step.dense_us, colours["dense"], dense, f"{_plain(step.name)}<br>{dense}"))
        bars.append(_Bar(index, time_us, colours[step.method], label, hover))
        names.append(
            {
                "text": f"{_plain(step.name)}  <span>{_plain(step.layer)}</span>",
                "x": 0,
                "y": index - 0.29,
                "xref": "paper",
                "xanchor": "left",
                "yanchor": "middle",
                "showarrow": False,
                "borderpad": 0,
            }
        )
    return _bars(bars, 0.24, (-0.5, len(timed) - 0.55), _STEP_PX * len(timed), names)


def case_bars(comparison: Comparison, colours: Mapping[str, str]) -> Chart:
    """The median of every method on one case, with its interquartile range."""
    bars = []
    for index, (method, times) in enumerate(comparison.times.items()):
        record, median, (low, high) = comparison.records[method], times.median_us, quartiles_us(times)
        verdict = comparison.verdict(record)
        label = f"{_plain(method)} <b>{duration(median)}</b>  {verdict}".removesuffix("  -")
        hover = (
            f"{_plain(method)}<br>median of {len(times.samples_us)}: {duration(median)}<br>"
            f"quartiles {duration(low)} and {duration(high)}<br>{_config(record.config)}"
        )
        bars.append(_Bar(index, median, colours[method], label, hover, (low, high), verdict == CONTENDED))
    return _bars(bars, 0.62, (-0.6, len(bars) - 0.4), _BAR_PX * len(bars), [])


@dataclass(frozen=True)
class Work:
    """A point of the roofline chart: floating-point operations on nonzeros, and bytes that must move."""

    name: str
    method: str
    flops: int
    bytes: int
    time_us: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes

    @property
    def gflops(self) -> float:
        return self.flops / self.time_us / 1e3


def works(plan: Plan) -> list[Work]:
    """The measured steps whose work is known."""
    counted = [(step, step.flops, step.bytes) for step in plan.steps]
    return [
        Work(step.name, step.method, flops, moved, step.time_us)
        for step, flops, moved in counted
        if step.time_us and flops and moved
    ]


def above_roof(works: Sequence[Work], peak_gflops: float, peak_gbps: float) -> list[Work]:
    """Those that seem to work faster than the machine can, which is an error in a time, a count or a peak."""
    if not peak_gflops or not peak_gbps:
        return []
    return [work for work in works if MARGIN * work.gflops > min(peak_gflops, peak_gbps * work.intensity)]


def roofline(works: Sequence[Work], peak_gflops: float, peak_gbps: float, colours: Mapping[str, str]) -> Chart:
    """Achieved GFLOP/s against FLOP per byte, under the machine's roof where its peaks are known (0 where not).

    Source: Williams, Waterman, Patterson, Roofline: an insightful visual performance model, CACM 52(4), 2009.
    """
    wrong = above_roof(works, peak_gflops, peak_gbps)
    right = [work for work in works if work not in wrong]
    data = [
        _points([work for work in right if work.method == method], colours[method])
        for method in ordered(work.method for work in right)
    ]
    if peak_gflops and peak_gbps:
        ridge = peak_gflops / peak_gbps
        ends = [ridge, *(work.intensity for work in works)]
        xs = [min(ends) / 2, ridge, max(ends) * 2]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "line": {"width": 2},
                "meta": "roof",
                "hoverinfo": "skip",
                "x": xs,
                "y": [min(peak_gflops, peak_gbps * x) for x in xs],
            }
        )
    if wrong:
        names = [f"error: {_plain(work.name)}" for work in wrong]
        data.append(
            _points(wrong, ERROR, symbol="x")
            | {"mode": "markers+text", "text": names, "textposition": "bottom center", "meta": "error"}
        )
    axis: Chart = {"type": "log", "exponentformat": "none"}
    return {
        "data": data,
        "layout": {
            "height": 420,
            "margin": {"l": 62, "r": 16, "t": 12, "b": 52},
            "showlegend": False,
            "hovermode": "closest",
            "xaxis": axis | {"title": {"text": "useful FLOP per byte"}, "dtick": 1},
            "yaxis": axis
            | {"title": {"text": "useful GFLOP/s"}, "tickvals": _TICKS, "ticktext": [f"{tick:g}" for tick in _TICKS]},
        },
    }


def pareto(found: Pareto, colours: Mapping[str, str]) -> Chart:
    """Top-1 over speed-up: the treatments of each network, and a line through those that no other one beats."""
    data: list[dict[str, Any]] = []
    for network, rows in found.networks.items():
        points = found.points(network)
        best = front(points)
        sides = [f"middle {side}" if side in ("left", "right") else f"{side} center" for side in found.sides(network)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "line": {"color": colours[network], "width": 1.5, "dash": "dot"},
                "hoverinfo": "skip",
                "x": [x for x, _ in best],
                "y": [y for _, y in best],
            }
        )
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": _plain(network),
                "marker": {"color": colours[network], "size": 9},
                "x": [x for x, _ in points],
                "y": [y for _, y in points],
                "text": [_plain(row.label) for row in rows],
                "textposition": sides,
                "textfont": {"color": colours[network]},
                "cliponaxis": False,
                "hoverinfo": "text",
                "hovertext": [
                    f"{_plain(network)}, {_plain(row.name)}<br>{y:.2f}% top-1, {x:.2f}×"
                    for row, (x, y) in zip(rows, points, strict=True)
                ],
            }
        )
    return {
        "data": data,
        "layout": {
            "height": 420,
            "margin": {"l": 62, "r": 48, "t": 24, "b": 52},
            "showlegend": False,
            "hovermode": "closest",
            "xaxis": {"title": {"text": "times faster than dense"}},
            "yaxis": {"title": {"text": "top-1, %"}},
        },
    }


@dataclass(frozen=True)
class _Bar:
    y: float
    time_us: float
    colour: str
    label: str
    hover: str
    quartiles_us: tuple[float, float] | None = None
    faint: bool = False

    @property
    def end_ms(self) -> float:
        """Where its label starts: the end of the bar, or of its whisker."""
        return (self.quartiles_us[1] if self.quartiles_us else self.time_us) / 1e3


def _bars(
    bars: Sequence[_Bar], width: float, y_range: tuple[float, float], height: int, names: Sequence[dict[str, Any]]
) -> Chart:
    """Horizontal bars, and their labels as a trace of their own because Plotly's would lie on the whiskers."""
    y = [bar.y for bar in bars]
    drawn: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "width": width,
        "x": [bar.time_us / 1e3 for bar in bars],
        "y": y,
        "marker": {"color": [bar.colour for bar in bars], "opacity": [0.45 if bar.faint else 1.0 for bar in bars]},
        "hovertext": [bar.hover for bar in bars],
        "hoverinfo": "text",
    }
    if any(bar.quartiles_us for bar in bars):
        ranges = [(bar.time_us, *(bar.quartiles_us or (bar.time_us, bar.time_us))) for bar in bars]
        drawn["error_x"] = {
            "type": "data",
            "symmetric": False,
            "thickness": 1.2,
            "width": 3,
            "array": [(high - time) / 1e3 for time, _, high in ranges],
            "arrayminus": [(time - low) / 1e3 for time, low, _ in ranges],
        }
    labels = {
        "type": "scatter",
        "mode": "text",
        "x": [bar.end_ms for bar in bars],
        "y": y,
        "hoverinfo": "skip",
        "text": [f"\u00a0{bar.label}" for bar in bars],
        "textposition": "middle right",
        "cliponaxis": False,
        "meta": "labels",
    }
    return {
        "data": [drawn, labels],
        "layout": {
            "height": height + _MARGIN_PX,
            "margin": {"l": 0, "r": 0, "t": _MARGIN_PX // 2, "b": _MARGIN_PX // 2},
            "showlegend": False,
            "annotations": list(names),
            "xaxis": {"visible": False, "fixedrange": True},
            "yaxis": {"visible": False, "fixedrange": True, "range": list(reversed(y_range))},
        },
    }


def _points(works: Sequence[Work], colour: str, symbol: str = "circle") -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "marker": {"color": colour, "size": 9, "symbol": symbol},
        "x": [work.intensity for work in works],
        "y": [work.gflops for work in works],
        "hoverinfo": "text",
        "hovertext": [
            f"{_plain(work.name)}<br>{_plain(work.method)}, {duration(work.time_us)}<br>"
            f"{work.gflops:.1f} GFLOP/s at {work.intensity:.1f} FLOP/byte"
            for work in works
        ],
    }


def _plain(text: str) -> str:
    return html.escape(text, quote=False).replace("%{", "%&#123;")


def _config(config: Mapping[str, Any]) -> str:
    return _plain(", ".join(f"{key} {value}" for key, value in config.items()))
