"""The file of trained networks."""

from dataclasses import replace
from pathlib import Path

import pytest

from zeroskip.core.errors import FileFormatError
from zeroskip.pruning import LayerRecord, LogEntry, PruneConfig, PruneRecord, Trained, TrainedFile

FACTS = {"id": "here", "device": "some CPU"}
ROW = Trained(
    network="resnet18",
    row="unstructured-90",
    seed=0,
    pruning=PruneConfig(0.9, skip=("fc",)),
    settings={"epochs": 3, "ramp": [0.1, 0.5]},
    layers=PruneRecord((LayerRecord("conv1", 100, 10, "unstructured"), LayerRecord("fc", 10, 10, "dense", "skip"))),
    log=(LogEntry(5, 0.5, {"conv1": 0.5}, 0.25, {"loss": 2.0}), LogEntry(10, 0.1, {"conv1": 0.1})),
    holdout=0.5,
    accuracy=0.75,
    macs=1000,
    file_bytes=4000,
    seconds=1.5,
    environment="here",
)


def test_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trained.jsonl"
    file = TrainedFile(path)
    assert file.rows == ()
    file.add(ROW, FACTS)
    file.add(replace(ROW, seed=1), FACTS)
    file.add(replace(ROW, accuracy=0.5), FACTS)
    again = TrainedFile(path)
    assert sorted(row.seed for row in again.rows) == [0, 1]
    assert replace(ROW, seed=1) in again.rows
    assert replace(ROW, accuracy=0.5) in again.rows
    assert again.environments == {"here": FACTS}
    assert ROW.key in again
    assert ("resnet18", "dense", 0) not in again


def test_environment_has_to_be_the_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 'here'"):
        TrainedFile(tmp_path / "trained.jsonl").add(ROW, {"id": "elsewhere"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["no json", "[]", "{}", '{"other": 1}', '{"environment": {"name": "x"}}', '{"trained": {"seed": 0}}'],
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trained.jsonl"
    path.write_text('{"environment": {"id": "here"}}\n' + text + "\n")
    with pytest.raises(FileFormatError, match="line 2"):
        TrainedFile(path)


def test_record_of_an_unknown_environment_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trained.jsonl"
    TrainedFile(path).add(ROW, FACTS)
    path.write_text(path.read_text().splitlines()[1] + "\n")
    with pytest.raises(FileFormatError, match="names environment 'here'"):
        TrainedFile(path)
