"""What happened to densities and accuracy, step by step."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zeroskip.core.atomic import replace_file

from .config import PruneConfig
from .record import PruneRecord


@dataclass(frozen=True)
class LogEntry:
    """The network at `step`: its density, that of each layer by name, accuracy if measured, and other figures."""

    step: int
    density: float
    layers: dict[str, float]
    accuracy: float | None = None
    figures: dict[str, float] = field(default_factory=dict)


class PruneLog:
    """A file of JSON lines: the configuration first, then one `LogEntry` a line.

    The file is written anew and whole with each entry, so an interruption never leaves half a line. As a part of a
    checkpoint (`save_checkpoint(..., log=log)`) it goes back to what it was then: no step is logged twice. The file
    goes back with the next entry, so that a checkpoint which is refused costs no line of it.

    Args:
        path: where it goes; what is there is replaced at the first entry. None keeps it in memory, which is
            for all ranks but the first.
        config: what is pruned, and how.
    """

    def __init__(self, path: Path | str | None, config: PruneConfig) -> None:
        self.path = None if path is None else Path(path)
        self.config = config
        self._entries: list[LogEntry] = []

    @property
    def entries(self) -> Sequence[LogEntry]:
        """All entries so far, in the order of `add`."""
        return tuple(self._entries)

    def add(self, step: int, record: PruneRecord, accuracy: float | None = None, **figures: float) -> LogEntry:
        """Log `record`'s densities at `step`, with the accuracy (a fraction) and whatever else was measured."""
        layers = {layer.name: layer.density for layer in record.layers}
        # Of tensors and NumPy's numbers, which are no JSON, the value.
        measured = {name: float(value) for name, value in figures.items()}
        entry = LogEntry(step, record.density, layers, None if accuracy is None else float(accuracy), measured)
        self._entries.append(entry)
        self._write()
        return entry

    def state_dict(self) -> dict[str, Any]:
        """For `save_checkpoint`."""
        return {"config": self.config.to_json(), "entries": [asdict(entry) for entry in self._entries]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to `state`, the file with the next entry. Raises ValueError for the log of another configuration."""
        if PruneConfig.from_json(state["config"]) != self.config:
            raise ValueError(
                f"log: got one of {state['config']}, expected {self.config.to_json()}; resume with the same arguments"
            )
        self._entries = [LogEntry(**entry) for entry in state["entries"]]

    def _write(self) -> None:
        if self.path is not None:
            lines = [self.config.to_json(), *(json.dumps(asdict(entry)) for entry in self._entries)]
            text = "".join(f"{line}\n" for line in lines)
            replace_file(self.path, text.encode())


def read_log(path: Path | str) -> tuple[PruneConfig, list[LogEntry]]:
    """The configuration and the entries of a `PruneLog`'s file. Raises ValueError for any other file."""
    first, *rest = Path(path).read_text().splitlines() or [""]
    config = PruneConfig.from_json(first)
    try:
        return config, [LogEntry(**json.loads(line)) for line in rest]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: got a line that is no entry ({error}), expected a file of PruneLog") from error
