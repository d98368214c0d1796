from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import zeroskip
from contract.cases import engine_with
from zeroskip.cli.main import app
from zeroskip.cli.show import out_table
from zeroskip.core.device import Device
from zeroskip.core.jsonable import from_json, to_json
from zeroskip.core.record import Record, Times
from zeroskip.measure import peaks as peaks_module
from zeroskip.methods import registry
from zeroskip.model.zoo import BUILDERS
from zeroskip.plan.plan import Plan
from zeroskip.report.records import Writer
from zeroskip.run.engine import Engine

VERBS = ("doctor", "prune", "compile", "run", "bench", "report", "demo")
HEAVY = ("torch", "numpy", "plotly", "matplotlib", "llvmlite")


def call(*arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of ``zeroskip arguments``."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout, " ".join(result.stderr.split())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of the zoo that compiles in no time."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 3, 3, padding=1),
        )

    monkeypatch.setitem(BUILDERS, "tiny", build)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    with Writer(tmp_path / "r.jsonl") as writer:
        name = writer.environment({"id": "e", "device": "a machine"})
        for method, time in (("dense", 4000.0), ("escort", 1000.0)):
            case = {"kind": "layer", "name": "1x1 [red]&", "density": 0.1}
            writer.record(Record("s", case, method, "OK", times=Times((time,), "cpu"), environment=name))
    return tmp_path / "r.jsonl"


def test_help_of_every_verb_works_and_imports_nothing_heavy() -> None:
    code = f"""
import sys
from zeroskip.cli.main import app
for arguments in ([], *([verb] for verb in {VERBS})):
    try:
        app([*arguments, "--help"])
    except SystemExit as leaving:
        assert leaving.code == 0, arguments
print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert all("Usage: " in done.stdout and verb in done.stdout for verb in VERBS)


def test_python_m_zeroskip_works() -> None:
    done = subprocess.run([sys.executable, "-m", "zeroskip", "report"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--out" in done.stderr


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks that take no time to measure."""
    monkeypatch.setattr(peaks_module, "_cpu_peaks", lambda threads: (0.095 * threads, 17.0))
    monkeypatch.setattr(peaks_module, "_cuda_peaks", lambda: ({"fp32": 60.0, "fp16": 900.0}, 3000.0, 5500.0))


@pytest.mark.usefixtures("peaks")
def test_doctor_prints_json_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = json.loads(call("doctor", "--json", "--threads", 2)[0])
    assert facts["peak_gflops"] == 190.0
    assert facts["environment"]["threads"] == 2
    assert facts["compiler"]["error"] == ""
    assert facts["caches"] == {"cpu": str(tmp_path / "zeroskip/cpu"), "cuda": str(tmp_path / "zeroskip/cuda")}
    assert bool(facts["cuda"]["device"]) == torch.cuda.is_available() == (facts["cuda"]["no_device"] == "")
    assert set(facts["extras"]) == {"report", "demo", "bench"}


