"""Records as JSON lines: the environment once, then one line for every measured case."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zeroskip.core.errors import FileFormatError
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.record import Record

_EXPECTED = 'expected {"environment": {"id": ..., ...}} or {"record": {...}}'


@dataclass(frozen=True)
class RecordFile:
    """What one results file holds: environments by id, and the records that name them, in the order written."""

    environments: dict[str, dict[str, Any]]
    records: tuple[Record, ...]


def read(path: Path | str) -> RecordFile:
    """Every line of a results file.

    Raises:
        FileFormatError: a line is not what ``Writer`` writes; the message holds its number.
        FileNotFoundError: there is no such file.
    """
    environments: dict[str, dict[str, Any]] = {}
    records: list[Record] = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        kind, content = _parse(line, where, last=number == len(lines))
        if kind == "environment":
            if not isinstance(content, dict) or not isinstance(content.get("id"), str):
                raise FileFormatError(
                    f"{where}: got an environment without a text 'id'; {_EXPECTED}: fix or remove the line"
                )
            environments[content["id"]] = content
            continue
        record = from_json(Record, content, f"{where}: $.record")
        if record.environment not in environments:
            raise FileFormatError(
                f"{where}: the record was taken in environment {record.environment!r}, but the lines "
                f"before hold {sorted(environments)}: put that line back, or remove the record"
            )
        if record.times is not None and not all(0 < sample < math.inf for sample in record.times.samples_us or (0.0,)):
            raise FileFormatError(
                f"{where}: times must be positive numbers, at least one, got "
                f"{record.times.samples_us[:5]}: remove the record and measure it again"
            )
        records.append(record)
    return RecordFile(environments, tuple(records))


def _parse(line: bytes, where: str, last: bool) -> tuple[str, Any]:
    try:
        data = json.loads(line)
    except ValueError as error:
        if last:
            raise FileFormatError(
                f"{where}: the file ends in the middle of this line, so whatever wrote it was "
                "stopped: remove the line to use the rest"
            ) from error
        raise FileFormatError(f"{where}: not JSON ({error}); {_EXPECTED}: fix or remove the line") from error
    if isinstance(data, dict) and set(data) == {"trained"}:
        raise FileFormatError(
            f"{where}: got a trained network, expected results of zeroskip bench: give this file as --trained"
        )
    if not isinstance(data, dict) or len(data) != 1 or next(iter(data)) not in ("environment", "record"):
        raise FileFormatError(f"{where}: got {line[:80]!r}; {_EXPECTED}: fix or remove the line")
    return next(iter(data.items()))


class Writer:
    """Appends to a results file.  Every line is on disk before the call returns, so a stopped run loses one at most.

    Raises:
        FileFormatError: the file exists and cannot be read; nothing is appended to a file that is already broken.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        self._known = set(read(path).environments) if path.exists() else set[str]()
        ended = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        if not ended:
            self._file.write("\n")

    def environment(self, facts: Mapping[str, Any]) -> str:
        """Write the environment's line unless the file has it, and return its id.

        Args:
            facts: what ``core.env.environment`` returns.
        """
        name = str(facts["id"])
        if name not in self._known:
            self._line({"environment": dict(facts)})
            self._known.add(name)
        return name

    def record(self, record: Record) -> None:
        """Append one record.

        Raises:
            ValueError: the file has no line for the record's environment.
        """
        if record.environment not in self._known:
            raise ValueError(
                f"the record names environment {record.environment!r}, the file holds "
                f"{sorted(self._known)}: call environment() first and use the id it returns"
            )
        self._line({"record": to_json(record)})

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, data: dict[str, Any]) -> None:
        self._file.write(json.dumps(data, ensure_ascii=False) + "\n")
        self._file.flush()
