"""compile() without its patience: one candidate a method, one round, no refinement in place."""

from __future__ import annotations

import pytest

from zeroskip.core.device import cpu, cuda
from zeroskip.plan import search, tune
from zeroskip.run import compile as compile_module
from zeroskip.run import confirm, refine


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MOST_CANDIDATES", {"cpu": 2, "cuda": 2})
    monkeypatch.setattr(tune, "FINAL_SECONDS", 0.0)
    monkeypatch.setattr(tune, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(confirm, "CONFIRM_SECONDS", 0.0)
    monkeypatch.setattr(confirm, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(compile_module, "this_cpu", cpu)
    monkeypatch.setattr(compile_module, "this_gpu", cuda)
    monkeypatch.setattr(refine, "SECONDS", 0.0)
