"""The plan as a strip of steps in the order they run, each as wide as its time."""

from __future__ import annotations

from collections.abc import Mapping

from zeroskip.plan.plan import Plan, Step
from zeroskip.report.html import Html, empty, join, tag
from zeroskip.report.palette import ink_on
from zeroskip.report.tables import milliseconds

_ROW_PX, _GAP_PX = 44, 26
_LETTER_SHARE = 0.63
"""Per cent of a full-width strip that a letter takes: a step shows its name where that fits."""


def strip(plan: Plan, colours: Mapping[str, str]) -> Html:
    """Inline SVG: the plan above, the same steps with dense kernels below, both to one scale.

    Horizontal places are per cents, so the strip fills any width and its text keeps its size.  Steps without a time
    are left out.
    """
    steps = [step for step in plan.steps if step.time_us is not None]
    chosen = [(step, step.time_us or 0.0, step.method) for step in steps]
    dense = [(step, step.dense_us or step.time_us or 0.0, "dense") for step in steps]
    full = max(sum(time for _, time, _ in row) for row in (chosen, dense)) or 1.0
    parts = [_row(chosen, full, 0, "as planned", colours)]
    parts.append(_row(dense, full, _ROW_PX + _GAP_PX, "every step dense", colours))
    height = str(2 * (_ROW_PX + _GAP_PX))
    return tag(
        "svg", *parts, class_="strip", width="100%", height=height, role="img", aria_label="Steps of the plan in order"
    )


def _row(items: list[tuple[Step, float, str]], full: float, top: int, title: str, colours: Mapping[str, str]) -> Html:
    start, parts = 0.0, []
    for step, time_us, method in items:
        width = 100 * time_us / full
        parts.append(_step(step, time_us, method, start, width, top, colours[method]))
        start += width
    total = milliseconds(sum(time for _, time, _ in items))
    caption = tag("text", f"{title}: {total} ms", x="0", y=str(top + _ROW_PX + 17), class_="strip-caption")
    return join([*parts, caption])


def _step(step: Step, time_us: float, method: str, start: float, width: float, top: int, colour: str) -> Html:
    parts = [
        tag("title", f"{step.name}, {step.layer}: {method} {milliseconds(time_us)} ms"),
        empty("rect", width="100%", height="100%", fill=colour, class_="strip-step"),
    ]
    if width >= _LETTER_SHARE * (len(step.name) + 2):
        parts.append(tag("text", step.name, x="6", y=str(_ROW_PX // 2 + 4), fill=ink_on(colour)))
    # A nested svg clips the name at the step's edge.
    return tag("svg", *parts, x=f"{start:.3f}%", y=str(top), width=f"{width:.3f}%", height=str(_ROW_PX))
