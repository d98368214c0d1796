from __future__ import annotations

from dataclasses import replace

from zeroskip.core.record import Record, Times
from zeroskip.report.palette import GREYS
from zeroskip.report.records import RecordFile
from zeroskip.report.tables import BASELINES, compare, describe, duration, milliseconds, quartiles_us, table

CASE = {"kind": "layer", "name": "1x1", "density": 0.1, "threads": 2}


def record(method: str, *samples: float, case: dict[str, object] = CASE) -> Record:
    return Record("s", case, method, "OK", times=Times(samples, "wall"), environment="e")


def test_the_speedup_is_over_the_fastest_dense() -> None:
    (found,) = compare([record("dense", 400.0), record("inductor", 300.0), record("escort", 100.0)])
    assert found.best_dense == found.records["inductor"]
    assert found.verdict(found.records["escort"]) == "3.00×"
    assert found.verdict(found.records["dense"]) == "0.75×"


def test_contention_replaces_the_ratio() -> None:
    sparse, dense = record("escort", 100.0), record("dense", 400.0)
    for records in ([replace(sparse, contended=True), dense], [sparse, replace(dense, contended=True)]):
        (found,) = compare(records)
        assert found.speedup(found.records["escort"]) is None
        assert found.verdict(found.records["escort"]) == "CONTENDED"


def test_a_wrong_baseline_is_no_baseline() -> None:
    wrong = Record("s", CASE, "inductor", "WRONG", environment="e")
    (found,) = compare([wrong, record("dense", 400.0), record("escort", 100.0)])
    assert found.verdict(found.records["escort"]) == "4.00×"
    assert found.verdict(wrong) == "WRONG"


def test_an_impossible_time_has_no_ratio_and_sets_none() -> None:
    impossible = replace(record("escort", 0.1), status="IMPLAUSIBLE", reason="too fast")
    (found,) = compare([impossible, record("dense", 400.0), replace(record("cublas", 0.1), status="IMPLAUSIBLE")])
    assert found.verdict(impossible) == "IMPLAUSIBLE"
    assert found.best_dense == found.records["dense"]
    assert found.best_sparse is None
    assert "IMPLAUSIBLE" in table([impossible]).rows[0]


def test_without_a_baseline_there_is_no_ratio() -> None:
    (found,) = compare([record("escort", 100.0)])
    assert found.verdict(found.records["escort"]) == "-"


def test_cases_and_environments_stay_apart_and_the_later_record_counts() -> None:
    other = replace(record("escort", 5.0), environment="f")
    first, second = compare([record("escort", 9.0), other, record("escort", 7.0)])
    assert first.records["escort"].times == Times((7.0,), "wall")
    assert second.environment == "f"


def test_the_table_has_a_row_a_case_and_a_column_a_method(records: RecordFile) -> None:
    found = table(records.records)
    assert found.head == (
        "case",
        "dense",
        "torch",
        "torch_channels_last",
        "inductor",
        "onnxruntime",
        "escort",
        "two_four",
        "zeroskip",
        "speed-up",
    )
    assert len(found.rows) == 4
    first, model = dict(zip(found.head, found.rows[0], strict=True)), dict(zip(found.head, found.rows[3], strict=True))
    assert first["case"] == "1x1 128->128 @56x56, 90% zeros, batch 1, 1 thread"
    assert first["two_four"] == "UNSUPPORTED"
    assert first["zeroskip"] == "-"
    assert first["escort"] == "0.262 ms ±1%"
    assert first["speed-up"] == "4.22× escort"
    assert model["speed-up"] == "CONTENDED zeroskip"


def test_markdown_keeps_its_columns_whatever_a_name_holds(records: RecordFile) -> None:
    lines = table(records.records).markdown().splitlines()
    assert lines[1].startswith("| --- | ---: |")
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "</script>" not in "".join(lines)


def test_words_and_numbers() -> None:
    assert describe(CASE | {"mask": "random", "c": 128}) == "1x1, 90% zeros, 2 threads"
    assert describe(CASE | {"mask": "trained:net.npz"}) == "1x1, trained:net.npz mask, 2 threads"
    gpu = {"name": "64,32,12544", "density": 0.1, "batch": 8, "precision": "tf32", "cache": "cold", "device": "cuda"}
    assert describe(gpu) == "64,32,12544, 90% zeros, batch 8, tf32, cold"
    assert (duration(3.149), duration(99.99), duration(100.0)) == ("3.15 µs", "99.99 µs", "0.100 ms")
    assert (milliseconds(1234.5), milliseconds(123456.0)) == ("1.234", "123.5")
    assert quartiles_us(Times((4.0, 1.0, 3.0, 2.0), "cpu")) == (2.0, 3.0)


def test_there_is_a_grey_for_every_dense_method() -> None:
    assert len(set(GREYS)) == len(GREYS) >= len(BASELINES)
