"""The parts of the page, each a function from records to HTML."""

from __future__ import annotations

import base64
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from zeroskip.core.jsonable import to_json
from zeroskip.plan.plan import Confirmation, Plan, Rejection, Step
from zeroskip.pruning import Trained
from zeroskip.report import charts
from zeroskip.report.accuracy import Treatment, paretos
from zeroskip.report.accuracy_tables import EASY, ROWS, SPEEDS, accuracy_table, goals_table, times_table
from zeroskip.report.html import VOID, Html, empty, join, tag
from zeroskip.report.palette import colours as palette
from zeroskip.report.plausible import peak_tflops
from zeroskip.report.records import RecordFile
from zeroskip.report.strip import strip
from zeroskip.report.tables import Table, compare, milliseconds, ordered, table

Colours = Mapping[str, str]


def section(title: str, lead: str, *content: str) -> Html:
    """A heading, a sentence on how to read what follows, and that."""
    return tag("section", tag("h2", title), tag("p", lead, class_="lead"), *content)


def headline(plan: Plan) -> Html:
    """The whole model against torch, and the machine."""
    notes = (tag("p", note, class_="note") for note in plan.notes)
    return tag("section", _verdict(plan), _facts(_machine(plan)), *notes, class_="headline")


def _verdict(plan: Plan) -> Html:
    found = plan.confirmation
    if found is None:
        return tag(
            "div",
            tag("p", "Not confirmed", class_="ratio words"),
            tag("p", "This plan holds no measurement of the whole model, so it claims no speed-up.", class_="lead"),
        )
    if found.contended:
        return tag(
            "div",
            tag("p", "No ratio", class_="ratio words"),
            tag(
                "p",
                "The machine was busy with other work while the whole model was measured, so these times "
                "are not to be compared. Measure again on a quiet machine.",
                class_="lead",
            ),
            _totals(found),
        )
    zeros, rest = found.dense_engine_us / found.engine_us, found.torch_us / found.dense_engine_us
    return tag(
        "div",
        tag("p", f"{found.speedup:.2f}×", class_="ratio"),
        tag(
            "p",
            "the speed of torch: ",
            tag("strong", f"{zeros:.2f}×"),
            " from skipping zeros, ",
            tag("strong", f"{rest:.2f}×"),
            " from fusion and the rewritten graph.",
            class_="lead",
        ),
        _totals(found),
    )


def _totals(found: Confirmation) -> Html:
    rows = (
        ("torch", found.torch_us, "torch"),
        ("zeroskip, dense kernels only", found.dense_engine_us, "dense"),
        ("zeroskip", found.engine_us, "zeroskip"),
    )
    longest = max(time for _, time, _ in rows)
    return tag(
        "div",
        *(
            tag(
                "div",
                tag("span", name),
                tag("span", f"{milliseconds(time)} ms", class_="number"),
                tag("i", style=f"width:{100 * time / longest:.2f}%"),
                class_=f"total {kind}",
            )
            for name, time, kind in rows
        ),
        class_="totals",
    )


def _machine(plan: Plan) -> dict[str, str]:
    device = plan.device
    facts = {"machine": device.name}
    if device.kind == "cpu":
        facts |= {
            "threads": str(device.threads),
            "vectors": f"{device.vector_floats} floats",
            "caches": f"L1 {device.l1_bytes // 1024} KiB, L2 {device.l2_bytes // 1024} KiB",
        }
    else:
        facts |= {
            "architecture": f"{device.arch}, {device.num_sms} multiprocessors",
            "caches": f"L2 {device.l2_bytes // 2**20} MiB",
        }
    facts |= {
        "precision": plan.precision,
        "inputs": ", ".join(" × ".join(map(str, shape)) for shape in plan.input_shapes),
    }
    if (peak := _peak_gflops(plan)) and device.bandwidth_gbps:
        facts["peaks"] = f"{peak:,.0f} GFLOP/s, {device.bandwidth_gbps:,.1f} GB/s"
    facts["planned in"] = f"{plan.tune_seconds:.1f} s"
    if plan.confirmation:
        facts["whole model"] = f"medians of {plan.confirmation.rounds} interleaved rounds"
    return facts | {"versions": ", ".join(f"{name} {version}" for name, version in plan.versions.items())}


