"""Plotly figures as plain data; the page draws them with the Plotly it carries.

Plotly reads some HTML in the texts it shows, so names go in escaped.  Colours of text, axes and grid belong to the
page (page.js), which knows whether it is light or dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zeroskip.plan.plan import Plan, Step
from zeroskip.report.palette import ERROR
from zeroskip.report.tables import CONTENDED, Comparison, milliseconds, ordered, quartiles_us

Chart = dict[str, Any]
_BAR_PX, _GROUP_PX, _MARGIN_PX = 26, 66, 12


def layer_bars(plan: Plan, colours: Mapping[str, str]) -> Chart:
    """For every step the chosen method's time and, unless that is the dense one, dense beneath it."""
    steps = [step for step in plan.steps if step.time_us is not None]
    chosen = [_Bar(index, step.time_us or 0.0, colours[step.method], _layer_label(step), _layer_hover(step))
              for index, step in enumerate(steps)]
    dense = [_Bar(index + 0.33, step.dense_us, colours["dense"], f"dense {milliseconds(step.dense_us)} ms", _layer_hover(step))
             for index, step in enumerate(steps) if step.dense_us is not None and step.method != "dense"]
    names = [{"x": 0, "xref": "paper", "xanchor": "left", "y": index - 0.33, "showarrow": False, "yanchor": "middle",
              "text": f"{html.escape(step.name)}  <span>{html.escape(step.layer)}</span>"} for index, step in enumerate(steps)]
    return _bars([*chosen, *dense], 0.28, (-0.55, len(steps) - 0.4), _GROUP_PX * len(steps), annotations=names)


def case_bars(comparison: Comparison, colours: Mapping[str, str]) -> Chart | None:
    """The median of every method on one case, with its interquartile range; None where nothing has times."""
    bars = []
    for index, (method, times) in enumerate(comparison.times.items()):
        record, median, (low, high) = comparison.records[method], times.median_us, quartiles_us(times)
        verdict = comparison.verdict(record)
        label = f"{html.escape(method)} <b>{milliseconds(median)} ms</b>  {verdict if verdict != '-' else ''}".rstrip()
        hover = (f"{html.escape(method)}<br>median {milliseconds(median)} ms of {len(times.samples_us)}<br>"
                 f"quartiles {milliseconds(low)} to {milliseconds(high)} ms<br>{html.escape(_config(record.config))}")
        bars.append(_Bar(index, median, colours[method], label, hover, (low, high), verdict == CONTENDED))
    return _bars(bars, 0.62, (-0.6, len(bars) - 0.4), _BAR_PX * len(bars)) if bars else None


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


def above_roof(works: Sequence[Work], peak_gflops: float, peak_gbps: float) -> list[Work]:
    """Those that seem to work faster than the machine can, which is an error in a time, a count or a peak."""
    return [work for work in works if peak_gflops and peak_gbps
            and work.gflops > min(peak_gflops, peak_gbps * work.intensity)]


def roofline(works: Sequence[Work], peak_gflops: float, peak_gbps: float, colours: Mapping[str, str]) -> Chart:
    """Achieved GFLOP/s against FLOP per byte, under the machine's roof where its peaks are known (0 where not).

    Source: Williams, Waterman, Patterson, Roofline: an insightful visual performance model, CACM 52(4), 2009.
    """
    wrong = above_roof(works, peak_gflops, peak_gbps)
    data: list[dict[str, Any]] = []
    if peak_gflops and peak_gbps:
        ridge, ends = peak_gflops / peak_gbps, [work.intensity for work in works]
        xs = [min(*ends, ridge) / 2, ridge, max(*ends, ridge) * 2]
        data.append({"type": "scatter", "mode": "lines", "x": xs, "y": [min(peak_gflops, peak_gbps * x) for x in xs],
                     "line": {"width": 2}, "name": "roof", "hoverinfo": "skip", "meta": "roof"})
    for method in ordered(work.method for work in works):
        data.append(_points([work for work in works if work.method == method and work not in wrong], method, colours[method]))
    if wrong:
        names = [f"error: {html.escape(work.name)}" for work in wrong]
        data.append(_points(wrong, "above the roof: an error", ERROR)
                    | {"mode": "markers+text", "text": names, "textposition": "bottom center"})
        data[-1]["marker"] |= {"symbol": "x", "size": 11}
    axis = {"type": "log", "exponentformat": "none", "dtick": 1}
    return {"data": data, "layout": {
        "height": 420, "margin": {"l": 62, "r": 16, "t": 12, "b": 52}, "showlegend": False, "hovermode": "closest",
        "xaxis": axis | {"title": {"text": "useful FLOP per byte"}}, "yaxis": axis | {"title": {"text": "useful GFLOP/s"}}}}


