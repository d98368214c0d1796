from __future__ import annotations

import json
from pathlib import Path

import pytest

from zeroskip.core.errors import FileFormatError
from zeroskip.report.records import RecordFile, Writer, read


def write(path: Path, file: RecordFile) -> None:
    with Writer(path) as writer:
        for facts in file.environments.values():
            writer.environment(facts)
        for record in file.records:
            writer.record(record)


def test_what_is_written_is_read_back(tmp_path: Path, records: RecordFile) -> None:
    write(tmp_path / "new folder" / "r.jsonl", records)
    assert read(tmp_path / "new folder" / "r.jsonl") == records


def test_appending_writes_an_environment_once(tmp_path: Path, records: RecordFile) -> None:
    path = tmp_path / "r.jsonl"
    write(path, records)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    write(path, records)
    lines = path.read_text().splitlines()
    assert sum("environment" in json.loads(line) for line in lines) == 1
    assert read(path).records == records.records * 2


def test_every_line_is_on_disk_when_write_returns(tmp_path: Path, records: RecordFile) -> None:
    path = tmp_path / "r.jsonl"
    with Writer(path) as writer:
        writer.environment(records.environments["e1"])
        writer.record(records.records[0])
        assert len(read(path).records) == 1


def test_a_record_needs_its_environment(tmp_path: Path, records: RecordFile) -> None:
    with Writer(tmp_path / "r.jsonl") as writer, pytest.raises(ValueError, match="call environment"):
        writer.record(records.records[0])


def test_a_truncated_last_line_is_named(tmp_path: Path, records: RecordFile) -> None:
    path = tmp_path / "r.jsonl"
    write(path, records)
    number = len(path.read_text().splitlines())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FileFormatError, match=f"line {number}: the file ends in the middle"):
        read(path)
    with pytest.raises(FileFormatError, match="ends in the middle"):
        Writer(path)


ENVIRONMENT = '{"environment": {"id": "e1"}}\n'


def line(**fields: object) -> str:
    return json.dumps({"record": {"suite": "s", "case": {}, "method": "dense", "environment": "e1"} | fields}) + "\n"


def timed(*samples: float) -> str:
    return line(status="OK", times={"samples_us": samples, "clock": "cpu"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense\n" + ENVIRONMENT, "line 1: not JSON"),
        (ENVIRONMENT + '{"other": 1}\n', "line 2: got"),
        (ENVIRONMENT + "[]\n", "line 2: got"),
        ('{"environment": {}}\n', "line 1: got an environment without"),
        (ENVIRONMENT + '{"record": {"suite": "s"}}\n', "line 2.*lacks"),
        (ENVIRONMENT + "\n" + line(status="FINE"), "line 3.*status"),
        (line(status="OK"), "line 1.*environment 'e1'"),
        (ENVIRONMENT + timed(), "positive"),
        (ENVIRONMENT + timed(float("nan")), "positive"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xff\xfe\x00\n\n")
    with pytest.raises(FileFormatError, match="line 1"):
        read(path)
