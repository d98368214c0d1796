"""Tables and pictures of the GPU, also from a part of the records only."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from report import gpu_records as made
from zeroskip.report import columns, networks, plots, rivals
from zeroskip.report.networks import networks_table
from zeroskip.report.products import (
    VENDOR_DENSE,
    Products,
    ablation_table,
    batches_table,
    best,
    columns_table,
    geometric_mean,
    latest,
    masks_table,
    searched,
    sparsity_table,
    vendor_best,
)
from zeroskip.report.records import RecordFile, Writer
from zeroskip.report.tables import Table

pytest.importorskip("matplotlib", reason="figures need zeroskip[report]")


def products(file: RecordFile) -> Products:
    return Products(latest(file))


def cells(table: Table, row: int = 0) -> dict[str, str]:
    return dict(zip(table.head, table.rows[row], strict=True))


def only(file: RecordFile, *methods: str) -> RecordFile:
    return replace(file, records=tuple([record for record in file.records if record.method in methods]))


def test_figure_10_holds_every_column_and_the_ratio_to_cublas_of_its_own() -> None:
    table = columns_table(products(made.figure_10()))
    assert [row[0] for row in table.rows] == [*made.SHAPES, "geometric mean"]
    first = cells(table)
    assert (first["cuBLAS fp32"], first["cuBLAS TF32"], first["cuBLAS fp16"]) == ("8.00", "3.00", "2.00")
    assert (first["Sputnik"], first["our best other"], first["our best fp16"]) == ("5.00", "4.00", "2.50")
    assert first["over cuBLAS fp32"] == "2.00x slab"
    assert first["floor"] == "1.25"
    assert cells(table, 2)["over cuBLAS fp32"] == "2.00x"


def test_the_vendors_sparse_library_and_ablations_are_not_ours() -> None:
    case = made.layer("a")
    (found,) = latest(made.file(made.records(case, {"cusparse": 1.0, "sputnik:x": 2.0, "cublas": 3.0, "slab": 4.0})))
    record = best(found)
    assert record is not None
    assert record.method == "slab"


def test_impossible_and_wrong_times_are_not_looked_up() -> None:
    file = made.figure_10()
    records = [replace(record, status="IMPLAUSIBLE") if record.method == "slab" else record for record in file.records]
    first = cells(columns_table(products(replace(file, records=tuple(records)))))
    assert (first["our best other"], first["over cuBLAS fp32"]) == ("", "1.60x sputnik")


def test_a_later_measurement_of_a_case_replaces_the_earlier_and_other_machines_stay_apart() -> None:
    case = made.layer("a")
    old, new = made.records(case, {"slab": 9.0, "cublas": 9.0}), made.records(case, {"slab": 5.0})
    other = [replace(record, environment="h200") for record in made.records(made.layer("b"), {"slab": 1.0})]
    older = [replace(record, environment="g0") for record in old]
    environments = {
        "g0": made.ENVIRONMENT | {"id": "g0"},
        "g1": made.ENVIRONMENT,
        "h200": {"id": "h200", "device": "H200"},
    }
    (found,) = latest(RecordFile(environments, (*older, *other, *new)))
    assert found.environment == "g1"
    assert set(found.times) == {"slab"}
    busy = [replace(one, contended=True) for one in made.records(case, {"cusparse": 9.0, "slab": 9.0})]
    (quiet,) = latest(made.file([*made.records(case, {"slab": 4.0}), *busy]))
    assert {method: times.median_us for method, times in quiet.times.items()} == {"slab": 4.0}
    assert latest(made.file(busy)) == []
    assert latest(RecordFile({}, ())) == []


def test_masks_and_batches_and_sparsities() -> None:
    found = products(made.figure_10())
    assert cells(masks_table(found)) == {
        "M,K,N": made.SHAPES[0],
        "random": "4.00",
        "clustered": "4.40",
        "trained": "4.20",
        "apart": "10%",
    }
    assert cells(batches_table(found))["8, warm"] == "10.00 (4.00x, 3.00x)"
    table = sparsity_table(products(made.figure_11()))
    assert table.head[2:] == ("50%", "90%", "98%")
    assert ("slab", "fp32", "8.00", "3.20", "2.24") in table.rows


def test_an_ablation_is_how_many_times_longer_it_takes() -> None:
    first = cells(ablation_table(products(made.ablations())))
    assert (first["zeros"], first["whole"], first["no row swizzle"], first["no subwarps"]) == (
        "50%",
        "5.00",
        "1.10x",
        "1.60x",
    )


PEAKS = made.ENVIRONMENT["peak_tflops"]
NINE = {"mask": "random", "density": 0.1, "batch": 1}


def test_the_fastest_dense_is_of_the_vendors_libraries_only() -> None:
    times = {"dense": 1.0, "slab": 1.0, "cusparse": 1.0, "cublas": 8.0, "cublaslt": 6.0, "triton": 5.0}
    (found,) = latest(made.file(made.records(made.layer("a"), times)))
    record = vendor_best(found)
    assert record is not None
    assert record.method == "triton"
    assert vendor_best(None) is None
    assert searched([found])
    assert not searched([None, *latest(made.figure_10())])


def test_ours_stand_against_the_fastest_dense_of_each_column() -> None:
    found = products(made.searched_figure_10())
    table = rivals.versus_table(found, PEAKS, cache="warm", **NINE)
    assert [row[0] for row in table.rows] == [*made.SHAPES, "geometric mean"]
    first, mean = cells(table), cells(table, 2)
    assert first["dense fp32"] == "6.00 cublaslt"
    assert first["dense TF32"] == "2.00 triton"
    assert first["dense fp16"] == "1.50 cublaslt"
    assert (first["ours fp32"], first["next"], first["ours fp16"]) == ("4.00 slab", "5.00 sputnik", "1.00 slab")
    assert (first["over fp32"], first["over TF32"], first["over fp16"]) == ("1.50x", "0.50x", "1.50x")
    assert (mean["over fp32"], mean["over TF32"], mean["over fp16"]) == ("1.50x", "0.50x", "1.50x")
    table = rivals.times_table(found, VENDOR_DENSE.__contains__, cache="warm", **NINE)
    assert table.head == ("layer", "column", "cublas", "cublas_epilogue", "cublaslt", "cublaslt_epilogue", "triton")
    assert table.rows[2] == (made.SHAPES[0], "TF32", "3.00", "", "2.50", "", "2.00")


def test_a_floor_of_dense_is_its_arithmetic_at_the_columns_peak() -> None:
    case = made.layer("a", c=1000, k=1000, h=1, w=1000)  # 2 GFLOP
    (record,) = made.records(case, {"cublas": 50.0})
    floors = [rivals.dense_floor_us(record, column, PEAKS) for column in rivals.COLUMNS]
    assert floors == pytest.approx([20.0, 2e3 / 300, 2e3 / 700])  # fp32: as three TF32 products
    assert rivals.dense_floor_us(record, "fp32", {}) == record.floor_us


@pytest.mark.parametrize(
    ("dense", "ours", "why"),
    [
        (30.0, 40.0, "dense is faster"),
        (30.0, 19.0, "no dense can: its floor is 20.00"),
        (30.0, 25.0, "dense takes 1.5 times its floor of 20.00"),
        (30.0, None, ""),
    ],
)
def test_why_not_dense(dense: float, ours: float | None, why: str) -> None:
    case = made.layer("a", c=1000, k=1000, h=1, w=1000)
    found = products(made.file(made.records(case, {"cublas": dense} | ({"slab": ours} if ours else {}))))
    assert rivals.duel(found, found.all[0], "fp32", PEAKS).why == why


def test_sputnik_s_own_code_is_held_against_ours_by_what_cublas_took() -> None:
    table = rivals.sputnik_table(products(made.figure_10()))
    first = cells(table)
    assert (first["Sputnik's own code"], first["ours"], first["our sputnik or slab"]) == ("1.05", "0.50", "0.50")
    own = [rivals.SPUTNIK_US[name] for name in made.SHAPES]
    mean = geometric_mean(2 * code / dense for code, dense in own)
    assert cells(table, -1)["ours"] == f"{mean:.2f}x"
    assert rivals.sputnik_table(Products([])).rows == ()


def test_half_the_bytes_are_held_against_all() -> None:
    table = columns.halves_table(products(made.searched_figure_10()), PEAKS)
    assert [row[0] for row in table.rows] == list(made.SHAPES)
    assert (cells(table)["1, warm"], cells(table)["1, cold"], cells(table)["8, warm"]) == ("4.00x", "4.00x", "")
    assert columns.halves_table(Products([]), PEAKS).rows == ()


def test_it_is_said_where_bytes_dominate_and_what_half_of_them_gain_there() -> None:
    def floors(share: float) -> Products:
        file = made.searched_figure_10()
        found = [replace(one, floor_us=share * one.times.median_us) for one in file.records if one.times is not None]
        return products(replace(file, records=tuple(found)))

    assert cells(columns.halves_table(floors(0.6), PEAKS))["1, warm"] == "**4.00x**"
    assert "4 of 4 reach it, 4.00x" in columns.halves_said(floors(0.6), PEAKS)
    assert "bold" not in columns.halves_said(floors(0.4), PEAKS)
    assert "bold" not in columns.halves_said(Products([]), PEAKS)


def test_variants_are_listed_with_the_fastest_first() -> None:
    table = rivals.variants_table(products(made.square_products()), cache="warm")
    times = [float(row[3].replace(",", "")) for row in table.rows if row[:2] == table.rows[0][:2]]
    assert len(times) > 1
    assert times == sorted(times)


def test_goals_name_what_is_reached_and_who_won() -> None:
    suites = {
        "fig10": products(made.searched_figure_10()),
        "squares": products(made.square_products()),
        "conv3x3": products(made.convolutions()),
        "sparsert_halves": Products([]),
    }
    table = rivals.goals_table(suites, PEAKS)
    assert len(table.rows) == 3 + 1 + 1 + 2
    fp32, tf32 = cells(table), cells(table, 1)
    assert (fp32["wanted"], fp32["hoped for"], fp32["warm"], fp32["cold"]) == ("2.50x", "3.20x", "1.50x", "1.50x")
    assert fp32["won by"] == "slab 2"
    assert "dense takes longer than its floor: 2" in fp32["why not dense"]
    assert tf32["why not dense"] == f"dense is faster: 2 ({'; '.join(made.SHAPES)})"
    layer = cells(table, 3)
    assert (layer[""], layer["wanted"], layer["warm"], layer["cold"]) == (
        "512,512,6272, fp32, us",
        "20.00",
        "40.00",
        "",
    )
    assert layer["dense fp32, TF32, fp16"] == "80.00 cublaslt, 22.00 triton, -"
    assert layer["won by"] == "slab (next: 60.00 sputnik)"
    fp16 = cells(table, 6)
    assert (fp16[""], fp16["warm"], fp16["why not dense"]) == ("256,256,3x3 @14, fp16, us", "10.00", "dense is faster")
    nothing = {name: Products([]) for name in suites}
    assert rivals.goals_table(nothing, PEAKS).rows == ()
    halves = products(made.float16_sums())
    with_sums = rivals.goals_table(suites | {"sparsert_halves": halves}, PEAKS)
    assert cells(with_sums, 3)[""] == "the same, SparseRT with products added in float16 (1 of 2 layers)"
    before, after = (float(cells(with_sums, row)["warm"].rstrip("x")) for row in (2, 3))
    assert after == pytest.approx(before * 2**0.5, rel=0.01)


def test_3x3_layers_have_their_zeros_counted() -> None:
    table = rivals.versus_table(products(made.convolutions()), PEAKS, batch=1, cache="warm")
    first = cells(table)
    assert (first["layer"], first["zeros"], first["dense fp32"]) == ("256,256,3x3 @14", "91%", "20.00 cudnn")
    assert (first["over fp32"], first["over TF32"], first["over fp16"]) == ("2.50x", "", "0.83x")
    assert len(table.rows) == 1  # no mean of one


def test_pictures_show_the_fastest_dense_where_it_was_searched(tmp_path: Path) -> None:
    assert plots.columns(products(made.searched_figure_10()), tmp_path / "a.svg", "a")
    assert plots.columns(products(made.figure_10()), tmp_path / "b.svg", "b")
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "b.svg").read_bytes()
    items = products(made.searched_figure_10()).of(precision="fp32", cache="warm", **NINE)
    assert plots._dense(items, "fp32") == ("dense fp32", [6.0, 6.0])
    assert plots._dense([*products(made.figure_11()).of(precision="fp32")][:1], "fp32") == ("cuBLAS fp32", [7.0])
    both = made.records(made.layer("a"), {"slab": 3.0, "aspt": 2.0, "sputnik": 4.0, "cublas": 9.0})
    names = [name for name, _, _ in plots._each(latest(made.file(both)))]
    assert names == ["Sputnik", "slab", "aspt"]
    assert plots._ours(latest(made.file(both)))[1][0] == "our best other"


def test_networks_have_two_factors_and_only_one_is_of_zeros() -> None:
    found = networks.networks(latest(made.whole_networks()))
    assert len(found) == 24
    one = found[0]
    assert (one.vendor.method, one.fusion, one.zeros, one.call_us) == ("torch_channels_last", 1.6, 1.25, 430.0)
    first = cells(networks_table(found))
    assert (first["fusion, graph"], first["zeros"], first["together"]) == ("1.60x", "1.25x", "2.00x")


def test_a_network_without_its_dense_engine_has_no_factors() -> None:
    assert networks.networks(latest(only(made.whole_networks(), "zeroskip", "torch"))) == []


def test_the_geometric_mean_is_of_what_there_is() -> None:
    assert geometric_mean([2.0, None, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([None]) is None


def test_pictures_are_the_same_bytes_from_the_same_records(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert plots.columns(products(made.figure_10()), tmp_path / f"columns-{name}.svg", "Figure 10")
        assert plots.sparsities(products(made.figure_11()), tmp_path / f"sparsities-{name}.svg", "Figure 11")
        assert plots.squares(products(made.square_products()), tmp_path / f"squares-{name}.svg", "Squares")
        assert plots.ablation(products(made.ablations()), tmp_path / f"ablation-{name}.svg", "Ablation")
        whole = networks.networks(latest(made.whole_networks()))
        assert plots.networks(whole, tmp_path / f"networks-{name}.svg", "Networks")
    for path in tmp_path.glob("*-a.svg"):
        assert path.read_bytes() == path.with_name(path.name.replace("-a", "-b")).read_bytes()
        ElementTree.fromstring(path.read_bytes())
    assert len(list(tmp_path.glob("*.svg"))) == 10


@pytest.mark.parametrize("methods", [("cublas",), ("slab",), ("sputnik", "cublas"), ("sputnik", "sputnik:no subwarps")])
def test_a_part_of_the_records_is_drawn_as_far_as_it_goes(tmp_path: Path, methods: tuple[str, ...]) -> None:
    for file in (made.figure_10(), made.figure_11(), made.square_products(), made.ablations()):
        found = products(only(file, *methods))
        plots.columns(found, tmp_path / "a.svg", "a")
        plots.sparsities(found, tmp_path / "b.svg", "b")
        plots.squares(found, tmp_path / "c.svg", "c")
        plots.ablation(found, tmp_path / "d.svg", "d")
        for table in (columns_table, masks_table, batches_table, sparsity_table, ablation_table):
            table(found).markdown()


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    nothing = Products([])
    for draw in (plots.columns, plots.sparsities, plots.squares, plots.ablation):
        assert not draw(nothing, tmp_path / "a.svg", "a")
    assert not plots.networks([], tmp_path / "a.svg", "a")
    assert not list(tmp_path.iterdir())


# -- tools/figures.py ---------------------------------------------------------------------------------
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool on a checkout with marks in its README and no records of a GPU."""
    spec = importlib.util.spec_from_file_location("figures_tool", ROOT / "tools" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "figures_tool", module)
    spec.loader.exec_module(module)
    results = tmp_path / "benchmarks" / "results"
    (results / "h100").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    marks = [f"<!-- {name}: {end} -->\n" for name in ("figures", "figures-cuda") for end in ("begin", "end")]
    (tmp_path / "README.md").write_text("before\n" + "".join(marks) + "after\n")
    (results / "cpu.jsonl").write_text((ROOT / "benchmarks" / "results" / "cpu.jsonl").read_text())
    for name, value in (
        ("ROOT", tmp_path),
        ("RESULTS", results),
        ("README", tmp_path / "README.md"),
        ("DOCS", tmp_path / "docs"),
    ):
        monkeypatch.setattr(module, name, value)
    return module


