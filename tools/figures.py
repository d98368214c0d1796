"""Write README's table and pictures from the committed records: `make figures`."""

from __future__ import annotations

from pathlib import Path

from zeroskip.core.record import Record
from zeroskip.report.figures import bars
from zeroskip.report.records import RecordFile, read
from zeroskip.report.tables import BASELINES, Comparison, compare

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.jsonl"
README = ROOT / "README.md"
NAMES = {"onnxruntime": "ONNX Runtime", "dense": "oneDNN", "torch_channels_last": "torch, channels_last"}
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


def newest(file: RecordFile) -> tuple[Record, ...]:
    """The last record of each case and method: a later run replaces an earlier one."""
    found = {(repr(sorted(record.case.items())), record.method): record for record in file.records}
    return tuple(found.values())


def ms(record: Record) -> str:
    assert record.times is not None
    value = record.times.median_us / 1e3
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def row(found: Comparison) -> str:
    ours = next((record for record in found.records.values() if record.method in ("zeroskip", "escort")), None)
    rivals = [record for record in found.records.values() if record.method in BASELINES and record.times is not None]
    if ours is None or ours.times is None:
        return ""
    if not rivals:
        return f"| {found.case['name']} | {ms(ours)} | | |"
    best = min(rivals, key=lambda record: record.times.median_us if record.times else float("inf"))
    assert best.times is not None
    ratio = "busy machine" if ours.contended else f"**{best.times.median_us / ours.times.median_us:.2f}x**"
    return f"| {found.case['name']} | {ms(ours)} | {ms(best)} ({NAMES.get(best.method, best.method)}) | {ratio} |"


def main() -> None:
    file = read(RESULTS)
    records = newest(file)
    facts = file.environments[records[-1].environment]
    lines = [
        f"{facts['device']}, {facts['threads']} thread, fp32, torch {facts['libraries']['torch']}, ONNX Runtime "
        f"{facts['libraries'].get('onnxruntime', '-')}; records in "
        f"[`{RESULTS.relative_to(ROOT)}`]({RESULTS.relative_to(ROOT)}).",
        "",
        "| | zeroskip | best dense | speed-up |",
        "|---|---:|---:|---:|",
        *[line for found in compare(records) if (line := row(found))],
    ]
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after)
    models = [record for record in records if record.case["kind"] == "model"]
    bars(models, ROOT / "docs" / "cpu-models.svg", "Whole networks on the CPU")


if __name__ == "__main__":
    main()
