from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from zeroskip.report.records import RecordFile

pytest.importorskip("matplotlib", reason="figures need zeroskip[report]")

from zeroskip.report.figures import bars


def test_the_same_records_give_the_same_bytes(tmp_path: Path, records: RecordFile) -> None:
    for name in ("a.svg", "b.svg"):
        bars(records.records, tmp_path / name, "Layers at 90% zeros")
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes()
    assert b"dc:date" not in first
    ElementTree.fromstring(first)


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        bars([], tmp_path / "a.svg", "none")
