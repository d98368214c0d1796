"""The decision record: printable, readable back, and enough to build the same engine again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeroskip.core.device import Device
from zeroskip.core.errors import FileFormatError
from zeroskip.core.jsonable import from_json, to_json


@dataclass(frozen=True)
class Rejection:
    """A method that was not chosen for a step: the reason, or the time it lost by."""

    method: str
    reason: str
    time_us: float | None = None


@dataclass(frozen=True)
class Step:
    """One segment and what runs it.  Nodes of the graph that no step covers run in torch, unchanged."""

    nodes: tuple[str, ...]
    layer: str
    """What it is, for people: "128->128 3x3 @28x28 n1"."""
    density: float
    method: str
    config: dict[str, Any]
    why: str
    time_us: float | None = None
    dense_us: float | None = None
    floor_us: float = 0.0
    flops: int = 0
    """Useful operations: those of nonzero weights."""
    bytes: int = 0
    pack_seconds: float = 0.0
    build_seconds: float = 0.0
    packed_bytes: int = 0
    rejected: tuple[Rejection, ...] = ()
    estimated_build_seconds: float = 0.0
    """Of one core, as the method expected; ``build_seconds`` are what it took here, with a full cache nothing."""

    @property
    def name(self) -> str:
        return self.nodes[0] if len(self.nodes) == 1 else f"{self.nodes[0]}..{self.nodes[-1]}"


@dataclass(frozen=True)
class Confirmation:
    """The whole engine against the whole torch model, run in turns in one process (medians, microseconds)."""

    engine_us: float
    dense_engine_us: float
    """The same engine with dense kernels only: what graph rewriting and fusion gain without any zero skipped."""
    torch_us: float
    """The better of the contiguous and the channels_last torch model."""
    rounds: int
    contended: bool

    @property
    def speedup(self) -> float:
        return self.torch_us / self.engine_us


@dataclass(frozen=True)
class Plan:
    """Everything decided for one model on one device for one set of input shapes."""

    device: Device
    precision: str
    """Of its layers; several are joined by a slash."""
    input_shapes: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    weights_hash: str
    versions: dict[str, str]
    confirmation: Confirmation | None = None
    tune_seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())

    def step(self, name: str) -> Step:
        """The step that covers node ``name``; raises ``KeyError`` where torch runs it."""
        for step in self.steps:
            if name in step.nodes:
                return step
        raise KeyError(f"no step of this plan covers {name!r}; its steps are {[step.name for step in self.steps]}")

    def to_json(self) -> str:
        """The plan as a JSON document; ``Plan.read`` reads it back from a file."""
        return json.dumps(to_json(self), indent=1)

    @staticmethod
    def read(path: str | Path) -> Plan:
        """The plan in a file that holds ``to_json``'s text; ``FileFormatError`` where it holds something else."""
        try:
            return from_json(Plan, json.loads(Path(path).read_text()))
        except FileFormatError as error:
            raise FileFormatError(f"{path}: {error}") from error
        except ValueError as error:
            raise FileFormatError(f"{path} is no JSON: {error}; expected a plan as zeroskip writes it") from error

    def __str__(self) -> str:
        head = ("layer", "shape", "zeros", "method", "ms", "dense ms", "speed-up", "why, and why not the others")
        rows = [head]
        for step in self.steps:
            others = "; ".join(_rejection(item) for item in step.rejected)
            rows.append(
                (
                    step.name,
                    step.layer,
                    f"{1 - step.density:.0%}",
                    step.method,
                    _ms(step.time_us),
                    _ms(step.dense_us),
                    _ratio(step.dense_us, step.time_us),
                    f"{step.why}{' | ' if others else ''}{others}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(len(line) for line in lines[:1]))
        return "\n".join([*lines, "", *self.summary()])

    @property
    def machine(self) -> str:
        """What it runs on and how, for people: "a CPU (8 cores), 2 threads, fp32"."""
        threads = f", {self.device.threads} thread{'s' * (self.device.threads != 1)}"
        return f"{self.device.name}{threads if self.device.kind == 'cpu' else ''}, {self.precision}"

    def summary(self) -> list[str]:
        """The verdict in a few lines."""
        lines = [
            f"{self.machine}, "
            f"inputs {', '.join('x'.join(map(str, shape)) for shape in self.input_shapes)}, "
            f"planned in {self.tune_seconds:.1f} s"
        ]
        if found := self.confirmation:
            zeros = found.dense_engine_us / found.engine_us
            ratios = f"{found.speedup:.2f}x over torch, of which zeros {zeros:.2f}x"
            lines.append(
                f"whole model: {_ms(found.engine_us)} ms; dense engine {_ms(found.dense_engine_us)} ms; "
                f"torch {_ms(found.torch_us)} ms; {'the machine was busy: no ratio' if found.contended else ratios}"
            )
        return [*lines, *self.notes]


def _rejection(item: Rejection) -> str:
    return f"{item.method}: {item.reason}" if item.time_us is None else f"{item.method} {item.time_us / 1e3:.3f} ms"


def _ms(time_us: float | None) -> str:
    return "-" if time_us is None else f"{time_us / 1e3:.3f}"


def _ratio(dense_us: float | None, time_us: float | None) -> str:
    return "-" if dense_us is None or not time_us else f"{dense_us / time_us:.2f}x"


def weights_hash(tensors: dict[str, Tensor]) -> str:
    """Hash of every tensor's name, dtype, shape and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()[:32]
