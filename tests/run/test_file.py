"""Save and load: the same plan, close outputs, no code, and clear words for everything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import zeroskip
from contract.cases import OURS, Net, engine_of, engine_with, plan_with, program_of, thin
from run.files import LABELS, everything, in_form, read, save_example, write
from zeroskip.core.errors import FileFormatError, SaveError
from zeroskip.methods import registry
from zeroskip.pack.smallest import FORMS
from zeroskip.run import compile as compile_module
from zeroskip.run.compile import distance
from zeroskip.run.engine import Engine, Variant
from zeroskip.run.file import FORMAT


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 13, 12), generator=torch.Generator().manual_seed(1))


def test_a_loaded_engine_has_the_plan_and_the_values(tmp_path: Path) -> None:
    model, x = everything()
    engine = engine_with(model, x, *OURS)
    engine.save(tmp_path / "model.zsk")
    again = zeroskip.load(tmp_path / "model.zsk")
    assert again.plans == engine.plans
    assert str(again.plan) == str(engine.plan)
    assert distance(again(x), engine(x)) < 1e-6
    assert torch.equal(again(x), again(x))
    with pytest.raises(ValueError, match="compiled for inputs of shape"):
        again(image(1, 3, 13, 12))


def test_our_methods_give_the_same_bits_after_loading(tmp_path: Path) -> None:
    model = thin(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)), 0.3)
    engine = engine_with(model, image(), *OURS)
    engine.save(tmp_path / "model.zsk")
    assert torch.equal(zeroskip.load(str(tmp_path / "model.zsk"))(image()), engine(image()))


def test_saving_what_was_loaded_gives_the_same_file(tmp_path: Path) -> None:
    save_example(tmp_path / "a.zsk")
    zeroskip.load(tmp_path / "a.zsk").save(tmp_path / "b.zsk")
    first, second = read(tmp_path / "a.zsk"), read(tmp_path / "b.zsk")
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_several_shapes_share_their_weights_in_the_file(tmp_path: Path) -> None:
    model = thin(nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)), 0.5)
    programs = [program_of(model, image(n, 3, 8, 8)) for n in (1, 2, 5)]
    one = Engine([Variant(programs[0], plan_with(programs[0], *OURS))], registry())
    three = Engine([Variant(program, plan_with(program, *OURS)) for program in programs], registry())
    one.save(tmp_path / "one.zsk")
    three.save(tmp_path / "three.zsk")
    assert read(tmp_path / "one.zsk")[1].keys() == read(tmp_path / "three.zsk")[1].keys()
    again = zeroskip.load(tmp_path / "three.zsk")
    for n in (1, 2, 5):
        assert torch.equal(again(image(n, 3, 8, 8)), three(image(n, 3, 8, 8)))


def test_pruned_weights_take_at_most_a_bit_each_and_their_nonzeros(tmp_path: Path) -> None:
    model = thin(nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.ReLU(), nn.Conv2d(64, 64, 3, bias=False)), 0.1)
    engine_with(model, image(1, 64, 8, 8)).save(tmp_path / "model.zsk")
    dense_bytes = 2 * 64 * 64 * 9 * 4
    assert (tmp_path / "model.zsk").stat().st_size < dense_bytes * (0.1 + 1 / 32) + 20_000


def test_masked_weights_with_minus_zeros_survive(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False))
    for index in (0, 2):
        torch_prune.random_unstructured(model[index], "weight", 0.8)
    engine = engine_with(model, image(), *OURS)
    engine.save(tmp_path / "model.zsk")
    assert torch.equal(zeroskip.load(tmp_path / "model.zsk")(image()), engine(image()))


def test_buffers_constants_and_other_types_survive(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3)
            self.register_buffer("table", torch.tensor([-0.0, 1.0, 0.0, torch.nan]).reshape(4, 1, 1))
            self.register_buffer("index", torch.arange(4).reshape(4, 1, 1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.a(x)
            return {"a": y + self.table, "b": y * self.index, "c": torch.sigmoid(y)}

    engine = engine_with(thin(Mixed(), 0.3), image(), *OURS)
    engine.save(tmp_path / "model.zsk")
    assert distance(zeroskip.load(tmp_path / "model.zsk")(image()), engine(image())) < 1e-6


def test_every_form_loads(tmp_path: Path) -> None:
    """Also where another one is smaller: a writer may choose."""
    x, y = save_example(tmp_path / "a.zsk")
    document, tensors = read(tmp_path / "a.zsk")
    first = zeroskip.load(tmp_path / "a.zsk")
    for form in FORMS:
        write(tmp_path / "b.zsk", document, in_form(tensors, document, form))
        again = zeroskip.load(tmp_path / "b.zsk")
        for name, tensor in first.variants[0].program.tensors.items():
            assert torch.equal(tensor, again.variants[0].program.tensors[name])
        assert distance(again(x), y) < 1e-6


def test_names_that_would_collide_are_refused(tmp_path: Path) -> None:
    program = program_of(thin(nn.Conv2d(3, 4, 3), 0.05), image())
    (name,) = (name for name, tensor in program.tensors.items() if tensor.dim() == 4)
    engine = engine_of(program.with_tensor(f"{name}:values", torch.ones(3)), *OURS)
    with pytest.raises(SaveError, match="colon"):
        engine.save(tmp_path / "model.zsk")
    assert not (tmp_path / "model.zsk").exists()


def test_variants_that_state_a_tensor_differently_are_refused(tmp_path: Path, example: Path) -> None:
    document, tensors = read(example)
    second = json.loads(json.dumps(document["variants"][0]))
    next(iter(second["graph"]["parameters"].values()))["shape"][0] += 1
    write(tmp_path / "model.zsk", {**document, "variants": [*document["variants"], second]}, tensors)
    with pytest.raises(FileFormatError, match="the graph expects"):
        zeroskip.load(tmp_path / "model.zsk")


LOAD = """
import sys, torch, zeroskip
engine = zeroskip.load(sys.argv[1])
print(torch.equal(engine(torch.load(sys.argv[2])), torch.load(sys.argv[3])))
print([name for name in ("torch._dynamo.symbolic_convert", "contract.cases") if name in sys.modules])
"""


def test_another_process_loads_without_the_model_and_without_dynamo(tmp_path: Path) -> None:
    """The plan has only our methods, so the bits are the same in every process."""
    model = thin(
        Net(lambda net, x: net.b(net.a(x).relu()).sigmoid(), a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 8, 1)), 0.3
    )
    engine = engine_with(model, image(), *OURS)
    engine.save(tmp_path / "model.zsk")
    torch.save(image(), tmp_path / "x.pt")
    torch.save(engine(image()), tmp_path / "y.pt")
    paths = [str(tmp_path / name) for name in ("model.zsk", "x.pt", "y.pt")]
    source = Path(zeroskip.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *paths],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    assert done.stdout.split("\n")[:2] == ["True", "[]"], done.stderr


def test_an_operator_that_a_file_may_not_call_is_named(tmp_path: Path) -> None:
    model = thin(Net(lambda net, x: torch.special.bessel_j0(net.a(x)), a=nn.Conv2d(3, 4, 3)), 0.3)
    engine = engine_with(model, image(), *OURS)
    assert engine(image()).shape == (2, 4, 11, 10)
    with pytest.raises(SaveError, match=r"aten\.special_bessel_j0\.default"):
        engine.save(tmp_path / "model.zsk")
    assert not (tmp_path / "model.zsk").exists()


# -- labels ----------------------------------------------------------------------------------------------------
def test_labels_come_back_and_a_file_without_them_has_none(tmp_path: Path) -> None:
    save_example(tmp_path / "a.zsk")
    assert zeroskip.load(tmp_path / "a.zsk").labels == LABELS
    document, tensors = read(tmp_path / "a.zsk")
    del document["labels"]
    write(tmp_path / "b.zsk", document, tensors)
    again = zeroskip.load(tmp_path / "b.zsk")
    assert again.labels is None
    again.save(tmp_path / "c.zsk")
    assert "labels" not in read(tmp_path / "c.zsk")[0]


@pytest.mark.parametrize(
    "labels", [[], list("abcd"), list("abcdef"), "abcde", None, 5, [1, 2, 3, 4, 5], list("abc\x1be")]
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, example: Path, labels: object) -> None:
    document, tensors = read(example)
    write(tmp_path / "model.zsk", document | {"labels": labels}, tensors)
    with pytest.raises(FileFormatError, match="labels"):
        zeroskip.load(tmp_path / "model.zsk")


def test_labels_are_checked_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **options: object) -> None:
        pytest.fail("measures")

    monkeypatch.setattr(compile_module, "tune_program", never)
    classifier = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="got 3 labels for an output of 4 classes"):
        zeroskip.compile(classifier, image(), labels=["a", "b", "c"])
    with pytest.raises(ValueError, match="printable strings"):
        zeroskip.compile(classifier, image(), labels="abcd")
    with pytest.raises(ValueError, match=r"one tensor \[n, classes\], this one returns Value\(shape=\(2, 4, 11, 10\)"):
        zeroskip.compile(nn.Conv2d(3, 4, 3), image(), labels=["a", "b", "c", "d"])
    two = Net(lambda net, x: (net.a(x).flatten(1), x), a=classifier)
    with pytest.raises(ValueError, match="one tensor"):
        zeroskip.compile(two, image(), labels=["a", "b", "c", "d"])


# -- what is no file of ours -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model.zsk"
    save_example(path)
    return path


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        zeroskip.load(tmp_path / "nothing.zsk")
    with pytest.raises(FileNotFoundError, match="no file"):
        zeroskip.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 100, b"PK\x03\x04" * 20, b'{"a": 1}'])
def test_other_contents_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.zsk").write_bytes(content)
    with pytest.raises(FileFormatError):
        zeroskip.load(tmp_path / "model.zsk")


def test_a_foreign_safetensors_file_is_told_apart(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "model.zsk")
    with pytest.raises(FileFormatError, match="without zeroskip's metadata"):
        zeroskip.load(tmp_path / "model.zsk")


def test_a_newer_format_says_what_to_do(tmp_path: Path, example: Path) -> None:
    document, tensors = read(example)
    write(tmp_path / "model.zsk", {**document, "format": FORMAT + 1}, tensors)
    with pytest.raises(FileFormatError, match=rf"has format {FORMAT + 1}.*update zeroskip"):
        zeroskip.load(tmp_path / "model.zsk")


def test_an_older_format_says_what_to_do(tmp_path: Path, example: Path) -> None:
    document, tensors = read(example)
    write(tmp_path / "model.zsk", {**document, "format": FORMAT - 1}, tensors)
    with pytest.raises(FileFormatError, match=rf"has format {FORMAT - 1}.*compile the model and save it again"):
        zeroskip.load(tmp_path / "model.zsk")


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '{"format": 1}', '{"format": 1, "variants": []}', "[" * 100_000]
)
def test_other_metadata_is_refused(tmp_path: Path, example: Path, text: str) -> None:
    safetensors.torch.save_file(read(example)[1], tmp_path / "model.zsk", metadata={"zeroskip": text})
    with pytest.raises(FileFormatError):
        zeroskip.load(tmp_path / "model.zsk")


def test_a_forbidden_operator_in_a_file_is_named(tmp_path: Path, example: Path) -> None:
    document, tensors = read(example)
    node = next(node for node in document["variants"][0]["graph"]["nodes"] if "hardswish" in node["op"])
    node["op"] = "aten.from_file.default"
    write(tmp_path / "model.zsk", document, tensors)
    with pytest.raises(FileFormatError, match=r"aten\.from_file\.default.*not allowed"):
        zeroskip.load(tmp_path / "model.zsk")


def test_a_huge_tensor_that_is_not_there_costs_no_memory(tmp_path: Path, example: Path) -> None:
    document, tensors = read(example)
    text = json.dumps(document).replace(
        '"a.weight": {"shape": [8, 3, 3, 3]', f'"a.weight": {{"shape": [{2**40}, 3, 3, 3]'
    )
    assert str(2**40) in text
    safetensors.torch.save_file(tensors, tmp_path / "model.zsk", metadata={"zeroskip": text})
    with pytest.raises(FileFormatError):
        zeroskip.load(tmp_path / "model.zsk")


def edit_plan(path: Path, source: Path, **change: object) -> None:
    """Change the first step's configuration (``config_...``), the device (``device_...``) or the step."""
    document, tensors = read(source)
    plan = document["variants"][0]["plan"]
    for name, value in change.items():
        where, _, field = name.partition("_")
        target = {"config": plan["steps"][0]["config"], "device": plan["device"], "step": plan["steps"][0]}[where]
        assert field in target
        target[field] = value
    write(path, document, tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"config_images": 3},
        {"config_images": 30, "config_rows": 1, "config_cols": 8, "config_chains": 1},
        {"config_block_channels": 2**22},
        {"config_block_channels": 2**40},
        {"config_chunks": 10**7},
        {"config_rows": 0},
        {"config_lanes": 3},
        {"config_flat": True},
        {"device_kind": "cuda"},
        {"device_threads": 0},
        {"device_threads": -1},
        {"device_threads": 10**6},
        {"device_threads": 10**4},
        {"step_nodes": ["nowhere"]},
        {"step_nodes": []},
        {"step_nodes": ["max_pool2d"]},
        {"step_nodes": ["a", "b"]},
        {"step_method": "dense"},
        {"step_method": "nothing"},
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_is_refused_before_any_kernel_runs(
    tmp_path: Path, example: Path, change: dict[str, object]
) -> None:
    edit_plan(tmp_path / "model.zsk", example, **change)
    with pytest.raises(FileFormatError):
        zeroskip.load(tmp_path / "model.zsk")


