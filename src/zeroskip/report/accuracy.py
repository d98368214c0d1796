"""Trained networks beside their speed: a row for each network and treatment.

Dense is the row "dense", which was trained as long as the pruned ones, and not what all of them started from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zeroskip.core.errors import FileFormatError
from zeroskip.core.record import Record
from zeroskip.pruning import Trained, TrainedFile
from zeroskip.report.products import geometric_mean, ratio
from zeroskip.report.records import RecordFile
from zeroskip.report.tables import BASELINES, Comparison, column_rank, compare

Side = Literal["left", "right", "top", "bottom"]
DENSE, PARENT = "dense", "parent"
ENGINE = "zeroskip"
WEIGHT_BYTES = 4
"""Of dense fp32.  Batch norm is not counted, so that the share of a file is rather too large than too small."""
_EXPECTED = "expected the trained.jsonl that python -m tools.train writes"


def read_trained(paths: Iterable[Path | str]) -> tuple[Trained, ...]:
    """The networks of all files; of one that is in several files, the last.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: a file holds something else or nothing, or rows of one network were trained with different
            settings, so that its dense row is no fair opponent.
    """
    rows: dict[tuple[str, str, int], Trained] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file, {_EXPECTED}")
        try:
            found = TrainedFile(path).rows
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path}: got bytes that are no text, {_EXPECTED}") from error
        if not found:
            raise FileFormatError(f"{path}: holds no trained network, {_EXPECTED}")
        rows |= {row.key: row for row in found}
    first: dict[str, Trained] = {}
    for row in rows.values():
        other = first.setdefault(row.network, row)
        if other.settings != row.settings:
            names = sorted(
                name for name in {*other.settings, *row.settings} if other.settings.get(name) != row.settings.get(name)
            )
            raise FileFormatError(
                f"{row.network}: {other.row} (seed {other.seed}) and {row.row} (seed {row.seed}) were trained with "
                f"different {', '.join(names)}, so they do not compare: report them apart"
            )
    return tuple(rows.values())


@dataclass(frozen=True)
class Setting:
    """What networks were timed on; times compare within one of these."""

    machine: str
    device: str
    threads: int
    """0 on a GPU."""
    precision: str
    batch: int
    image: tuple[int, ...]

    @classmethod
    def of(cls, case: Mapping[str, Any], machine: str) -> Setting:
        device = str(case.get("device", "cpu"))
        threads = int(case.get("threads", 1)) if device == "cpu" else 0
        image = tuple(case.get("image", ()))
        return cls(machine, device, threads, str(case.get("precision", "fp32")), int(case.get("batch", 1)), image)

    @property
    def label(self) -> str:
        return f"{self.machine}, {self.short}"

    @property
    def short(self) -> str:
        """Without the machine."""
        parts = [self.precision]
        parts += [f"{self.threads} thread{'s' * (self.threads != 1)}"] if self.threads else []
        parts += [f"batch {self.batch}"]
        return ", ".join(parts) + (f" @{'x'.join(map(str, self.image[1:]))}" if self.image else "")

    @property
    def rank(self) -> tuple[object, ...]:
        """The CPU first, then by machine, one image before many, fp32 before less."""
        return self.device, self.machine, self.threads, self.batch, column_rank(self.precision), self.image


@dataclass(frozen=True)
class Speed:
    """Of one treatment in one setting."""

    ours: tuple[Record, ...]
    """The fastest of each measured seed: among methods that skip zeros where there are masks, else among all."""
    dense: Record | None
    """The fastest way to run the network's dense row; where that was not timed, of what skips no zeros the fastest on
    its rows with masks, whose layers have the same shapes."""
    packed_bytes: float | None
    """Of the weights in memory, as our engine holds them."""

    @property
    def methods(self) -> str:
        return ", ".join(dict.fromkeys(record.method for record in self.ours))

    @property
    def time_us(self) -> float | None:
        return geometric_mean(_us(record) for record in self.ours)

    @property
    def dense_us(self) -> float | None:
        return _us(self.dense)

    @property
    def contended(self) -> bool:
        return any(record.contended for record in (*self.ours, *([self.dense] if self.dense else [])))

    @property
    def speedup(self) -> float | None:
        """Over dense; None without dense, and where a machine was busy."""
        return None if self.contended else ratio(self.dense_us, self.time_us)


@dataclass(frozen=True)
class Treatment:
    """One network after one treatment.  Means are over its seeds; shares and ``below`` refer to the dense row, and are
    None without one."""

    seeds: tuple[Trained, ...]
    dense: tuple[Trained, ...]
    speeds: dict[Setting, Speed] = field(default_factory=dict)

    @property
    def network(self) -> str:
        return self.seeds[0].network

    @property
    def name(self) -> str:
        """Of the treatment."""
        return self.seeds[0].row

    @property
    def label(self) -> str:
        """The name in a picture: of single weights only how many went."""
        pruning = self.seeds[0].pruning
        if not self.masked or pruning.pattern != "unstructured":
            return self.name
        return f"{pruning.final_sparsity:.0%}" + (f" {pruning.score}" if pruning.score != "magnitude" else "")

    @property
    def masked(self) -> bool:
        """Whether it has zeros to skip; without filters a network is only smaller."""
        return _masked(self.seeds[0])

    @property
    def accuracy(self) -> float:
        return _mean(self.seeds, lambda one: one.accuracy)

    @property
    def spread(self) -> float | None:
        """Best less worst seed, in points; None of one seed."""
        found = [one.accuracy for one in self.seeds]
        return 100 * (max(found) - min(found)) if len(found) > 1 else None

    @property
    def below(self) -> float | None:
        """Points that dense is better by."""
        return 100 * (_mean(self.dense, lambda one: one.accuracy) - self.accuracy) if self.dense else None

    @property
    def file_bytes(self) -> float:
        return _mean(self.seeds, lambda one: one.file_bytes)

    @property
    def file_share(self) -> float:
        """Of the bytes of all weights, the removed ones too, in dense fp32."""
        return self.file_bytes / (WEIGHT_BYTES * sum(layer.numel for layer in self.seeds[0].layers.layers))

    @property
    def nonzeros(self) -> float:
        return _mean(self.seeds, lambda one: sum(layer.nnz for layer in one.layers.layers))

    @property
    def density(self) -> float:
        return _mean(self.seeds, lambda one: one.layers.density)

    @property
    def macs(self) -> float:
        return _mean(self.seeds, lambda one: one.macs)

    @property
    def macs_share(self) -> float | None:
        return self.macs / _mean(self.dense, lambda one: one.macs) if self.dense else None


def treatments(trained: Iterable[Trained], file: RecordFile | None = None) -> list[Treatment]:
    """One for each network and row: dense first, then pattern by pattern, fewer zeros before more.

    Args:
        file: where the speeds are looked for, as cases whose mask is "trained:NETWORK-ROW-sSEED.safetensors".
    """
    groups: dict[tuple[str, str], list[Trained]] = {}
    for one in trained:
        groups.setdefault((one.network, one.row), []).append(one)
    timed = _timed([one for group in groups.values() for one in group], file)
    found = []
    for (network, _), group in groups.items():
        bare = Treatment(tuple(group), tuple(groups.get((network, DENSE), ())))
        masked = [row.key for other in groups.values() for row in other if row.network == network and _masked(row)]
        speeds = {
            setting: speed
            for setting, cases in sorted(timed.items(), key=lambda item: item[0].rank)
            if (speed := _speed(bare, cases, masked))
        }
        found.append(Treatment(bare.seeds, bare.dense, speeds))
    networks = list(dict.fromkeys(one.network for one in found))
    patterns = list(dict.fromkeys(one.seeds[0].pruning.pattern for one in found))

    def place(one: Treatment) -> tuple[object, ...]:
        pruning = one.seeds[0].pruning
        special = (PARENT, DENSE).index(one.name) if one.name in (PARENT, DENSE) else 2
        return networks.index(one.network), special, patterns.index(pruning.pattern), pruning.final_sparsity, one.name

    return sorted(found, key=place)


Key = tuple[str, str, int]
_Timed = dict[Key, Comparison]


def _timed(trained: Sequence[Trained], file: RecordFile | None) -> dict[Setting, _Timed]:
    """The last measurement of each trained network."""
    keys = {f"{one.network}-{one.row}-s{one.seed}": one.key for one in trained}
    found: dict[Setting, _Timed] = {}
    for item in compare(file.records) if file else ():
        kind, _, name = str(item.case.get("mask", "")).partition(":")
        key = keys.get(Path(name.partition(":")[0]).stem)
        if file and item.case.get("kind") == "model" and kind == "trained" and key and item.times:
            found.setdefault(Setting.of(item.case, _machine(file.environments[item.environment])), {})[key] = item
    return found


def _machine(facts: Mapping[str, Any]) -> str:
    """A CPU with its instructions: one name is given to several generations."""
    parts = [facts.get("device"), facts.get("torch_cpu") if facts.get("kind") == "cpu" else None]
    return ", ".join(str(part) for part in parts if part)


def _speed(one: Treatment, timed: _Timed, masked: Collection[Key]) -> Speed | None:
    items = [timed[row.key] for row in one.seeds if row.key in timed]
    ours = [_fastest([item], lambda method: not (one.masked and method in BASELINES)) for item in items]
    if not (known := tuple([record for record in ours if record is not None])):
        return None
    # A dense network has no zeros to skip, so everything that runs it is dense.
    dense = _fastest([timed[row.key] for row in one.dense if row.key in timed], lambda method: True) or _fastest(
        [timed[key] for key in masked if key in timed], BASELINES.__contains__
    )
    packed = [
        item.records[ENGINE].setup["packed_bytes"]
        for item in items
        if ENGINE in item.times and "packed_bytes" in item.records[ENGINE].setup
    ]
    return Speed(known, dense, sum(packed) / len(packed) if packed else None)


def _masked(one: Trained) -> bool:
    return one.pruning.pattern != "filters" and one.pruning.final_sparsity > 0


def _fastest(items: Iterable[Comparison], wanted: Callable[[str], bool]) -> Record | None:
    found = [item.records[method] for item in items for method in item.times if wanted(method)]
    return min(found, key=lambda record: _us(record) or 0.0, default=None)


def _us(record: Record | None) -> float | None:
    return None if record is None or record.times is None else record.times.median_us


def _mean(seeds: Sequence[Trained], value: Callable[[Trained], float]) -> float:
    return sum(map(value, seeds)) / len(seeds)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (speed-up, accuracy) those that no other is both as fast and as accurate as; slowest first."""
    found: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found[::-1]