@pytest.mark.parametrize(("columns", "whole"), [("60", False), ("90", True)])
def test_a_table_too_wide_for_the_terminal_becomes_lists(
    columns: str, whole: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    rows = [("a layer with a long name", "12.345 ms ±10%", "1.234 ms ±1%", "10.00× sputnik")]
    out_table(("case", "dense", "sputnik", "speed-up"), rows, numbers=(1, 2, 3))
    seen = capsys.readouterr().out
    assert all(cell in seen for cell in rows[0][1:])
    assert ("  dense     12.345 ms ±10%\n" in seen) is not whole


@pytest.mark.usefixtures("peaks")
def test_doctor_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zeroskip.cli.doctor.EXTRAS", {"report": ("no_such_module",), "demo": ("json",)})
    monkeypatch.setattr("zeroskip.cuda.compile.ready", lambda: "pip install the compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "120")
    seen = call("doctor")[0]
    assert "missing no_such_module: pip install 'zeroskip[report]'" in seen
    assert f"none: torch {torch.__version__}" in seen
    assert "none: pip install the compiler" in seen
    assert "zeroskip works here." in seen


@pytest.mark.usefixtures("peaks")
def test_doctor_shows_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device("cuda", "NVIDIA H100", 50 * 2**20, arch="sm_90a", num_sms=132, shared_bytes=232448)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peaks_module, "cuda", lambda: gpu)
    monkeypatch.setattr("zeroskip.core.env._cuda", lambda: {"driver": "580.1"})
    monkeypatch.setenv("COLUMNS", "120")
    facts = json.loads(call("doctor", "--json")[0])["cuda"]
    assert facts["device"]["name"] == "NVIDIA H100"
    assert facts["driver"] == "580.1"
    seen = call("doctor")[0]
    for shown in ("NVIDIA H100 (sm_90a), driver 580.1", "900 TFLOP/s", "3000 GB/s", "5500 GB/s"):
        assert shown in seen


def test_prune_writes_the_weights_it_reports(tmp_path: Path, tiny: None) -> None:
    record = json.loads(call("prune", "tiny", "--sparsity", 0.5, "--out", tmp_path / "w.safetensors", "--json")[0])
    pruned = {layer["name"]: layer["nnz"] for layer in record["layers"] if layer["pattern"] != "dense"}
    weights = load_file(tmp_path / "w.safetensors")
    assert pruned == {"2": 288}
    assert int(weights["2.weight"].count_nonzero()) == 288
    assert "total" in call("prune", "tiny", "--out", tmp_path / "w.safetensors")[0]


def test_prune_compile_run_in_a_row(tmp_path: Path, tiny: None) -> None:
    pytest.importorskip("plotly")
    weights, engine, plan, page = (tmp_path / name for name in ("w.safetensors", "m.zsk", "plan.json", "page.html"))
    call("prune", "tiny", "--out", weights)
    call(
        "compile",
        "tiny",
        "--weights",
        weights,
        "--shape",
        "1,3,12,16",
        "--threads",
        1,
        "--out",
        engine,
        "--half",
        "--plan",
        plan,
        "--page",
        page,
    )
    assert len(from_json(Plan, json.loads(plan.read_text())).steps) == 3
    assert "<h1>tiny, 1 × 3 × 12 × 16</h1>" in page.read_text()
    image, x, y = tmp_path / "x.png", tmp_path / "x.npy", tmp_path / "y.npy"
    write_inputs(image, x)
    facts = json.loads(call("run", engine, "--input", x, "--output", y, "--repeat", 2, "--json")[0])
    assert facts["output"] == "1x3x12x16 float32"
    assert read_array(y).equal(zeroskip.load(engine)(read_array(x)))
    call("run", engine, "--input", image, "--output", y, "--repeat", 1)
    grey = torch.full((1, 3, 12, 16), 51 / 255)
    assert read_array(y).equal(zeroskip.load(engine)(grey))


def test_run_names_the_likeliest_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    labels = [f"class {index}" for index in range(7)]
    Engine(engine_with(model, torch.rand(1, 3, 12, 16)).variants, registry(), labels).save(tmp_path / "m.zsk")
    image, x, y = tmp_path / "x.png", tmp_path / "x.npy", tmp_path / "y.npy"
    write_inputs(image, x)
    (found,) = json.loads(call("run", tmp_path / "m.zsk", "--input", image, "--output", y, "--repeat", 1, "--json")[0])[
        "likeliest"
    ]
    chances = read_array(y)[0].softmax(0)
    assert [guess["label"] for guess in found] == [labels[index] for index in chances.argsort(descending=True)[:5]]
    assert [guess["probability"] for guess in found] == pytest.approx(chances.sort(descending=True).values[:5].tolist())
    lines = call("run", tmp_path / "m.zsk", "--input", x, "--repeat", 1)[0].splitlines()
    assert len(lines) == 8
    assert lines[0].lstrip()[0].isdigit()
    assert "class" in lines[4]
    assert lines[6] == "output 1x7 float32"
    assert "class" not in call("run", tmp_path / "m.zsk", "--repeat", 1)[0]
    assert "likeliest" not in json.loads(call("run", tmp_path / "m.zsk", "--repeat", 1, "--json")[0])


def test_compile_takes_the_names_of_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shallow = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setitem(BUILDERS, "shallow", lambda: shallow)
    names, engine = tmp_path / "names.txt", tmp_path / "m.zsk"
    arguments = ("compile", "shallow", "--shape", "1,3,8,8", "--labels", names, "--threads", 1, "--out", engine)
    assert "names.txt" in call(*arguments, code=1)[1]
    names.write_bytes(b"b\xe9b\xe9\n")
    assert "expected the name of a class a line" in call(*arguments, code=1)[1]
    names.write_text("hay\nneedle\npin\n")
    assert "got 3 labels for an output of 2 classes" in call(*arguments, code=1)[1]
    assert not engine.exists()
    names.write_text("hay\nneedle, pin\n", encoding="utf-8")
    call(*arguments)
    assert zeroskip.load(engine).labels == ("hay", "needle, pin")


def write_inputs(image: Path, array: Path) -> None:
    import numpy
    from PIL import Image

    Image.new("RGB", (40, 30), (51, 51, 51)).save(image)
    numpy.save(array, torch.rand(1, 3, 12, 16).numpy())


def read_array(path: Path) -> torch.Tensor:
    import numpy

    return torch.from_numpy(numpy.load(path))


def test_report_makes_a_page_of_results(tmp_path: Path, results: Path) -> None:
    pytest.importorskip("plotly")
    assert str(tmp_path / "p.html") in call("report", results, "--out", tmp_path / "p.html")[0]
    assert "4.00× escort" in (tmp_path / "p.html").read_text()


def test_bench_shows_what_it_measured(tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zeroskip.report.bench.run_suite", lambda *arguments, **options: 0)
    monkeypatch.setenv("COLUMNS", "120")
    seen = call("bench", "suite.toml", "--out", results)[0]
    assert "1x1 [red]&" in seen
    assert "4.00× escort" in seen
    shown = json.loads(call("bench", "suite.toml", "--out", results, "--json")[0])
    assert to_json(from_json(Record, shown["records"][0])) == shown["records"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "nonet", "--out", "w"), "no network is called 'nonet'"),
        (("prune", "squeezenet1_1", "--weights", "absent", "--out", "w"), "absent"),
        (("prune", "squeezenet1_1", "--weights", "broken", "--out", "w"), "not a safetensors file"),
        (("prune", "squeezenet1_1", "--sparsity", 2, "--out", "w"), "sparsity"),
        (("compile", "squeezenet1_1", "--shape", "3,x", "--out", "m"), "expected positive sizes"),
        (("compile", "squeezenet1_1", "--out", "/nowhere/m.zsk"), "there is no folder /nowhere for m.zsk"),
        (("run", "absent.zsk"), "absent.zsk"),
        (("run", "broken"), "broken"),
        (("report", "absent.jsonl", "--out", "p"), "absent.jsonl"),
        (("report", "broken", "--out", "p"), "line 1"),
        (("report", "--plan", "broken", "--out", "p"), "broken"),
        (("report", "--out", "p"), "nothing to report"),
        (("bench", "absent.toml"), "absent.toml"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken").write_text("{not a file of ours")
    seen = call(*arguments, code=1)[1]
    assert seen.startswith("error: ")
    assert message in seen
    assert "Traceback" not in seen


def test_a_wrong_option_is_exit_code_2() -> None:
    call("doctor", "--nonsense", code=2)
    call("prune", "resnet18", "--out", "w", "--scope", "planet", code=2)
