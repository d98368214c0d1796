"""The tables of trained networks, the goals, and the words that belong beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zeroskip.report.accuracy import Setting, Speed, Treatment, settings
from zeroskip.report.products import ratio_cell
from zeroskip.report.tables import CONTENDED, Table, milliseconds

NAMES = {"resnet18": "ResNet-18", "vgg19_bn": "VGG-19-BN"}
"""Those of Imagenette, which the goals are of."""
SEEDS = 3
"""That a claim is a mean of."""
EASY = (
    "Ten classes at 112 pixels are an easy task: these accuracies say how treatments compare with each other, and "
    "nothing here compares with ImageNet's."
)
ROWS = (
    "Means over the seeds; spread is best less worst seed, in points. Dense was trained as long as the pruned rows, "
    "parent is what all of them went on from. Files hold fp16 weights without their zeros, and the accuracy is that of "
    "the file run in fp32; its share is of four bytes for each weight of dense. What was not measured is left empty. "
    "A GPU adds in any order: two trainings of one row and seed differ by up to 1.1 points."
)
SPEEDS = (
    "Over the fastest way to run the dense row on the same machine in the same precision (where that was not timed: to "
    "run a row with masks with dense kernels, which take as long). Where there are zeros our engine counts; where "
    "filters were removed the network itself is smaller, and whatever runs it fastest counts. A speed is that of the "
    "row's network when it was measured: one that is trained again (see the commits of the records) has its zeros "
    "elsewhere, but as many."
)


def accuracy_table(rows: Sequence[Treatment]) -> Table:
    """Everything about each treatment; what was not measured is an empty cell."""
    known = settings(rows)
    # A column for the CPU and for the GPU, measured or not.
    columns: list[tuple[str, Setting | None]] = []
    memory: list[tuple[str, list[Setting]]] = []
    for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
        here = [setting for setting in known if setting.device == device]
        # What the table of times says too is left out of the heads.
        alone = len({setting.machine for setting in here}) == 1
        heads = [f"{name} {setting.short}" if alone else setting.label for setting in here]
        columns += [(f"speed-up, {head}", setting) for head, setting in zip(heads, here, strict=True)] or [
            (f"speed-up, {name}", None)
        ]
        # Hardly a matter of the machine: the first one that ran the row.
        first = [setting for setting in here if setting.short == here[0].short]
        memory.append((f"MB in memory, {name} {first[0].short}" if first else f"MB in memory, {name}", first))
    cells = [
        (
            NAMES.get(one.network, one.network),
            one.name,
            str(len(one.seeds)),
            f"{one.accuracy:.2%}",
            "one seed" if one.spread is None else f"{one.spread:.2f}",
            points_cell(one.below),
            megabytes(one.file_bytes),
            f"{one.file_share:.1%}",
            *(
                megabytes(_first(one.speeds[place].packed_bytes for place in places if place in one.speeds))
                for _, places in memory
            ),
            f"{one.nonzeros:,.0f}",
            f"{one.density:.1%}",
            f"{one.macs / 1e6:,.1f}",
            "" if one.macs_share is None else f"{one.macs_share:.1%}",
            *(speed_cell(one.speeds.get(place)) if place else "" for _, place in columns),
        )
        for one in rows
    ]
    head = (
        "network",
        "treatment",
        "seeds",
        "top-1",
        "spread",
        "points below dense",
        "MB of file",
        "of dense fp32",
        *(name for name, _ in memory),
        "nonzeros",
        "of weights",
        "million MACs left",
        "of dense",
        *(name for name, _ in columns),
    )
    return Table(head, tuple(cells), frozenset(range(2, len(head))))


def _first(values: Iterable[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


def times_table(rows: Sequence[Treatment]) -> Table:
    """What the speed-ups were taken from."""
    cells = [
        (
            NAMES.get(one.network, one.network),
            one.name,
            setting.label,
            _timing(speed.dense_us, speed.dense.method if speed.dense else ""),
            _timing(speed.time_us, speed.methods),
            speed_cell(speed),
        )
        for setting in settings(rows)
        for one in rows
        if (speed := one.speeds.get(setting))
    ]
    head = ("network", "treatment", "measured on", "dense row, ms", "this row, ms", "speed-up")
    return Table(head, tuple(cells), frozenset({3, 4, 5}))


def _timing(time_us: float | None, method: str) -> str:
    return "" if time_us is None else f"{milliseconds(time_us)} {method}"


def speed_cell(speed: Speed | None) -> str:
    """The speed-up, or that the machine was busy."""
    if speed is None:
        return ""
    return CONTENDED if speed.contended and speed.dense else ratio_cell(speed.speedup)


def points_cell(value: float | None) -> str:
    """Two decimals, and no minus before a zero."""
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}"


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.2f}"


# -- goals --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Goal:
    """At most so many points below dense, or percent of the dense file."""

    network: str
    row: str
    wanted: float | None
    hoped: float | None = None
    share: bool = False
    """Of the file, instead of points."""

    @property
    def text(self) -> str:
        return f"{NAMES[self.network]}, {self.row}: {'file, % of dense fp32' if self.share else 'points below dense'}"

    def reached(self, one: Treatment | None) -> float | None:
        if one is None:
            return None
        return 100 * one.file_share if self.share else one.below

    def verdict(self, value: float | None, seeds: int) -> str:
        """Of fewer than three seeds only how many there are."""
        if value is None:
            return ""
        if seeds < SEEDS:
            return f"{seeds} of {SEEDS} seeds"
        value = round(value, 6)  # 0.975 - 0.965 is a little more than a point
        if self.hoped is not None and value <= self.hoped:
            return "hoped for"
        return "wanted" if self.wanted is not None and value <= self.wanted else "missed"


GOALS = (
    Goal("resnet18", "unstructured-90", 1.0, 0.3),
    Goal("vgg19_bn", "unstructured-90", 1.0, 0.3),
    Goal("resnet18", "unstructured-90-fisher", 1.0, 0.3),
    Goal("vgg19_bn", "unstructured-90-fisher", 1.0, 0.3),
    Goal("resnet18", "unstructured-95", None, 1.0),
    Goal("vgg19_bn", "unstructured-95", None, 1.0),
    Goal("resnet18", "unstructured-95-fisher", None, 1.0),
    Goal("vgg19_bn", "unstructured-95-fisher", None, 1.0),
    Goal("resnet18", "2of4", 0.5),
    Goal("vgg19_bn", "2of4", 0.5),
    Goal("resnet18", "unstructured-90", 15.0, 8.0, share=True),
)


def goals_table(rows: Sequence[Treatment]) -> Table:
    """What was wanted on Imagenette, and the mean over seeds of what there is; no row if the networks are others."""
    found = {(one.network, one.name): one for one in rows}
    cells = []
    for goal in GOALS if any(one.network in NAMES for one in rows) else ():
        one = found.get((goal.network, goal.row))
        value = goal.reached(one)
        seeds = min(len(one.seeds), SEEDS if goal.share else len(one.dense)) if one else 0
        limits = ("" if limit is None else f"{limit:g}" for limit in (goal.wanted, goal.hoped))
        cells.append((goal.text, *limits, points_cell(value), goal.verdict(value, seeds)))
    return Table(("", "at most", "hoped for", "reached", "met"), tuple(cells), frozenset({1, 2, 3}))