@dataclass(frozen=True)
class Pareto:
    """Accuracy over speed-up, in one setting."""

    setting: Setting
    networks: dict[str, list[Treatment]]
    """Those whose speed-up is known."""

    def points(self, network: str) -> list[tuple[float, float]]:
        """Speed-up over dense, and accuracy in percent."""
        return [(one.speeds[self.setting].speedup or 0.0, 100 * one.accuracy) for one in self.networks[network]]

    def sides(self, network: str) -> list[Side]:
        """Where the name of each point goes, as points lie close together around dense."""
        points = self.points(network)
        best = front(points)
        below: Iterator[Side] = itertools.cycle(("right", "bottom"))
        return [
            "left" if one.name == DENSE else "top" if point in best else next(below)
            for one, point in zip(self.networks[network], points, strict=True)
        ]


def paretos(rows: Sequence[Treatment]) -> list[Pareto]:
    """One for each setting in which something beside dense was compared with it."""
    found = []
    for setting in settings(rows):
        networks: dict[str, list[Treatment]] = {}
        for one in rows:
            if one.name != PARENT and setting in one.speeds and one.speeds[setting].speedup:
                networks.setdefault(one.network, []).append(one)
        if any(one.name != DENSE for group in networks.values() for one in group):
            found.append(Pareto(setting, networks))
    return found


def settings(rows: Iterable[Treatment]) -> list[Setting]:
    """All in which anything was timed."""
    return sorted({setting for one in rows for setting in one.speeds}, key=lambda setting: setting.rank)
