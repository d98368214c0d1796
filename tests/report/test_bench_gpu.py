"""A small suite from end to end on a GPU; no time is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeroskip.report.bench import run_suite
from zeroskip.report.records import Writer, read

pytestmark = pytest.mark.gpu

SUITE = """
defaults = { device = "cuda", rounds = 5, density = 0.1 }
case = [
  { kind = "layer", name = "64,64,196", c = 64, k = 64, h = 14, w = 14, precision = ["fp32", "tf32", "fp16"] },
  { kind = "layer", name = "images", c = 64, k = 40, h = 7, w = 7, batch = 3, epilogue = false, caches = ["warm"] },
  { kind = "layer", name = "ablation", c = 64, k = 64, h = 14, w = 14, caches = ["warm"], methods = ["sputnik"], \
configs = { sputnik = [{ label = "no swizzle", swizzle = false }] } },
  { kind = "layer", name = "3x3", c = 64, k = 64, h = 14, w = 14, kernel = 3, padding = 1, stride = 2, \
methods = ["dense"], baselines = ["cudnn", "cudnn_epilogue"], precision = ["fp32", "tf32", "fp16"] },
  { kind = "model", name = "MobileNetV1", model = "mobilenet_v1", image = [3, 64, 64], precision = ["fp32", "fp16"] },
]
"""


def test_a_suite_runs_and_every_method_is_right_or_refuses(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SUITE)
    with Writer(tmp_path / "r.jsonl") as writer:
        assert run_suite(tmp_path / "small.toml", writer) == 10
    file = read(tmp_path / "r.jsonl")
    for record in file.records:
        assert record.status in ("OK", "UNSUPPORTED"), (record.case, record.method, record.status, record.reason)
    timed = {(record.case["name"], record.method) for record in file.records if record.times is not None}
    layer = ("64,64,196", "images")
    products = ("dense", "cublas", "cublaslt", "triton", "cusparse", "slab", "sputnik")
    assert timed >= {(name, method) for name in layer for method in products}
    assert {("64,64,196", "cublaslt_epilogue"), ("3x3", "cudnn"), ("3x3", "cudnn_epilogue")} <= timed
    assert {("ablation", "sputnik:no swizzle"), ("MobileNetV1", "zeroskip"), ("MobileNetV1", "torch")} <= timed
    with Writer(tmp_path / "again.jsonl") as writer:
        assert run_suite(tmp_path / "small.toml", writer, resume=tmp_path / "r.jsonl") == 0


def test_processes_measure_what_one_does(tmp_path: Path) -> None:
    layers = [line for line in SUITE.splitlines() if "MobileNetV1" not in line]
    (tmp_path / "layers.toml").write_text("\n".join(layers))
    with Writer(tmp_path / "r.jsonl") as writer:
        assert run_suite(tmp_path / "layers.toml", writer, processes=3) == 8
    found = read(tmp_path / "r.jsonl").records
    assert {record.status for record in found} == {"OK", "UNSUPPORTED"}
    assert {record.case["name"] for record in found} == {"64,64,196", "images", "ablation", "3x3"}
