"""Pictures for the README: SVG, the same bytes from the same records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zeroskip.core.errors import Unsupported
from zeroskip.core.record import Record
from zeroskip.report.palette import colours
from zeroskip.report.tables import BASELINES, Comparison, compare, duration, quartiles_us

_STYLE: Any = {"svg.hashsalt": "zeroskip", "font.size": 9.5, "font.family": "DejaVu Sans"}
_WIDTH_IN, _BAR_IN, _CASE_IN, _TITLE_IN = 7.6, 0.21, 0.36, 0.42
_LABEL_SHARE = 0.42
"""Of the width, kept free behind the longest bar."""


def bars(records: Iterable[Record], path: Path | str, title: str) -> None:
    """One group a case, one bar a method, each case to its own scale: time with its quartiles, and the speed-up.

    Raises:
        Unsupported: Matplotlib is not installed.
        ValueError: no record holds a time.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported("figures need Matplotlib, which is not installed: pip install 'zeroskip[report]'") from error
    comparisons = [comparison for comparison in compare(records) if comparison.times]
    if not comparisons:
        raise ValueError("no record holds a time, so there is nothing to draw: pass records with status OK")
    known = colours(method for comparison in comparisons for method in comparison.times)
    sizes = [_BAR_IN * len(comparison.times) for comparison in comparisons]
    height = _TITLE_IN + sum(size + _CASE_IN for size in sizes)
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, height), facecolor="white")
        figure.text(
            0.02, 1 - 0.5 * _TITLE_IN / height, title, fontsize=12, fontweight="bold", va="center", parse_math=False
        )
        bottom = height - _TITLE_IN
        for comparison, size in zip(comparisons, sizes, strict=True):
            bottom -= size + _CASE_IN
            _draw(figure.add_axes((0.02, (bottom + _CASE_IN / 3) / height, 0.96, size / height)), comparison, known)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw(axes: Any, comparison: Comparison, known: Mapping[str, str]) -> None:
    times = comparison.times
    longest = max(quartiles_us(item)[1] for item in times.values())
    for index, (method, item) in enumerate(times.items()):
        median, (low, high) = item.median_us, quartiles_us(item)
        axes.barh(
            index,
            median,
            0.72,
            color=known[method],
            xerr=[[median - low], [high - median]],
            error_kw={"elinewidth": 0.9, "capsize": 2, "ecolor": "#444444"},
        )
        verdict = comparison.verdict(comparison.records[method])
        label = f"{method}  {duration(median)}{f'  {verdict}' if verdict != '-' else ''}"
        axes.text(
            high + 0.01 * longest,
            index,
            label,
            va="center",
            parse_math=False,
            fontweight="normal" if method in BASELINES else "bold",
        )
    axes.set_title(comparison.label, loc="left", fontsize=9.5, fontweight="bold", pad=3, parse_math=False)
    axes.set(xlim=(0, longest / (1 - _LABEL_SHARE)), ylim=(len(times) - 0.5, -0.5))
    axes.set_axis_off()
