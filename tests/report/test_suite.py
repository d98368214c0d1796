from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tools.train import networks
from tools.train.plan import jobs
from zeroskip.core.errors import FileFormatError
from zeroskip.core.layer import Sparsity
from zeroskip.model.zoo import BUILDERS
from zeroskip.model.zoo.files import save_network
from zeroskip.report.records import read
from zeroskip.report.suite import BASELINES, EVERY_BASELINE, BenchCase, read_suite
from zeroskip.report.tables import BASELINES as TABLES_BASELINES
from zeroskip.report.workload import example_of, layer_bias, layer_weight, missing_data, model_of

ROOT = Path(__file__).parents[2]
SUITES = sorted((ROOT / "benchmarks" / "suites").glob("*.toml"))
LAYER = 'kind = "layer"\nc = 4\nk = 8\nh = 2\nw = 2\n'


def suite(folder: Path, text: str) -> tuple[BenchCase, ...]:
    (folder / "s.toml").write_text(text)
    return read_suite(folder / "s.toml").cases


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_suites_can_be_read_and_no_two_cases_would_write_the_same_record(path: Path) -> None:
    cases = read_suite(path).cases
    facts = [json.dumps(one) for case in cases for one in case.all_facts]
    assert len(set(facts)) == len(facts)
    assert all(case.shape.macs for case in cases if case.kind == "layer")


def test_records_of_the_cpu_still_name_the_cases_of_its_suite() -> None:
    written = {json.dumps(record.case) for record in read(ROOT / "benchmarks" / "results" / "cpu.jsonl").records}
    cases = read_suite(ROOT / "benchmarks" / "suites" / "cpu.toml").cases
    assert written
    assert written <= {json.dumps(case.facts) for case in cases}


def test_a_list_stands_for_a_case_for_each_of_its_values(tmp_path: Path) -> None:
    text = f'[defaults]\n{LAYER}density = 0.2\n[[case]]\nname = "a"\nbatch = [1, 8]\nmask = ["random", "clustered"]\n'
    cases = suite(tmp_path, f'{text}[[case]]\nname = "b"\ndensity = 0.5\nimage = [1, 2]\n')
    assert [(case.name, case.batch, case.mask, case.density) for case in cases] == [
        ("a", 1, "random", 0.2),
        ("a", 8, "random", 0.2),
        ("a", 1, "clustered", 0.2),
        ("a", 8, "clustered", 0.2),
        ("b", 1, "random", 0.5),
    ]


def test_facts_of_a_gpu_say_column_and_cache_and_those_of_a_cpu_are_as_before() -> None:
    case = BenchCase("layer", "a", c=4, k=8, h=2, w=2, device="cuda", precision="tf32", epilogue=False)
    warm, cold = case.all_facts
    assert (warm["cache"], cold["cache"], warm["precision"], warm["device"]) == ("warm", "cold", "tf32", "cuda")
    assert warm["epilogue"] is False
    assert "threads" not in warm
    assert not set(warm) & {"baselines", "rounds", "methods", "configs", "caches", "model", "image"}
    (facts,) = BenchCase("layer", "a", c=4, k=8, h=2, w=2).all_facts
    assert not set(facts) & {"device", "precision", "cache", "epilogue"}
    model = BenchCase("model", "a", model="resnet18", device="cuda")
    assert "cache" not in model.all_facts[0]
    assert "epilogue" not in model.all_facts[0]


def test_opponents_are_those_of_the_device() -> None:
    assert BenchCase("layer", "a").opponents == BASELINES
    products = ("cublas", "cublas_epilogue", "cublaslt", "cublaslt_epilogue", "triton")
    assert BenchCase("layer", "a", device="cuda").opponents == products
    assert BenchCase("model", "a", model="vgg19", device="cuda").opponents == ("torch", "torch_channels_last")
    assert BenchCase("layer", "a", device="cuda", baselines=()).opponents == ()
    assert set(EVERY_BASELINE) <= {*TABLES_BASELINES}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("density = 0", "density"),
        ("rounds = 0", "rounds"),
        ("batch = -1", "batch"),
        ('methods = ["nomethod"]', "nomethod"),
        ('baselines = ["norival"]', "norival"),
        ('precision = "tf32"', "cuda only"),
        ('precision = "int8"', "precision"),
        ("caches = []", "caches"),
        ('caches = ["warm", "warm"]', "caches"),
        ('device = "tpu"', "device"),
        ("nonsense = 1", "nonsense"),
        ("configs = { nomethod = [] }", "nomethod"),
        ("configs = { sputnik = [{ subwarp = 8 }] }", "label"),
        ('configs = { sputnik = [{ label = "x", wings = 2 }] }', "wings"),
        ('configs = { sputnik = [{ label = "x" }, { label = "x" }] }', "of its own"),
    ],
)
def test_a_bad_value_is_named_with_its_case(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(FileFormatError, match=f"case 2.*{message}"):
        suite(tmp_path, f'[[case]]\nname = "a"\n{LAYER}[[case]]\nname = "b"\n{LAYER}{more}\n')


def test_cases_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"a case is a table .* got 1"):
        suite(tmp_path, "case = [1, 2]")


