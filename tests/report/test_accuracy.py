"""Accuracy, bytes and speed of trained networks, from records made by hand."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from zeroskip.cli.main import app
from zeroskip.core.errors import FileFormatError
from zeroskip.core.record import Record, Times
from zeroskip.pruning import LayerRecord, PruneConfig, PruneRecord, Trained, TrainedFile
from zeroskip.report import charts, plots
from zeroskip.report.accuracy import Treatment, front, paretos, read_trained, treatments
from zeroskip.report.accuracy_tables import EASY, accuracy_table, goals_table, times_table
from zeroskip.report.records import RecordFile, Writer

FACTS = {"id": "e", "device": "a machine"}
CONFIGS = {
    "parent": PruneConfig(0.0),
    "dense": PruneConfig(0.0),
    "unstructured-90": PruneConfig(0.9),
    "unstructured-95": PruneConfig(0.95),
    "2of4": PruneConfig(None, "2:4"),
    "filters-half": PruneConfig(0.293, "filters"),
}
WEIGHTS = 1_000_000


def trained(row: str, accuracy: float, seed: int = 0, network: str = "resnet18", share: float = 0.1) -> Trained:
    """``share`` of weights, MACs and, in fp16, of the file."""
    layers = PruneRecord((LayerRecord("conv", WEIGHTS, round(share * WEIGHTS), "unstructured"),))
    return Trained(
        network=network,
        row=row,
        seed=seed,
        pruning=CONFIGS[row],
        settings={"epochs": 3},
        layers=layers,
        log=(),
        holdout=0.5,
        accuracy=accuracy,
        macs=round(share * 50_000_000),
        file_bytes=round(2 * share * WEIGHTS),
        seconds=1.0,
        environment="e",
    )


def speeds(
    row: str, times_us: Mapping[str, float], device: str = "cpu", network: str = "resnet18", **more: object
) -> list[Record]:
    """Of seed 0; our engine holds 500 kB."""
    case: dict[str, object] = {"kind": "model", "name": network, "mask": f"trained:{network}-{row}-s0.safetensors"}
    case |= {"density": 0.1, "batch": 1, "image": [3, 112, 112]}
    case |= {"threads": 1} if device == "cpu" else {"device": device, "precision": "fp16"}
    return [
        Record(
            "trained",
            case,
            method,
            "OK",
            times=Times((time,), "cpu"),
            setup={"packed_bytes": 5e5} if method == "zeroskip" else {},
            environment="e",
            **more,  # type: ignore[arg-type]
        )
        for method, time in times_us.items()
    ]


def file(*parts: Sequence[Record]) -> RecordFile:
    return RecordFile({"e": FACTS}, tuple([record for part in parts for record in part]))


THREE = [trained("dense", value, seed, share=1.0) for seed, value in enumerate((0.970, 0.974, 0.972))]
NINETY = [trained("unstructured-90", value, seed) for seed, value in enumerate((0.965, 0.967, 0.963))]
SPEEDS = file(
    speeds("dense", {"torch": 4000.0, "onnxruntime": 2000.0, "zeroskip": 2400.0}),
    speeds("unstructured-90", {"torch": 4000.0, "onnxruntime": 1900.0, "zeroskip": 500.0}),
    speeds("filters-half", {"torch": 2500.0, "onnxruntime": 1000.0, "zeroskip": 1250.0}),
    speeds("dense", {"torch": 300.0, "zeroskip": 200.0}, "cuda"),
    speeds("2of4", {"torch": 300.0, "zeroskip": 160.0}, "cuda"),
)


def by_name(rows: Sequence[Treatment]) -> dict[str, Treatment]:
    return {one.name: one for one in rows}


def cells(rows: Sequence[Treatment], treatment: str) -> dict[str, str]:
    """A row of the table by its heads; of two equal heads the later."""
    table = accuracy_table(rows)
    (row,) = [row for row in table.rows if row[1] == treatment]
    return dict(zip(table.head, row, strict=True))


# -- rows ---------------------------------------------------------------------------------------------
def test_three_seeds_have_a_mean_and_a_spread_and_one_says_so() -> None:
    rows = treatments([*THREE, *NINETY, trained("unstructured-95", 0.96)])
    found = by_name(rows)
    assert found["unstructured-90"].accuracy == pytest.approx(0.965)
    assert found["unstructured-90"].spread == pytest.approx(0.4)
    assert found["unstructured-90"].below == pytest.approx(0.7)
    assert found["unstructured-95"].spread is None
    shown = cells(rows, "unstructured-90")
    assert (shown["seeds"], shown["top-1"], shown["spread"]) == ("3", "96.50%", "0.40")
    assert shown["points below dense"] == "0.70"
    assert (shown["MB of file"], shown["of dense fp32"]) == ("0.20", "5.0%")
    assert (shown["nonzeros"], shown["of weights"]) == ("100,000", "10.0%")
    assert (shown["million MACs left"], shown["of dense"]) == ("5.0", "10.0%")
    assert cells(rows, "unstructured-95")["spread"] == "one seed"


def test_dense_is_the_dense_row_and_not_the_parent() -> None:
    rows = treatments([trained("unstructured-90", 0.96), trained("parent", 0.99, share=1.0), *THREE])
    assert [one.name for one in rows] == ["parent", "dense", "unstructured-90"]
    assert by_name(rows)["unstructured-90"].below == pytest.approx(1.2)
    assert cells(rows, "dense")["points below dense"] == "0.00"


def test_without_a_dense_row_nothing_is_said_about_it() -> None:
    timed = file(speeds("unstructured-90", {"zeroskip": 500.0}))
    rows = treatments([trained("parent", 0.99), *NINETY], timed)
    shown = cells(rows, "unstructured-90")
    assert shown["points below dense"] == shown["of dense"] == ""
    assert shown["top-1"] == "96.50%"
    assert shown["speed-up, CPU fp32, 1 thread, batch 1 @112x112"] == ""
    assert times_table(rows).rows[0][3:] == ("", "0.500 zeroskip", "")
    assert paretos(rows) == []


def test_a_dense_row_that_was_not_timed_takes_as_long_as_rows_with_masks_run_dense() -> None:
    filters = trained("filters-half", 0.96, share=0.5)
    timed = file(
        speeds("unstructured-90", {"torch": 4000.0, "zeroskip_dense": 2100.0, "zeroskip": 500.0}),
        speeds("2of4", {"onnxruntime": 2000.0, "zeroskip_dense": 1900.0, "zeroskip": 2200.0}),
        speeds("filters-half", {"onnxruntime": 1000.0, "zeroskip_dense": 1500.0}),
    )
    rows = treatments([*THREE, *NINETY, trained("2of4", 0.97), filters], timed)
    found = {row[1]: row[3:] for row in times_table(rows).rows}
    dense = "1.900 zeroskip_dense"
    assert found == {
        "unstructured-90": (dense, "0.500 zeroskip", "3.80x"),
        "2of4": (dense, "2.200 zeroskip", "0.86x"),
        "filters-half": (dense, "1.000 onnxruntime", "1.90x"),
    }


def test_processors_of_one_name_and_different_instructions_do_not_mix() -> None:
    newer = [replace(record, environment="f") for record in speeds("unstructured-90", {"zeroskip": 400.0})]
    both = file(speeds("dense", {"torch": 2000.0}), speeds("unstructured-90", {"zeroskip": 500.0}), newer)
    cpu = FACTS | {"kind": "cpu", "torch_cpu": "AVX2"}
    both = replace(both, environments={"e": cpu, "f": cpu | {"torch_cpu": "AVX512"}})
    found = by_name(treatments([*THREE, *NINETY], both))["unstructured-90"]
    assert {setting.machine: speed.speedup for setting, speed in found.speeds.items()} == {
        "a machine, AVX2": pytest.approx(4.0),
        "a machine, AVX512": None,
    }


# -- speed --------------------------------------------------------------------------------------------
def test_what_was_not_measured_is_empty() -> None:
    rows = treatments([*THREE, *NINETY])
    shown = cells(rows, "unstructured-90")
    for head in ("speed-up, CPU", "speed-up, GPU", "MB in memory, CPU", "MB in memory, GPU"):
        assert shown[head] == ""
    assert times_table(rows).rows == ()


def test_zeros_count_with_our_engine_and_filters_with_whatever_is_fastest() -> None:
    rows = treatments([*THREE, *NINETY, trained("filters-half", 0.96, share=0.5), trained("2of4", 0.97)], SPEEDS)
    cpu, gpu = "CPU fp32, 1 thread, batch 1 @112x112", "GPU fp16, batch 1 @112x112"
    shown = {name: cells(rows, name) for name in by_name(rows)}
    # ONNX Runtime takes 2000 for the dense network; on the pruned one it is dense as well and does not count.
    assert shown["unstructured-90"][f"speed-up, {cpu}"] == "4.00x"
    assert shown["filters-half"][f"speed-up, {cpu}"] == "2.00x"
    assert shown["dense"][f"speed-up, {cpu}"] == "1.00x"
    assert shown["unstructured-90"][f"MB in memory, {cpu}"] == "0.50"
    # A dense network has no zeros: what our engine does with it is an opponent.
    assert shown["2of4"][f"speed-up, {gpu}"] == "1.25x"
    assert shown["2of4"][f"speed-up, {cpu}"] == shown["unstructured-90"][f"speed-up, {gpu}"] == ""
    timed = {(row[1], row[2]): row[3:] for row in times_table(rows).rows}
    assert timed["filters-half", cpu.replace("CPU", "a machine,")] == (
        "2.000 onnxruntime",
        "1.000 onnxruntime",
        "2.00x",
    )


def test_a_busy_machine_gets_no_ratio_and_no_point() -> None:
    busy = file(speeds("dense", {"torch": 2000.0}), speeds("unstructured-90", {"zeroskip": 500.0}, contended=True))
    rows = treatments([*THREE, *NINETY], busy)
    assert cells(rows, "unstructured-90")["speed-up, CPU fp32, 1 thread, batch 1 @112x112"] == "CONTENDED"
    assert paretos(rows) == []


def test_other_machines_and_other_networks_do_not_mix() -> None:
    elsewhere = [replace(record, environment="f") for record in speeds("unstructured-90", {"zeroskip": 1.0})]
    both = file(speeds("dense", {"torch": 2000.0}), elsewhere, speeds("dense", {"torch": 9.0}, network="vgg19_bn"))
    both = replace(both, environments={"e": FACTS, "f": {"id": "f", "device": "another"}})
    rows = treatments([*THREE, *NINETY], both)
    found = by_name(rows)["unstructured-90"]
    heads = [head for head in accuracy_table(rows).head if head.startswith("speed-up")]
    assert [head.split(",")[1] for head in heads] == [" a machine", " another", " GPU"]
    assert [speed.speedup for speed in found.speeds.values()] == [None]


def test_several_seeds_timed_are_averaged_and_the_later_measurement_counts() -> None:
    second = [
        replace(record, case=record.case | {"mask": "trained:resnet18-unstructured-90-s1.safetensors"})
        for record in speeds("unstructured-90", {"zeroskip": 2000.0})
    ]
    again = file(SPEEDS.records, second, speeds("unstructured-90", {"zeroskip": 125.0}))
    found = by_name(treatments([*THREE, *NINETY], again))["unstructured-90"]
    assert found.speeds[min(found.speeds, key=lambda one: one.rank)].speedup == pytest.approx(2000 / 500)


# -- goals --------------------------------------------------------------------------------------------
def test_goals_are_met_missed_or_empty() -> None:
    vgg = [trained("dense", 0.975, seed, "vgg19_bn", 1.0) for seed in range(3)]
    vgg += [trained("unstructured-90", 0.965, seed, "vgg19_bn") for seed in range(3)]
    vgg += [trained("unstructured-95", 0.960, seed, "vgg19_bn") for seed in range(3)]
    rows = treatments([*THREE, *NINETY, trained("2of4", 0.972), *vgg])
    shown = {row[0]: row[1:] for row in goals_table(rows).rows}
    assert shown["ResNet-18, unstructured-90: points below dense"] == ("1", "0.3", "0.70", "wanted")
    assert shown["VGG-19-BN, unstructured-90: points below dense"] == ("1", "0.3", "1.00", "wanted")
    assert shown["VGG-19-BN, unstructured-95: points below dense"] == ("", "1", "1.50", "missed")
    assert shown["ResNet-18, unstructured-95: points below dense"] == ("", "1", "", "")
    assert shown["ResNet-18, 2of4: points below dense"] == ("0.5", "", "0.00", "1 of 3 seeds")
    assert shown["VGG-19-BN, 2of4: points below dense"] == ("0.5", "", "", "")
    assert shown["ResNet-18, unstructured-90: file, % of dense fp32"] == ("15", "8", "5.00", "hoped for")


def test_goals_are_those_of_imagenette() -> None:
    assert goals_table(treatments([trained("dense", 0.9, network="lenet")])).rows == ()


# -- pareto -------------------------------------------------------------------------------------------
def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 97.0), (2.0, 96.0), (1.5, 95.0), (3.0, 96.0), (4.0, 90.0), (4.0, 91.0), (0.5, 97.0)]
    assert front(points) == [(1.0, 97.0), (3.0, 96.0), (4.0, 91.0)]
    assert front([]) == []


def test_a_chart_for_each_setting_with_a_trace_for_each_network(tmp_path: Path) -> None:
    vgg = [trained("dense", 0.98, network="vgg19_bn", share=1.0), trained("2of4", 0.99, network="vgg19_bn")]
    more = [
        *speeds("dense", {"torch": 9000.0}, network="vgg19_bn"),
        *speeds("2of4", {"zeroskip": 6000.0}, network="vgg19_bn"),
    ]
    rows = treatments(
        [*THREE, *NINETY, trained("filters-half", 0.96), trained("2of4", 0.97), *vgg], file(SPEEDS.records, more)
    )
    cpu, gpu = paretos(rows)
    assert (cpu.setting.device, gpu.setting.device) == ("cpu", "cuda")
    assert list(cpu.networks) == ["resnet18", "vgg19_bn"]
    assert list(gpu.networks) == ["resnet18"]
    drawn = charts.pareto(cpu, {"resnet18": "#0072B2", "vgg19_bn": "#E69F00"})["data"]
    lines, points = drawn[::2], drawn[1::2]
    assert [trace["name"] for trace in points] == ["resnet18", "vgg19_bn"]
    assert points[0]["text"] == ["dense", "90%", "filters-half"]
    assert points[0]["x"] == pytest.approx([1.0, 4.0, 2.0])
    # Filters are slower than 90% zeros and less accurate; 2:4 of VGG beats its dense row in both.
    assert lines[0]["x"] == pytest.approx([1.0, 4.0])
    assert lines[1]["x"] == pytest.approx([1.5])
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        assert plots.paretos([cpu, gpu], tmp_path / name, "Accuracy over speed-up")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    ElementTree.fromstring((tmp_path / "a.svg").read_bytes())
    assert plots.paretos([cpu], tmp_path / "one.svg", "One")
    assert plots.paretos([cpu, gpu, cpu], tmp_path / "three.svg", "Three")
    assert not plots.paretos([], tmp_path / "none.svg", "None")
    assert not (tmp_path / "none.svg").exists()


# -- files, the page, the documentation ---------------------------------------------------------------
def write(path: Path, rows: Sequence[Trained]) -> Path:
    found = TrainedFile(path)
    for row in rows:
        found.add(row, FACTS)
    return path


def write_records(path: Path, records: RecordFile) -> Path:
    with Writer(path) as writer:
        writer.environment(FACTS)
        for record in records.records:
            writer.record(record)
    return path


def test_the_later_file_wins_and_other_settings_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [*THREE, *NINETY])
    second = write(tmp_path / "b.jsonl", [trained("dense", 0.5)])
    assert {row.key: row.accuracy for row in read_trained([first, second])}["resnet18", "dense", 0] == 0.5
    other = write(tmp_path / "c.jsonl", [replace(trained("2of4", 0.9), settings={"epochs": 9})])
    with pytest.raises(FileFormatError, match=r"resnet18: dense .* and 2of4 .* different epochs"):
        read_trained([first, other])


def report(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return done.exit_code, " ".join(done.output.split())


def test_the_page_shows_accuracy_and_speed(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    networks = write(tmp_path / "trained.jsonl", [*THREE, *NINETY])
    results, page = write_records(tmp_path / "r.jsonl", SPEEDS), tmp_path / "page.html"
    code, seen = report(results, "--trained", networks, "--out", page)
    assert code == 0, seen
    text = page.read_text()
    for part in (
        "Accuracy and speed",
        "96.50%",
        "0.40",
        "4.00x",
        "times faster than dense",
        "Trained networks as JSON",
    ):
        assert part in text
    assert "Ten classes at 112 pixels are an easy task" in text
    assert text.index("Accuracy and speed") < text.index("Measurements")
    assert report("--trained", networks, "--out", page)[0] == 0
    alone = page.read_text()
    assert "96.50%" in alone
    assert "times faster than dense" not in alone
    assert "<h2>Measurements" not in alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trained", "absent.jsonl"), "absent.jsonl: there is no such file"),
        (("--trained", "empty.jsonl"), "empty.jsonl: holds no trained network"),
        (("--trained", "picture.png"), "picture.png: got bytes that are no text"),
        (("--trained", "results.jsonl"), "got 'record', expected an environment with an id or a trained network"),
        (("trained.jsonl",), "give this file as --trained"),
        ((), "--trained trained.jsonl"),
    ],
)
def test_a_wrong_file_is_said(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    Path("picture.png").write_bytes(b"\x89PNG\xff\xfe")
    write(Path("trained.jsonl"), THREE)
    write_records(Path("results.jsonl"), SPEEDS)
    code, seen = report(*arguments, "--out", "page.html")
    assert code == 1
    assert message in seen
    assert not Path("page.html").exists()


def test_the_documentation_is_written_where_there_are_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("figures_tool", Path(__file__).parents[2] / "tools" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "figures_tool", tool)
    spec.loader.exec_module(tool)
    results, docs = tmp_path / "benchmarks" / "results", tmp_path / "docs"
    results.mkdir(parents=True)
    docs.mkdir()
    for name, value in (("ROOT", tmp_path), ("RESULTS", results), ("DOCS", docs)):
        monkeypatch.setattr(tool, name, value)
    write_records(results / "cpu.jsonl", SPEEDS)
    tool.accuracy()
    assert list(docs.iterdir()) == []
    write(results / "h100" / "trained-resnet18.jsonl", [*THREE, *NINETY])
    tool.accuracy()
    text = (docs / "ACCURACY.md").read_text()
    assert EASY in text
    for part in (
        "(../benchmarks/results/h100/trained-resnet18.jsonl)",
        "![Accuracy over speed-up](accuracy.svg)",
        "## Wanted and reached",
        "| ResNet-18 | unstructured-90 | 3 | 96.50% | 0.40 | 0.70 |",
        "| 2.000 onnxruntime | 0.500 zeroskip | 4.00x |",
    ):
        assert part in text
    ElementTree.fromstring((docs / "accuracy.svg").read_bytes())
