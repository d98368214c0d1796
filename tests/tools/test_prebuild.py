"""What is built before measuring is what a search that measures asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from methods.jobs import GPU
from tools import prebuild
from zeroskip.cuda import assemble
from zeroskip.report.suite import read_suite

SUITE = """
[[case]]
kind = "layer"
name = "layer"
device = "cuda"
c = 16
k = 8
h = 6
w = 8
methods = ["sparsert"]

[[case]]
kind = "model"
name = "model"
device = "cuda"
model = "squeezenet1_1"
image = [3, 64, 64]
precision = "tf32"
methods = ["sparsert"]

[[case]]
kind = "layer"
name = "no data"
device = "cuda"
mask = "trained:nothing.npz:weight"
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(SUITE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def test_a_second_time_everything_is_there(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    title, built, _ = prebuild.build(suite, 0, GPU)
    assert title == "layer, batch 1, fp32"
    assert built >= 6

    def never(*arguments: object) -> bytes:
        raise AssertionError("assembled again")

    monkeypatch.setattr(assemble, "_assemble", never)
    assert prebuild.build(suite, 0, GPU)[1] == built


def test_a_network_is_searched_layer_by_layer_in_its_precision(suite: Path) -> None:
    found = list(prebuild.searches(read_suite(suite).cases[1], GPU))
    layers = [segment.layer for segment, _, _ in found]
    assert len({layer.key for layer in layers}) == len(layers) > 15
    assert {layer.precision for layer in layers} == {"tf32"}
    assert all(set(methods) == {"dense", "sparsert"} for _, methods, _ in found)


def test_a_case_without_its_data_builds_nothing(suite: Path) -> None:
    assert prebuild.build(suite, 2, GPU)[1] == 0
