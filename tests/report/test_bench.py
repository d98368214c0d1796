"""What is measured, in which turns, and what becomes of what cannot be measured; nothing here asserts a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from report import processes
from report.fakes import L2_BYTES, Clock, FakeGpu, fake_gpu, gpu
from zeroskip.core.cost import Cost
from zeroskip.core.device import Device, cpu
from zeroskip.core.errors import CompileError, Unsupported, ZeroskipError
from zeroskip.core.graph import Segment
from zeroskip.core.jsonable import to_json
from zeroskip.core.layer import Epilogue, Layer, Precision, Sparsity
from zeroskip.core.record import Record
from zeroskip.measure import others
from zeroskip.measure.bound import Oracle
from zeroskip.measure.graphs import Rotation
from zeroskip.measure.others import Timing
from zeroskip.methods import registry
from zeroskip.methods.dense.blocks import BLOCKS
from zeroskip.methods.dense.config import DenseConfig
from zeroskip.model.zoo import BUILDERS
from zeroskip.plan.search import MOST_CANDIDATES
from zeroskip.report import bench, layers, models, vendors
from zeroskip.report.bench import EVERY, run_suite
from zeroskip.report.layers import COLD_CACHES, Work, bench_layer, restricted, status_of
from zeroskip.report.networks import networks
from zeroskip.report.plausible import objection
from zeroskip.report.records import Writer, read
from zeroskip.report.suite import BenchCase
from zeroskip.report.tables import compare
from zeroskip.report.vendors import column
from zeroskip.run.compile import compile

__all__ = ["gpu"]

LIBRARIES = ("dense", "cusparse")
OPPONENTS = ("cublas", "cublas_epilogue")
"""Those that run without a GPU."""


def case(**more: Any) -> BenchCase:
    facts: dict[str, Any] = {"c": 32, "k": 48, "h": 14, "w": 14, "rounds": 31, "device": "cuda"}
    return BenchCase("layer", "a layer", **(facts | {"methods": LIBRARIES, "baselines": OPPONENTS} | more))


# -- layers -------------------------------------------------------------------------------------------
def test_every_contender_is_timed_in_turns_warm_and_cold(gpu: FakeGpu) -> None:
    clock = Clock()
    records = bench_layer(case(), gpu, clock)
    names = {*LIBRARIES, *OPPONENTS}
    warm, cold = clock.seen[-2:]
    assert set(warm) == set(cold) == names
    assert not any(isinstance(call, Rotation) for call in warm.values())
    one_set = 4 * (32 + 48) * 14 * 14
    for call in cold.values():
        assert isinstance(call, Rotation)
        assert len(call.calls) * one_set >= COLD_CACHES * L2_BYTES
    assert {(record.method, record.case["cache"]) for record in records} == {
        (name, cache) for name in names for cache in ("warm", "cold")
    }
    for record in records:
        assert record.status == "OK", record.reason
        assert record.times is not None
        assert len(record.times.samples_us) == 31
        assert record.error["relative"] < 1e-6
        assert record.floor_us > 0


def test_between_others_everything_is_tuned_anew_and_timed_behind_them(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    monkeypatch.setattr(others, "_of", lambda device: lambda: log.append("others"))
    clock = Clock({others.ALONE: 6.0}, otherwise=10.0)
    records = bench_layer(case(caches=("warm", "between")), gpu, clock)
    names = {*LIBRARIES, *OPPONENTS}
    finals = [seen for seen in clock.seen if {*seen} - {others.ALONE} == names]
    warm, between = finals
    assert not any(isinstance(call, others.Behind) for call in warm.values())
    assert all(isinstance(call, others.Behind) for name, call in between.items() if name != others.ALONE)
    tuned = [set(seen) for seen in clock.seen if seen not in finals]
    assert {others.ALONE in seen for seen in tuned} == {True, False}
    assert log
    medians = {(record.case["cache"], record.times.median_us) for record in records if record.times is not None}
    assert medians == {("warm", 10.0), ("between", 4.0)}
    assert len(records) == 2 * len(names)


def test_a_cold_call_takes_other_memory_than_the_one_before(gpu: FakeGpu) -> None:
    clock = Clock()
    bench_layer(case(methods=("cusparse",), baselines=()), gpu, clock)
    (rotation,) = clock.seen[-1].values()
    assert isinstance(rotation, Rotation)
    stages: list[Any] = list(rotation.calls)
    places = {stage.inputs[0].data_ptr() for stage in stages} | {stage.outputs[0].data_ptr() for stage in stages}
    assert len(places) == 2 * len(stages)


def test_a_case_may_ask_for_one_cache_some_methods_and_no_opponents(gpu: FakeGpu) -> None:
    records = bench_layer(case(caches=("cold",), methods=("dense",), baselines=()), gpu, Clock())
    assert [(record.method, record.case["cache"]) for record in records] == [("dense", "cold")]
    assert bench_layer(case(methods=(), baselines=()), gpu, Clock()) == []


def test_a_method_that_refuses_says_why_for_every_cache(gpu: FakeGpu) -> None:
    records = bench_layer(case(methods=("slab",), baselines=("cublas",), kernel=3, padding=1), gpu, Clock())
    assert {(record.method, record.status) for record in records} == {
        ("slab", "UNSUPPORTED"),
        ("cublas", "UNSUPPORTED"),
    }
    assert len(records) == 4
    assert all(record.reason for record in records)


def test_without_an_epilogue_both_sides_do_without(gpu: FakeGpu) -> None:
    records = bench_layer(case(epilogue=False, caches=("warm",)), gpu, Clock())
    found = {record.method: record.status for record in records}
    assert found == {"dense": "OK", "cusparse": "OK", "cublas": "OK", "cublas_epilogue": "UNSUPPORTED"}


def test_a_time_that_cannot_be_is_called_so(gpu: FakeGpu) -> None:
    records = bench_layer(case(caches=("warm",)), gpu, Clock({"cusparse": 1e-3}))
    found = {record.method: record for record in records}
    assert found["cusparse"].status == "IMPLAUSIBLE"
    assert "impossible" in found["cusparse"].reason
    assert found["cusparse"].times is not None
    assert found["dense"].status == "OK"


def test_what_fails_to_run_is_a_record_and_the_others_are_timed(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real = layers._ready

    def ready(contender: layers.Contender, sets: Any, device: Device) -> Any:
        if contender.draft.method == "cublas":
            raise torch.OutOfMemoryError("no memory for that\nmore")
        return real(contender, sets, device)

    monkeypatch.setattr(layers, "_ready", ready)
    found = {record.method: record for record in bench_layer(case(caches=("warm",)), gpu, Clock())}
    assert (found["cublas"].status, found["cublas"].reason) == ("OUT_OF_MEMORY", "no memory for that")
    assert found["dense"].status == "OK"


def test_a_wrong_opponent_has_no_time(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real = layers.column

    def wrong(*arguments: Any) -> Any:
        found = real(*arguments)

        def worse(x: torch.Tensor) -> Callable[[], torch.Tensor]:
            call = found.forms["one product"](x)
            return lambda: call() * (torch.nan if arguments[1].shape.c == 32 else 1.001)

        return replace(found, forms={"one product": worse})

    monkeypatch.setattr(layers, "column", wrong)
    for channels in (32, 16):
        records = bench_layer(case(c=channels, caches=("warm",), methods=(), baselines=("cublas",)), gpu, Clock())
        assert [(record.status, record.times) for record in records] == [("WRONG", None)]


def test_errors_have_their_status() -> None:
    assert status_of(torch.OutOfMemoryError()) == "OUT_OF_MEMORY"
    assert status_of(CompileError("no")) == "COMPILE_ERROR"
    assert status_of(Unsupported("no")) == "UNSUPPORTED"
    assert status_of(RuntimeError("CUDA error")) == status_of(ZeroskipError("no")) == "LAUNCH_ERROR"
    assert layers._status("CompileError: x") == "COMPILE_ERROR"
    assert layers._status("WRONG: an element") == "WRONG"
    assert layers._status("has no configuration for this layer") == "UNSUPPORTED"


# -- one idea of a method left out ---------------------------------------------------------------------
def work(device: Device, **more: Any) -> Work:
    return Work.of(case(h=56, w=56, c=64, k=64, **more), Timing(device))


def test_fixed_fields_are_fixed_and_the_rest_is_left_to_choose() -> None:
    method, device = registry()["sputnik"], fake_gpu()
    segment = work(device).segment
    whole = [item.config for item in method.configs(segment, device)]
    for fixed in ({"swizzle": False}, {"vector": 1}, {"subwarp": 32}):
        found = [item.config for item in restricted(method, segment, device, fixed)]
        assert len({repr(config) for config in found}) == len(found) > 1
        assert all(getattr(config, name) == value for config in found for name, value in fixed.items())
    natural = [config for config in whole if config.vector == 1]
    assert restricted(method, segment, device, {"vector": 1})[0].config == natural[0]


def test_all_fields_are_one_configuration() -> None:
    method, device = registry()["sputnik"], fake_gpu()
    segment = work(device).segment
    config = to_json(method.configs(segment, device)[0].config)
    (found,) = restricted(method, segment, device, config)
    assert to_json(found.config) == config


def test_an_ablation_is_measured_under_its_label(gpu: FakeGpu) -> None:
    # Of a library, because nothing else runs without a GPU: its order of dimensions, fixed.
    configs = {"dense": ({"label": "channels last", "order": "nhwc", "library": "torch"},)}
    records = bench_layer(case(methods=("dense",), baselines=(), caches=("warm",), configs=configs), gpu, Clock())
    found = {record.method: record for record in records}
    assert set(found) == {"dense", "dense:channels last"}
    assert found["dense:channels last"].config == {"order": "nhwc", "library": "torch", "blocks": None}


def test_a_restriction_that_fits_nothing_is_a_record(gpu: FakeGpu) -> None:
    configs = {"dense": ({"label": "x", "library": "cublas"},)}
    (record,) = bench_layer(
        case(methods=(), baselines=(), caches=("warm",), kernel=3, padding=1, configs=configs), gpu, Clock()
    )
    assert (record.method, record.status) == ("dense:x", "UNSUPPORTED")


# -- cuBLAS -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["cublas", "cublas_epilogue"])
def test_every_form_of_the_dense_product_computes_it(name: str, batch: int, precision: Precision) -> None:
    found = Work.of(case(batch=batch, precision=precision), Timing(fake_gpu()))
    bias = found.parameters["bias"]
    opponent = column(name, found.layer, found.parameters["weight"], bias)
    layer = replace(found.layer, epilogue=opponent.epilogue)
    segment = Segment(("l",), ("x",), ("l",), (layer,))
    parameters = {"weight": found.parameters["weight"]} | ({"bias": bias} if opponent.epilogue.bias else {})
    oracle = Oracle(segment, parameters, found.data)
    assert len(opponent.forms) == (name == "cublas_epilogue") + 1 + (batch > 1)
    for how, form in opponent.forms.items():
        y = form(found.data.x)()
        assert y.shape == layer.shape.output_shape
        assert oracle.judge(y).relative < {"fp16": 2e-3, "bf16": 2e-2}.get(precision, 1e-6), how


def test_what_is_no_product_has_no_such_opponent() -> None:
    for more in ({"kernel": 3, "padding": 1}, {"stride": 2}, {"groups": 2}):
        shape = case(**more).shape
        layer = Layer("l", "conv2d", shape, "fp32", Sparsity(1, 1.0, "dense", 0.0), Epilogue(True, "relu"))
        with pytest.raises(Unsupported, match="1x1"):
            column("cublas", layer, torch.zeros(shape.weight_shape), torch.zeros(shape.k))


# -- Triton -------------------------------------------------------------------------------------------
def test_every_block_is_tried_in_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendors, "triton_runs", lambda: True)
    for precision in ("fp32", "tf32", "fp16"):
        found = vendors.triton_candidates(Work.of(case(precision=precision), Timing(fake_gpu())).segment, fake_gpu())
        configs = [candidate.config for candidate in found]
        assert len(set(configs)) == len(configs) == 2 * len(BLOCKS) <= MOST_CANDIDATES["cuda"]
        assert {config.library for config in configs} == {"triton"}
        assert {config.order for config in configs[:2]} == {"nhwc", "nchw"}
    with pytest.raises(Unsupported, match="1x1"):
        vendors.triton_candidates(Work.of(case(kernel=3, padding=1), Timing(fake_gpu())).segment, fake_gpu())
    monkeypatch.setattr(vendors, "triton_runs", lambda: False)
    with pytest.raises(Unsupported, match="Triton"):
        vendors.triton_candidates(Work.of(case(), Timing(fake_gpu())).segment, fake_gpu())


def test_the_search_among_blocks_is_an_opponent(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def others(segment: Segment, device: Device) -> list[Any]:
        # Of a library, because nothing else runs without a GPU.
        return [registry()["dense"].candidate(segment, DenseConfig(order, "torch")) for order in ("nchw", "nhwc")]

    monkeypatch.setattr(layers, "triton_candidates", others)
    clock = Clock({"dense/0": 9.0, "dense/1": 5.0})
    (record,) = bench_layer(case(methods=(), baselines=("triton",), caches=("warm",)), gpu, clock)
    assert (record.method, record.status, record.config["order"]) == ("triton", "OK", "nhwc")
    assert record.setup["tune_seconds"] > 0


# -- cuDNN --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [{"kernel": 3, "padding": 1}, {"kernel": 3, "padding": 1, "stride": 2}, {"groups": 4}])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_convolutions_that_are_no_products_have_an_opponent_too(
    gpu: FakeGpu, more: dict[str, int], precision: Precision
) -> None:
    names = ("cudnn", "cudnn_epilogue")
    records = bench_layer(
        case(methods=(), baselines=names, caches=("warm",), batch=2, precision=precision, **more), gpu, Clock()
    )
    assert [(record.method, record.status) for record in records] == [(name, "OK") for name in names]
    for record in records:
        assert record.error["relative"] < {"fp16": 2e-3}.get(precision, 1e-6)
        assert record.config["forms"] == 2


# -- impossible times ---------------------------------------------------------------------------------
GPU = fake_gpu()
COST = Cost(flops=50_000_000, bytes_read=4_000, bytes_written=1_500)  # 1 us at 50 TFLOP/s, 1 ns at the cache's rate


def test_arithmetic_sets_a_floor() -> None:
    assert objection(0.9, COST, replace(GPU, peak_tflops={"fp32": 50.0}), "fp32") is None
    assert "MFLOP" in (objection(0.8, COST, replace(GPU, peak_tflops={"fp32": 50.0}), "fp32") or "")


def test_a_float32_product_may_use_tensor_cores_three_times() -> None:
    assert objection(0.5, COST, GPU, "fp32") is None
    assert objection(0.4, COST, GPU, "fp32") is not None
    assert objection(0.14, COST, GPU, "tf32") is not None
    assert objection(0.07, COST, GPU, "bf16") is None  # has the peak of fp16


def test_every_byte_crosses_the_cache_and_what_does_not_fit_comes_from_memory() -> None:
    inside = Cost(0, L2_BYTES // 2, 0)  # 4.5 ns
    assert objection(0.004, inside, GPU, "fp32") is None
    assert "L2" in (objection(0.0035, inside, GPU, "fp32") or "")
    outside = Cost(0, 10 * L2_BYTES, 0)  # at least nine tenths from memory, 180 ns
    assert objection(0.16, outside, GPU, "fp32", "warm") is None
    assert "memory" in (objection(0.15, outside, GPU, "fp32", "warm") or "")


def test_a_rotation_must_fetch_what_the_cache_cannot_have_kept() -> None:
    own = L2_BYTES // 2
    cost = Cost(0, own, 0)
    # Of three times the cache two thirds are missed: a third of L2_BYTES a call, 6.7 ns.
    assert objection(0.006, cost, GPU, "fp32", "cold", 3 * L2_BYTES, own) is None
    assert "memory" in (objection(0.005, cost, GPU, "fp32", "cold", 3 * L2_BYTES, own) or "")
    assert objection(0.005, cost, GPU, "fp32", "warm", L2_BYTES // 2, own) is None


def test_without_peaks_nothing_is_impossible() -> None:
    bare = replace(GPU, peak_tflops={}, bandwidth_gbps=0.0, l2_gbps=0.0)
    assert objection(1e-9, COST, bare, "fp32", "cold", 3 * L2_BYTES, 10) is None


# -- suites -------------------------------------------------------------------------------------------
SUITE = """
defaults = { kind = "layer", device = "cuda", c = 4, k = 4, h = 2, w = 2, methods = ["dense"], baselines = [] }
case = [{ name = "a" }, { name = "b" }, { name = "c", caches = ["warm"] }]
"""


@pytest.fixture
def suite(tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three cases on a GPU that is not there."""
    monkeypatch.setattr(bench.devices, "cuda", lambda: gpu)
    monkeypatch.setattr(bench, "this_gpu", lambda: gpu)
    monkeypatch.setattr(bench, "environment", lambda device: {"id": "e", "device": device.name, "source": "now"})
    monkeypatch.setattr(bench, "bench_layer", fine)
    (tmp_path / "s.toml").write_text(SUITE)
    return tmp_path / "s.toml"


