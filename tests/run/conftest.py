"""compile() without its patience: one candidate a method, one round, no refinement in place."""

from __future__ import annotations

import pytest

from zeroskip.plan import tune
from zeroskip.run import compile as compile_module
from zeroskip.run import refine


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "MOST_CANDIDATES", 2)
    monkeypatch.setattr(tune, "FINAL_SECONDS", 0.0)
    monkeypatch.setattr(tune, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(compile_module, "CONFIRM_SECONDS", 0.0)
    monkeypatch.setattr(compile_module, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(compile_module, "this_device", compile_module.this_device.__globals__["cpu"])
    monkeypatch.setattr(refine, "SECONDS", 0.0)