@pytest.mark.parametrize(
    "pool", [([-1, -1], [2, 2], [-1, -1]), ([3, 3], [0, 0], [1, 1]), ([0, 0], [2, 2], [0, 0]), ([7, 7], [2, 2], [5, 5])]
)
def test_an_impossible_pooling_is_refused(tmp_path: Path, example: Path, pool: tuple[list[int], ...]) -> None:
    document, tensors = read(example)
    node = next(node for node in document["variants"][0]["graph"]["nodes"] if "max_pool" in node["op"])
    node["args"]["tuple"][1:] = list(pool)
    write(tmp_path / "model.zsk", document, tensors)
    with pytest.raises(FileFormatError):
        zeroskip.load(tmp_path / "model.zsk")


@pytest.mark.parametrize(("more", "named"), [([1], {}), ([], {"dict": {"a": None}})])
@pytest.mark.parametrize("operator", ["adaptive_avg_pool", "view"])
def test_an_operator_with_arguments_that_it_does_not_take_is_refused(
    tmp_path: Path, example: Path, operator: str, more: list[object], named: dict[str, object]
) -> None:
    document, tensors = read(example)
    node = next(node for node in document["variants"][0]["graph"]["nodes"] if operator in node["op"])
    node["args"]["tuple"] += more
    node["kwargs"] = named or node["kwargs"]
    write(tmp_path / "model.zsk", document, tensors)
    with pytest.raises(FileFormatError):
        zeroskip.load(tmp_path / "model.zsk")


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "nn", "Tensor", "float33"])
def test_values_of_another_type_are_refused(tmp_path: Path, example: Path, dtype: str) -> None:
    document, tensors = read(example)
    for value in document["variants"][0]["graph"]["values"].values():
        value["dtype"] = dtype
    write(tmp_path / "model.zsk", document, tensors)
    with pytest.raises(FileFormatError):
        zeroskip.load(tmp_path / "model.zsk")


def test_a_hand_made_program_can_be_saved_too(tmp_path: Path) -> None:
    program = program_of(thin(nn.Conv2d(3, 4, 3), 0.3), image())
    engine_of(program, *OURS).save(tmp_path / "model.zsk")
    assert zeroskip.load(tmp_path / "model.zsk").variants[0].program.graph == program.graph


def test_statistics_for_fewer_channels_than_there_are_are_refused(tmp_path: Path) -> None:
    """torch would read beyond them."""
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(16), nn.ReLU())
    program = program_of(model, torch.randn(1, 16, 3, 3))
    engine_of(program).save(tmp_path / "right.zsk")
    zeroskip.load(tmp_path / "right.zsk")
    for name in program.graph.parameters:
        few = program.with_tensor(name, torch.ones(1))
        Engine([Variant(few, plan_with(few))], registry()).save(tmp_path / "few.zsk")
        with pytest.raises(FileFormatError, match=r"one for each channel|says"):
            zeroskip.load(tmp_path / "few.zsk")