def works(plan: Plan) -> list[Work]:
    """The measured steps whose work is known."""
    counted = [(step, vars(step).get("flops", 0), vars(step).get("bytes", 0)) for step in plan.steps]
    return [Work(step.name, step.method, flops, moved, step.time_us) for step, flops, moved in counted
            if step.time_us and flops and moved]


@dataclass(frozen=True)
class _Bar:
    y: float
    time_us: float
    colour: str
    label: str
    hover: str
    quartiles_us: tuple[float, float] | None = None
    faint: bool = False


def _bars(bars: Sequence[_Bar], width: float, y_range: tuple[float, float], height: int, **layout: Any) -> Chart:
    """Horizontal bars with their labels behind them.  ``meta`` is for page.js, which leaves room for the labels."""
    trace: dict[str, Any] = {
        "type": "bar", "orientation": "h", "width": width, "x": [bar.time_us / 1e3 for bar in bars], "y": [bar.y for bar in bars],
        "marker": {"color": [bar.colour for bar in bars], "opacity": [0.45 if bar.faint else 1.0 for bar in bars]},
        "text": [bar.label for bar in bars], "textposition": "outside", "cliponaxis": False,
        "hovertext": [bar.hover for bar in bars], "hoverinfo": "text"}
    ends = [bar.quartiles_us or (bar.time_us, bar.time_us) for bar in bars]
    if any(bar.quartiles_us for bar in bars):
        trace["error_x"] = {"type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                            "array": [(high - bar.time_us) / 1e3 for bar, (_, high) in zip(bars, ends, strict=True)],
                            "arrayminus": [(bar.time_us - low) / 1e3 for bar, (low, _) in zip(bars, ends, strict=True)]}
    return {"data": [trace], "layout": {
        "height": height + _MARGIN_PX, "margin": {"l": 0, "r": 0, "t": _MARGIN_PX // 2, "b": _MARGIN_PX // 2},
        "showlegend": False, "xaxis": {"visible": False, "fixedrange": True},
        "yaxis": {"visible": False, "fixedrange": True, "range": list(reversed(y_range))},
        "meta": {"longest": max((high for _, high in ends), default=1.0) / 1e3}, **layout}}


def _points(works: Sequence[Work], name: str, colour: str) -> dict[str, Any]:
    return {"type": "scatter", "mode": "markers", "name": html.escape(name), "x": [work.intensity for work in works],
            "y": [work.gflops for work in works], "marker": {"color": colour, "size": 9}, "hoverinfo": "text",
            "hovertext": [f"{html.escape(work.name)}<br>{html.escape(work.method)}, {milliseconds(work.time_us)} ms<br>"
                          f"{work.gflops:.1f} GFLOP/s at {work.intensity:.1f} FLOP/byte" for work in works]}


def _layer_label(step: Step) -> str:
    label = f"{html.escape(step.method)} <b>{milliseconds(step.time_us or math.nan)} ms</b>"
    if step.method == "dense" or not step.dense_us or not step.time_us:
        return label
    return f"{label}  {step.dense_us / step.time_us:.2f}×"


def _layer_hover(step: Step) -> str:
    return f"{html.escape(step.name)}<br>{html.escape(step.method)}<br>{html.escape(_config(step.config))}".removesuffix("<br>")


def _config(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items())