def test_a_suite_without_cases_is_refused(tmp_path: Path) -> None:
    for text in ("", "case = []", "case = 1", "defaults = 1\n[[case]]\n", "not toml"):
        with pytest.raises(FileFormatError):
            suite(tmp_path, text)


@pytest.mark.parametrize("mask", ["random", "clustered"])
def test_weights_have_the_density_asked_for_in_the_precision_asked_for(mask: str) -> None:
    case = BenchCase("layer", "a", density=0.25, mask=mask, c=64, k=32, h=2, w=2, device="cuda", precision="fp16")
    weight = layer_weight(case)
    assert weight.dtype == layer_bias(case).dtype == torch.float16
    assert weight.shape == (32, 64, 1, 1)
    assert abs(float((weight != 0).double().mean()) - 0.25) < 0.02
    assert torch.equal(weight, layer_weight(case))


@pytest.mark.parametrize(
    ("kind", "mask", "right"),
    [
        ("layer", "trained:a.npz:key", True),
        ("layer", "trained:a.npz", False),
        ("layer", "trained:a.safetensors", False),
        ("model", "trained:a.npz", True),
        ("model", "trained:a.safetensors", True),
        ("model", "trained:a.npz:key", False),
        ("load", "trained:a.zsk", False),
        ("load", "trained:", False),
    ],
)
def test_a_trained_mask_names_a_file_that_such_a_case_can_read(kind: Any, mask: str, right: bool) -> None:
    with nullcontext() if right else pytest.raises(ValueError, match=f"the mask of a {kind} is trained:"):
        BenchCase(kind, "a", mask=mask, model="resnet18")


def test_a_trained_network_has_its_own_classes_and_filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROSKIP_DATA", str(tmp_path))
    monkeypatch.setitem(BUILDERS, "tiny", lambda classes: network(8, classes))
    monkeypatch.setitem(BUILDERS, "other", lambda classes: network(8, classes))
    case = BenchCase("model", "a", mask="trained:n.safetensors", model="tiny", image=(3, 8, 8))
    assert missing_data(case) == tmp_path / "n.safetensors"
    small = network(3, 5).eval()
    save_network(tmp_path / "n.safetensors", "tiny", 5, small)
    assert missing_data(case) is None
    wanted = small(example_of(case))
    assert torch.allclose(model_of(case)(example_of(case)), wanted, rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="holds tiny, the case a is about other"):
        model_of(replace(case, model="other"))


def network(width: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


@pytest.mark.parametrize(("name", "settings"), [("trained_cpu", 1), ("trained_cuda", 2)])
def test_suites_of_trained_networks_name_what_training_writes(name: str, settings: int) -> None:
    cases = read_suite(ROOT / "benchmarks" / "suites" / f"{name}.toml").cases
    written = {f"trained:{job.name}.safetensors": job for job in jobs(networks.NETWORKS, (0,))}
    assert len(cases) == settings * len({case.mask for case in cases}) == settings * 24
    for case in cases:
        job = written[case.mask]
        assert case.model == job.network
        assert case.image == (3, 112, 112)
        assert case.density == pytest.approx(1 if job.row.filters else 1 - job.row.config.final_sparsity)


def test_the_example_is_the_same_every_time() -> None:
    case = BenchCase("model", "a", model="resnet18", batch=2, image=(3, 4, 5))
    assert example_of(case).shape == (2, 3, 4, 5)
    assert torch.equal(example_of(case), example_of(case))


def test_a_mask_of_2_to_4() -> None:
    case = BenchCase("layer", "a", 0.5, "2:4", c=8, k=5, h=4, w=4, kernel=3, padding=1)
    weight = layer_weight(case)
    assert Sparsity.of(weight).pattern == "2:4"
    assert (weight.reshape(5, 2, 4, 9) != 0).sum(2).eq(2).all()
    with pytest.raises(ValueError, match="got 6 input channels"):
        layer_weight(replace(case, c=6))