def _peak_gflops(plan: Plan) -> float:
    """Of the fastest of the plan's precisions; 0 where it was not measured."""
    return max(peak_tflops(plan.device, name) for name in plan.precision.split("/")) * 1e3


def _facts(facts: Mapping[str, str]) -> Html:
    rows = (tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items() if value)
    return tag("dl", *rows, class_="card")


def pictures(images: Sequence[tuple[str, bytes]]) -> Html:
    """PNG images side by side with their captions."""
    shown = (
        tag(
            "figure",
            empty("img", src=f"data:image/png;base64,{base64.b64encode(png).decode()}", alt=caption),
            tag("figcaption", caption),
        )
        for caption, png in images
    )
    return tag("section", tag("div", *shown, class_="pictures"))


def layers(plan: Plan, colours: Colours) -> Html:
    """Per-layer bars with a legend."""
    return section(
        "Layers",
        "Time of every step with the method that was chosen for it, above the same step run "
        "dense. Point at a bar for its configuration.",
        _methods(plan, colours),
        chart(charts.layer_bars(plan, colours)),
    )


def plan_table(plan: Plan) -> Html:
    """Every step, and why not the other methods."""
    head = ("layer", "shape", "zeros", "method", "ms", "dense ms", "speed-up", "why", "not chosen")
    rows = [
        (
            tag("th", step.name, scope="row"),
            tag("td", step.layer, class_="nowrap"),
            _number(f"{1 - step.density:.0%}"),
            tag("td", step.method),
            _number(_ms(step.time_us)),
            _number(_ms(step.dense_us)),
            _number(_speedup(step)),
            tag("td", step.why, class_="wide"),
            tag("td", *map(_rejection, step.rejected), class_="wide"),
        )
        for step in plan.steps
    ]
    return section(
        "Plan",
        "What runs each step, and what every other method lost by or was refused for.",
        _html_table(head, rows, numbers=(2, 4, 5, 6)),
    )


def _rejection(item: Rejection) -> Html:
    lost = "" if item.time_us is None else f"{milliseconds(item.time_us)} ms"
    reason = item.reason if item.reason != item.method else ""
    return tag("div", tag("b", item.method), f" {', '.join(part for part in (lost, reason) if part)}")


def _ms(time_us: float | None) -> str:
    return "–" if time_us is None else milliseconds(time_us)


def _speedup(step: Step) -> str:
    return f"{step.dense_us / step.time_us:.2f}×" if step.dense_us and step.time_us else "–"


def graph(plan: Plan, colours: Colours) -> Html:
    """The strip of steps."""
    return section(
        "Steps in order",
        "The network from its first step to its last, each as wide as its time; below, at "
        "the same scale, with dense kernels. What no step covers runs in torch and is not drawn.",
        _methods(plan, colours),
        strip(plan, colours),
    )


def roofline(plan: Plan, colours: Colours) -> Html:
    """Nothing where the plan does not say how much work its steps are."""
    works = charts.works(plan)
    if not works:
        return VOID
    # A GPU's layers are tuned with their tensors in the L2 cache.
    peaks = _peak_gflops(plan), plan.device.l2_gbps or plan.device.bandwidth_gbps
    wrong = charts.above_roof(works, *peaks)
    known = "under this machine's measured peaks" if all(peaks) else "without a roof, as the peaks were not measured"
    content = [legend([work.method for work in works], colours), chart(charts.roofline(works, *peaks, colours))]
    if wrong:
        text = f"Error: above the roof, so a time, a count or a peak is wrong: {', '.join(work.name for work in wrong)}"
        content.insert(0, tag("p", text, class_="error"))
    return section("Roofline", f"Arithmetic on nonzero weights only, {known}.", *content)