def write(folder: Path, name: str, file: RecordFile) -> None:
    with Writer(folder / f"{name}.jsonl") as writer:
        for facts in file.environments.values():
            writer.environment(facts)
        for record in file.records:
            writer.record(record)


def test_without_records_of_a_gpu_the_tool_writes_the_cpus(tool: ModuleType, tmp_path: Path) -> None:
    tool.main()
    text = (tmp_path / "README.md").read_text()
    assert "ONNX Runtime" in text
    assert "<!-- figures-cuda: begin -->\n<!-- figures-cuda: end -->\nafter" in text
    assert not (tmp_path / "docs" / "H100.md").exists()


def test_the_tool_writes_what_there_is(tool: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results" / "h100"
    write(folder, "fig11", made.figure_11())
    tool.main()
    page = (tmp_path / "docs" / "H100.md").read_text()
    assert "over sparsity" in page
    assert "Whole networks" not in page
    halves = made.figure_10().records
    write(folder, "fig10-1", replace(made.figure_10(), records=halves[:10]))
    write(folder, "fig10-2", replace(made.figure_10(), records=halves[10:]))
    write(folder, "squares", made.square_products())
    write(folder, "sputnik_ablation", made.ablations())
    write(folder, "networks_cuda", made.whole_networks())
    tool.main()
    page, text = (tmp_path / "docs" / "H100.md").read_text(), (tmp_path / "README.md").read_text()
    for title in (
        "Nine pointwise",
        "cold caches",
        "pattern of the zeros",
        "Several images",
        "Square",
        "Sputnik without",
    ):
        assert title in page
    assert "cuBLAS is faster in TF32 than our best fp32 on 2 of 2 layers with one image" in text
    assert "NVIDIA H100" in text
    assert "MobileNetV1, batch 1 | fp32 |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    for picture in ("columns", "sparsity", "squares", "ablation", "networks"):
        ElementTree.fromstring((tmp_path / "docs" / f"h100-{picture}.svg").read_bytes())
    tool.main()
    assert (tmp_path / "README.md").read_text() == text
    assert "Wanted and reached" not in page


def test_the_fastest_dense_is_shown_once_more_than_cublas_was_measured(tool: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results" / "h100"
    write(folder, "fig10", made.searched_figure_10())
    write(folder, "squares", made.square_products())
    write(folder, "conv3x3", made.convolutions())
    tool.main()
    page, text = (tmp_path / "docs" / "H100.md").read_text(), (tmp_path / "README.md").read_text()
    for title in (
        "Wanted and reached",
        "Against the fastest dense, nine pointwise layers, cold",
        "Against the fastest dense, 32 images, warm",
        "Each dense library",
        "Each method that skips zeros, one image, warm",
        "3x3 layers of ResNet-50 and VGG-19, batch 8, warm",
    ):
        assert f"## {title}" in page
    assert "batch 32, warm" not in page
    assert (
        "The fastest of cuBLAS, cublasLt and Triton is faster in TF32 than our best fp32 on 2 of 2 layers with one"
        in text
    )


def test_a_readme_without_marks_is_left_alone(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("nothing here\n")
    tool.main()
    assert (tmp_path / "README.md").read_text() == "nothing here\n"
    assert "has no marks" in capsys.readouterr().out