def fine(case: BenchCase, device: Device) -> list[Record]:
    return [Record("", facts, "dense", "UNSUPPORTED", "a fake") for facts in case.all_facts]


def run(suite: Path, name: str = "r.jsonl", **more: Any) -> int:
    with Writer(suite.parent / name) as writer:
        return run_suite(suite, writer, **more)


def cases(suite: Path, name: str = "r.jsonl") -> list[tuple[str, str, str]]:
    return [(record.case["name"], record.case["cache"], record.status) for record in read(suite.parent / name).records]


def test_a_suite_writes_its_records_with_peaks_in_the_environment(suite: Path) -> None:
    assert run(suite) == 3
    file = read(suite.parent / "r.jsonl")
    assert [record.case["name"] for record in file.records] == ["a", "a", "b", "b", "c"]
    assert {record.suite for record in file.records} == {"s"}
    assert file.environments["e"]["peak_tflops"]["fp32"] == 50.0
    assert file.environments["e"]["l2_gbps"] == 5500.0


def test_what_was_measured_with_the_same_sources_is_skipped(suite: Path) -> None:
    run(suite, budget_seconds=1e9)
    half = (suite.parent / "r.jsonl").read_text().splitlines()
    # The environment, both of a, one of b: b was stopped in its middle.
    (suite.parent / "half.jsonl").write_text("\n".join(half[:4]) + "\n")
    assert run(suite, "rest.jsonl", resume=suite.parent / "half.jsonl") == 2
    assert [name for name, _, _ in cases(suite, "rest.jsonl")] == ["b", "b", "c"]
    assert run(suite, "none.jsonl", resume=suite.parent / "r.jsonl") == 0
    lines = [json.loads(line) for line in half]
    lines[0]["environment"]["source"] = "before"
    (suite.parent / "old.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert run(suite, "again.jsonl", resume=suite.parent / "old.jsonl") == 3
    lines[0]["environment"]["source"] = "now"
    for line in lines[1:]:
        line["record"]["contended"] = line["record"]["case"]["name"] == "c"
    (suite.parent / "busy.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert run(suite, "quiet.jsonl", resume=suite.parent / "busy.jsonl") == 1


def test_loading_is_measured_once(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.write_text('case = [{ name = "l", kind = "load", model = "resnet18" }]\n')
    monkeypatch.setattr(bench, "this_cpu", lambda threads: cpu(threads))
    monkeypatch.setattr(bench, "_peaks", lambda device: {})
    monkeypatch.setattr(bench, "bench_load", lambda case, device: [Record("", case.facts, "zeroskip", "OK")])
    assert run(suite) == 1
    assert run(suite, "rest.jsonl", resume=suite.parent / "r.jsonl") == 0


@pytest.mark.parametrize(
    "more",
    [
        'methods = ["dense", "slab"], baselines = []',
        'methods = ["dense"], baselines = ["cublas"]',
        'methods = ["dense"], baselines = [], configs.slab = [{ label = "alone", split = 1 }]',
    ],
)
def test_what_a_suite_asks_for_besides_is_measured(suite: Path, more: str) -> None:
    run(suite)
    suite.write_text(suite.read_text().replace('methods = ["dense"], baselines = []', more))
    assert run(suite, "rest.jsonl", resume=suite.parent / "r.jsonl") == 3


def test_no_case_starts_that_would_end_beyond_the_budget(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def slow(case: BenchCase, device: Device) -> list[Record]:
        now[0] += 10.0
        return fine(case, device)

    monkeypatch.setattr(bench, "bench_layer", slow)
    assert run(suite, "25.jsonl", budget_seconds=25) == 2
    assert run(suite, "30.jsonl", budget_seconds=30) == 3
    assert run(suite, "0.jsonl", budget_seconds=0) == 1


def test_a_case_without_its_trained_weights_is_left_out(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROSKIP_DATA", str(suite.parent))
    suite.write_text(SUITE.replace('name = "b"', 'name = "b", mask = "trained:net.npz:key"'))
    said: list[str] = []
    assert run(suite, progress=lambda done, total, now: said.append(now)) == 2
    assert [name for name, _, _ in cases(suite)] == ["a", "a", "c"]
    assert any("left out" in text and "net.npz" in text for text in said)
    (suite.parent / "net.npz").touch()
    assert run(suite, "rest.jsonl", resume=suite.parent / "r.jsonl") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "OUT_OF_MEMORY"),
        (RuntimeError("CUDA error: invalid argument"), "LAUNCH_ERROR"),
        (ZeroskipError("no method can run it"), "LAUNCH_ERROR"),
        (AssertionError("a mistake of ours"), "LAUNCH_ERROR"),
    ],
)
def test_a_case_that_fails_is_a_record_and_the_next_one_runs(
    suite: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    def some(case: BenchCase, device: Device) -> list[Record]:
        if case.name == "b":
            raise error
        return fine(case, device)

    monkeypatch.setattr(bench, "bench_layer", some)
    assert run(suite) == 3
    assert cases(suite)[2:4] == [("b", "warm", status), ("b", "cold", status)]
    assert {record.method for record in read(suite.parent / "r.jsonl").records} == {"dense", EVERY}
    assert run(suite, "none.jsonl", resume=suite.parent / "r.jsonl") == 0


def test_an_image_that_a_network_refuses_on_the_cpu_is_a_record_too(suite: Path) -> None:
    layer = 'kind = "layer", name = "b", c = 4, k = 4, h = 2, w = 2, methods = ["dense"], baselines = [], rounds = 1'
    suite.write_text(
        'case = [{ kind = "model", name = "a", model = "squeezenet1_1", image = [3, 2, 2], baselines = [] }, '
        f"{{ {layer} }}]"
    )
    assert run(suite) == 2
    refused, measured = read(suite.parent / "r.jsonl").records
    assert (refused.case["name"], refused.method, refused.status) == ("a", EVERY, "LAUNCH_ERROR")
    assert refused.reason
    assert (measured.case["name"], measured.method) == ("b", "dense")


def test_a_gpu_that_no_longer_answers_ends_the_run_after_its_record(
    suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = [False]

    def synchronize() -> None:
        if dead[0]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def some(case: BenchCase, device: Device) -> list[Record]:
        dead[0] = case.name == "b"
        return fine(case, device)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(bench, "bench_layer", some)
    with pytest.raises(ZeroskipError, match=r"b: .*illegal memory access.*--resume"):
        run(suite)
    assert cases(suite)[2:] == [("b", "warm", "LAUNCH_ERROR"), ("b", "cold", "LAUNCH_ERROR")]
    dead[0] = False
    assert run(suite, "rest.jsonl", resume=suite.parent / "r.jsonl") == 1


def test_processes_measure_side_by_side_and_one_writes(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_outcome_of", processes.measured)
    assert run(suite, processes=2) == 3
    found = read(suite.parent / "r.jsonl").records
    assert sorted(record.case["name"] for record in found) == ["a", "a", "b", "b", "c"]
    assert {record.suite for record in found} == {"s"}
    ours = {int(record.setup["process"]) for record in found}
    assert len(ours) == 2
    assert os.getpid() not in ours
    assert run(suite, "none.jsonl", resume=suite.parent / "r.jsonl", processes=2) == 0


@pytest.mark.parametrize(("outcome", "words"), [("gone", "--resume"), ("unanswered", "does not answer")])
def test_a_process_that_cannot_go_on_ends_the_run(
    suite: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, words: str
) -> None:
    monkeypatch.setattr(bench, "_outcome_of", getattr(processes, outcome))
    with pytest.raises(ZeroskipError, match=words):
        run(suite, processes=2)
    assert len(cases(suite)) == (0 if outcome == "gone" else 4)  # what ran beside it is kept


@pytest.mark.parametrize(
    "more", ['kind = "load", model = "resnet18"', 'kind = "model", model = "resnet18", device = "cuda"']
)
def test_what_others_would_disturb_is_measured_alone(suite: Path, more: str) -> None:
    suite.write_text(f'case = [{{ name = "l", {more} }}]\n')
    with pytest.raises(ZeroskipError, match="would disturb"):
        run(suite, processes=2)


def test_a_layer_of_the_cpu_is_measured_as_before() -> None:
    facts = {"c": 8, "k": 8, "h": 6, "w": 6, "rounds": 3, "methods": ("dense", "escort"), "baselines": ("torch",)}
    clock = Clock()
    records = bench_layer(BenchCase("layer", "small", **facts), cpu(1), clock)  # type: ignore[arg-type]
    assert {(record.method, record.status) for record in records} == {
        ("dense", "OK"),
        ("escort", "OK"),
        ("torch", "OK"),
    }
    assert all("cache" not in record.case for record in records)


# -- networks -----------------------------------------------------------------------------------------
@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> BenchCase:
    """A network of two layers, as a case of a GPU."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))

    monkeypatch.setitem(BUILDERS, "tiny", build)
    return BenchCase("model", "tiny", model="tiny", image=(3, 8, 8), density=0.5, device="cuda", rounds=5)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of the fake GPU are engines of the CPU."""
    monkeypatch.setattr(
        models,
        "compiled",
        lambda case, model, x, device, skip_zeros: compile(model, x, threads=1, skip_zeros=skip_zeros),
    )
    monkeypatch.setattr(models, "timed_call", lambda engine, x, device: lambda: engine(x))
    monkeypatch.setattr(models, "in_capture_thread", lambda function: function())


def test_a_network_is_measured_with_two_engines_and_the_ways_of_torch(
    gpu: FakeGpu, tiny: BenchCase, on_the_cpu: None
) -> None:
    clock = Clock({"torch": 8.0, "torch_channels_last": 7.0, "zeroskip_dense": 5.0, "zeroskip": 4.0})
    records = {record.method: record for record in models.bench_model(tiny, gpu, clock)}
    assert set(records) == {"zeroskip", "zeroskip_dense", "torch", "torch_channels_last"}
    for record in records.values():
        assert record.status == "OK", record.reason
        assert record.case == tiny.facts
        assert record.error["relative"] < 1e-6
    assert records["zeroskip"].setup["call_us"] > 0
    _, pruned, _ = records["zeroskip_dense"].config["steps"].values()  # the first and the last have no zeros to skip
    assert pruned == "dense"
    (network,) = networks(compare(records.values()))
    assert (network.fusion, network.zeros) == (7 / 5, 5 / 4)


def test_a_network_cannot_be_faster_than_its_bytes(gpu: FakeGpu, tiny: BenchCase, on_the_cpu: None) -> None:
    """Of a few thousand bytes through L2, in nanoseconds; the opponents are held to it too."""
    clock = Clock({"torch": 8.0, "torch_channels_last": 7.0, "zeroskip_dense": 5.0, "zeroskip": 1e-5})
    records = {record.method: record for record in models.bench_model(tiny, gpu, clock)}
    assert (records["zeroskip"].status, records["torch"].status) == ("IMPLAUSIBLE", "OK")
    assert "through the L2 cache" in records["zeroskip"].reason
    assert 1e-5 < records["torch"].floor_us < 5.0
    assert len({record.floor_us for record in records.values()}) == 1


def test_a_wrong_network_has_no_time(
    gpu: FakeGpu, tiny: BenchCase, on_the_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "distance", lambda ours, theirs: float("nan"))
    clock = Clock()
    records = models.bench_model(tiny, gpu, clock)
    assert {record.status for record in records} == {"WRONG"}
    assert clock.seen == []


def test_half_precision_is_that_of_model_and_image(tiny: BenchCase) -> None:
    model, x = models.prepared(replace(tiny, precision="fp16"), fake_gpu())
    assert {x.dtype, *(parameter.dtype for parameter in model.parameters())} == {torch.float16}
    model, x = models.prepared(replace(tiny, precision="tf32"), fake_gpu())
    assert x.dtype == torch.float32


def test_an_opponent_that_is_not_of_this_device_is_unsupported(gpu: FakeGpu, tiny: BenchCase, on_the_cpu: None) -> None:
    records = models.bench_model(replace(tiny, baselines=("onnxruntime", "cublas")), gpu, Clock())
    found = {record.method: record.status for record in records}
    assert (found["onnxruntime"], found["cublas"]) == ("UNSUPPORTED", "UNSUPPORTED")
