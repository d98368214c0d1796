"""The model of SparseRT's time is fitted to what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from methods.jobs import GPU
from tools import sparsert_model
from tools.sparsert_model import cases, drawn, off, points
from zeroskip.core.jsonable import to_json
from zeroskip.core.record import Record, Times
from zeroskip.methods.sparsert import estimate
from zeroskip.methods.sparsert.method import METHOD
from zeroskip.report.layers import layer_of
from zeroskip.report.records import Writer


def test_the_same_is_drawn_again_and_fits() -> None:
    case = next(cases())
    segment, _ = layer_of(case)
    chosen = drawn(case, GPU, 12)
    assert len(chosen) == len(set(chosen)) == 12
    assert drawn(case, GPU, 12) == chosen
    for config in chosen:
        METHOD.candidate(segment, config)


def test_a_fit_finds_what_times_were_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in sparsert_model.FITTED:
        monkeypatch.setattr(estimate, name, getattr(estimate, name))
    monkeypatch.setattr(sparsert_model, "STEPS", 150)
    path, case = tmp_path / "samples.jsonl", next(cases())
    layer = layer_of(case)[0].layer
    with Writer(path) as writer:
        where = writer.environment({"id": "here", "device": "a GPU"})
        estimate.LAUNCH, launch = 4 * estimate.LAUNCH, estimate.LAUNCH
        for config in drawn(case, GPU, 16):
            times = Times((1e6 * estimate.estimated(layer, config, GPU).seconds,), "cuda")
            facts = case.facts | {"cache": "between"}
            writer.record(
                replace(Record("", facts, "sparsert", "OK", config=to_json(config), times=times), environment=where)
            )
        estimate.LAUNCH = launch
    assert not points(path, "warm")
    before = off(points(path, "between"))
    sparsert_model.fit(path, "between")
    after = off(points(path, "between"))
    assert abs(before[1]) > 0.3
    assert abs(after[1]) < 0.05
    assert after[0] < before[0] + 0.01
