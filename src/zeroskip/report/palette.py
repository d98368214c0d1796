"""One colour for one method, on every picture of a page."""

from __future__ import annotations

from collections.abc import Iterable

from zeroskip.report.tables import BASELINES, ordered

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")
"""Of methods that skip zeros; told apart with any colour vision.

Source: Okabe and Ito, Color Universal Design, 2008.
"""
GREYS = (
    *("#A6A6A6", "#919191", "#BDBDBD", "#7D7D7D", "#B3B3B3", "#888888", "#9C9C9C", "#C6C6C6"),
    *("#828282", "#ADADAD", "#8D8D8D", "#C1C1C1", "#979797"),
)
"""Of methods that skip nothing: grey is dense, colour is sparse."""
ERROR = "#D55E00"
"""The palette's vermillion, kept for what must not be overlooked."""
_DARK, _LIGHT = "#16181D", "#FFFFFF"


def colours(methods: Iterable[str]) -> dict[str, str]:
    """A colour for each method, stable for a given order of methods."""
    known = ordered(methods)
    sparse = [method for method in known if method not in BASELINES]
    result = {method: GREYS[BASELINES.index(method)] for method in known if method in BASELINES}
    return result | {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(sparse)}


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on ``colour`` ("#RRGGBB").

    Source: WCAG 2.2, relative luminance; 0.3 is a little above the point of equal contrast.
    """
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _DARK if luminance > 0.3 else _LIGHT
