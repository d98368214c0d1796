"""Trained networks as data: how each was trained and pruned, and how good it is; JSON lines."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroskip.core.atomic import replace_file
from zeroskip.core.errors import FileFormatError
from zeroskip.core.jsonable import from_json, to_json

from .config import PruneConfig
from .log import LogEntry
from .record import PruneRecord


@dataclass(frozen=True)
class Trained:
    """One network of one training: a row of the accuracy tables, for one seed.

    Accuracies are top-1 fractions of the network as it was written to its file, in fp32.
    """

    network: str
    row: str
    """The name of what was done to it, as "unstructured-90"."""
    seed: int
    pruning: PruneConfig
    """Sparsity 0 where nothing was pruned."""
    settings: dict[str, Any]
    """Epochs, batch, learning rate and whatever else the result depends on, as JSON values."""
    layers: PruneRecord
    log: tuple[LogEntry, ...]
    """Densities and hold-out accuracy by step."""
    holdout: float
    """Accuracy on the part of the training photographs that was held out, for choosing."""
    accuracy: float
    """Accuracy on the test photographs, which were looked at once, for this record."""
    macs: int
    """Multiplications of one image that are left when zeros are skipped, convolutions and linear layers."""
    file_bytes: int
    seconds: float
    """Time the training took, interruptions left out."""
    environment: str
    """Id of the environment line of the same file."""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.network, self.row, self.seed


class TrainedFile:
    """A file of JSON lines: `{"environment": ...}` once for each machine, `{"trained": ...}` for each network.

    Every `add` writes the file anew and puts it in place whole, so that an interruption loses nothing. A record takes
    the place of an older one with its key.

    Raises:
        FileFormatError: the file exists and holds something else.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.environments: dict[str, dict[str, Any]] = {}
        self._rows: dict[tuple[str, str, int], Trained] = {}
        if self.path.exists():
            for number, line in enumerate(self.path.read_text().splitlines(), start=1):
                self._read(line, f"{self.path}, line {number}")

    @property
    def rows(self) -> tuple[Trained, ...]:
        """One record for every network, row and seed."""
        return tuple(self._rows.values())

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self._rows

    def add(self, trained: Trained, environment: Mapping[str, Any]) -> None:
        """Write a record, taken in `environment` (of `core.env.environment`), whose id it names."""
        if trained.environment != environment["id"]:
            raise ValueError(f"environment: got {environment['id']!r}, expected {trained.environment!r}")
        self.environments[trained.environment] = dict(environment)
        self._rows.pop(trained.key, None)
        self._rows[trained.key] = trained
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"environment": facts} for facts in self.environments.values()]
        lines += [{"trained": to_json(row)} for row in self._rows.values()]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        replace_file(self.path, text.encode())

    def _read(self, line: str, where: str) -> None:
        try:
            ((kind, content),) = json.loads(line).items()
        except (ValueError, AttributeError) as error:
            raise FileFormatError(f"{where}: got {line[:80]!r}, expected one JSON object of one key") from error
        if kind == "environment" and isinstance(content, dict) and isinstance(content.get("id"), str):
            self.environments[content["id"]] = content
        elif kind == "trained":
            trained = from_json(Trained, content, f"{where}: $.trained")
            if trained.environment not in self.environments:
                raise FileFormatError(
                    f"{where}: names environment {trained.environment!r}, the lines before hold "
                    f"{sorted(self.environments)}; put that line back or remove the record"
                )
            self._rows[trained.key] = trained
        else:
            raise FileFormatError(f"{where}: got {kind!r}, expected an environment with an id or a trained network")