def measurements(file: RecordFile, colours: Colours) -> Html:
    """The records as a table and as bars, with the machines they were taken on."""
    figures = (
        tag("figure", tag("figcaption", comparison.label), chart(charts.case_bars(comparison, colours)))
        for comparison in compare(file.records)
        if comparison.times
    )
    return section(
        "Measurements",
        "Medians, ± half the interquartile range. The speed-up is over the fastest method "
        "that skips no zero on the same case.",
        legend((record.method for record in file.records), colours),
        tag("div", *figures, class_="cases"),
        _cells(table(file.records)),
        *(_facts(_flat(facts)) for facts in file.environments.values()),
    )


def accuracy(rows: Sequence[Treatment]) -> Html:
    """Trained networks: accuracy over speed-up, everything about each treatment, and what was wanted."""
    known = palette(one.network for one in rows)
    figures = [
        tag("figure", tag("figcaption", found.setting.label), chart(charts.pareto(found, known)))
        for found in paretos(rows)
    ]
    goals, times = goals_table(rows), times_table(rows)
    content: list[str] = []
    if figures:
        lead = "Up and to the right is better. The dotted line joins the treatments that no other of the network beats."
        content += [tag("p", lead, class_="lead"), legend(known, known), *figures]
    parts = [section("Accuracy and speed", ROWS, *content, _cells(accuracy_table(rows)))]
    parts += [section("Wanted and reached", f"The mean of three seeds. {EASY}", _cells(goals))] if goals.rows else []
    parts += [section("What the speed-ups are of", SPEEDS, _cells(times))] if times.rows else []
    return join(parts)


def _cells(cells: Table) -> Html:
    """A table of text; the first cell of a row is its heading."""
    rows = [
        (
            tag("th", row[0], scope="row"),
            *(
                _number(cell) if column in cells.numbers else tag("td", cell, class_="nowrap")
                for column, cell in enumerate(row[1:], 1)
            ),
        )
        for row in cells.rows
    ]
    return _html_table(cells.head, rows, numbers=cells.numbers)


def _flat(facts: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else str(value)
        for key, value in facts.items()
    }


def raw(plan: Plan | None, file: RecordFile | None, trained: Sequence[Trained] = ()) -> Html:
    """Everything the page was made from, folded away."""
    parts = [("Plan as JSON", to_json(plan))] if plan else []
    parts += [("Records as JSON", to_json(file))] if file else []
    parts += [("Trained networks as JSON", to_json(list(trained)))] if trained else []
    texts = [(title, json.dumps(data, indent=1, ensure_ascii=False)) for title, data in parts]
    return tag("section", *(tag("details", tag("summary", title), tag("pre", text)) for title, text in texts))


def _methods(plan: Plan, colours: Colours) -> Html:
    return legend(["dense", *(step.method for step in plan.steps)], colours)


def legend(methods: Iterable[str], colours: Colours) -> Html:
    """A patch of colour and a name for each method."""
    items = (tag("li", tag("i", style=f"background:{colours[method]}"), method) for method in ordered(methods))
    return tag("ul", *items, class_="legend")


def chart(figure: charts.Chart) -> Html:
    """A place that page.js draws ``figure`` in."""
    # "<" would let a name end the script element early.
    data = Html(json.dumps(figure, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c"))
    height = f"height:{figure['layout']['height']}px"
    return tag("div", tag("script", data, type="application/json"), class_="chart", style=height)


def _number(text: str) -> Html:
    return tag("td", text, class_="number")


def _html_table(head: Sequence[str], rows: Iterable[Iterable[Html]], numbers: Container[int]) -> Html:
    heads = (
        tag("th", name, scope="col", class_="number" if column in numbers else "text")
        for column, name in enumerate(head)
    )
    body = tag("tbody", *(tag("tr", *row) for row in rows))
    return tag("div", tag("table", tag("thead", tag("tr", *heads)), body), class_="scroll")
