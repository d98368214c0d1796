"""Write README's tables, docs/H100.md, docs/H200.md, docs/ACCURACY.md and all pictures from the committed records:
`make figures`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools import evidence
from zeroskip.core.record import Record
from zeroskip.report import accuracy_tables, columns, networks, plots, products, rivals
from zeroskip.report.accuracy import paretos, read_trained, treatments
from zeroskip.report.columns import BATCHES, images
from zeroskip.report.figures import bars
from zeroskip.report.products import Products
from zeroskip.report.records import RecordFile, read
from zeroskip.report.tables import BASELINES, Comparison, compare

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, DOCS = ROOT / "README.md", ROOT / "docs"
NAMES = {"onnxruntime": "ONNX Runtime", "dense": "oneDNN", "torch_channels_last": "torch, channels_last"}


def write_section(name: str, lines: list[str]) -> None:
    """Replace what README holds between the marks of ``name``."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    text = README.read_text()
    if begin not in text:
        print(f"README.md has no marks {begin.strip()} and {end.strip()}: nothing written there")
        return
    before, rest = text.split(begin)
    README.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1])


# -- CPU ----------------------------------------------------------------------------------------------
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


def cpu() -> None:
    path = RESULTS / "cpu.jsonl"
    file = read(path)
    records = newest(file)
    facts = file.environments[records[-1].environment]
    lines = [
        f"{facts['device']}, {facts['torch_cpu']}, {facts['threads']} thread, fp32, "
        f"torch {facts['libraries']['torch']}, ONNX Runtime "
        f"{facts['libraries'].get('onnxruntime', '-')}; records in "
        f"[`{path.relative_to(ROOT)}`]({path.relative_to(ROOT)}).",
        "",
        "| | zeroskip | best dense | speed-up |",
        "|---|---:|---:|---:|",
        *[line for found in compare(records) if (line := row(found))],
    ]
    write_section("figures", lines)
    models = [record for record in records if record.case["kind"] == "model"]
    bars(models, DOCS / "cpu-models.svg", "Whole networks on the CPU")


# -- GPUs ---------------------------------------------------------------------------------------------
GPUS = ("h200", "h100")
"""Folders of results, the newest first: README shows each figure from the first that has it."""
SUITES = (
    "fig10",
    "fig11",
    "squares",
    "conv3x3",
    "two_of_four",
    "depthwise",
    "sputnik_ablation",
    "sparsert_ablation",
    "sparsert_slabs",
    "sparsert_halves",
    "escort_ablation",
    "networks_cuda",
)


def measured(gpu: str, suite: str) -> tuple[list[Comparison], dict[str, Any]]:
    """The records of a suite, which may be spread over files ``suite*.jsonl``, and the last environment."""
    files = [read(path) for path in sorted((RESULTS / gpu).glob(f"{suite}*.jsonl"))]
    environments = {name: facts for file in files for name, facts in file.environments.items()}
    merged = RecordFile(environments, tuple([record for file in files for record in file.records]))
    found = products.latest(merged)
    return found, environments[found[-1].environment] if found else {}


def machine(gpu: str, facts: dict[str, Any]) -> str:
    libraries = facts["libraries"]
    return (
        f"{facts['device']}, driver {facts['driver']}, torch {libraries['torch']}, cuDNN {facts['cudnn']}; medians of "
        "CUDA-graph replays in turns, in microseconds; records in "
        f"[`benchmarks/results/{gpu}`](benchmarks/results/{gpu})."
    )


RIVALS = (
    "The fastest dense of each column with its method: cuBLAS, cublasLt with a search of its algorithms, Triton with a "
    "search of its blocks (for 3x3 layers cuDNN with search), without bias and ReLU where that is faster; ours always "
    "with. Floor of dense: all its products at the column's measured peak (in fp32, as three TF32 products), or its "
    "bytes. A time of ours below it no dense kernel can reach; elsewhere dense loses to latency."
)


def against_dense(suites: dict[str, Products], peaks: rivals.Peaks) -> list[tuple[str, products.Table, str]]:
    """Sections with title, table and text; none before more than cuBLAS was measured."""
    nine = {"mask": "random", "density": 0.1, "batch": 1}
    found = []
    if products.searched(suites["fig10"].all):
        found.append(("Wanted and reached", rivals.goals_table(suites, peaks), RIVALS))
        for cache in ("warm", "cold", "between"):
            title = f"Against the fastest dense, nine pointwise layers, {cache}"
            found.append((title, rivals.versus_table(suites["fig10"], peaks, cache=cache, **nine), ""))
        for batch in BATCHES[1:]:
            table = rivals.versus_table(suites["fig10"], peaks, cache="warm", **nine | {"batch": batch})
            found.append((f"Against the fastest dense, {images(batch)}, warm", table, ""))
        table = rivals.times_table(suites["fig10"], products.VENDOR_DENSE.__contains__, cache="warm", **nine)
        found.append(("Each dense library", table, "Triton's product has bias and ReLU inside."))
        for batch in BATCHES:
            table = rivals.times_table(suites["fig10"], products.skips, cache="warm", **nine | {"batch": batch})
            found.append((f"Each method that skips zeros, {images(batch)}, warm", table, ""))
    if products.searched(suites["squares"].all):
        table = rivals.versus_table(suites["squares"], peaks, cache="warm", **nine)
        found.append(("Against the fastest dense, square products", table, ""))
    for batch in BATCHES:
        for cache in ("warm", "cold"):
            table = rivals.versus_table(suites["conv3x3"], peaks, batch=batch, cache=cache)
            title = f"3x3 layers of ResNet-50 and VGG-19, batch {batch}, {cache}"
            found.append(
                (title, table, "91% and 96% zeros are trained filters, 90% random ones." if batch == 1 else "")
            )
    return found


def beside_another(gpu: str, here: Products) -> list[str]:
    """What the first GPU's figures say of the next one's, in words: how far cuBLAS is apart on the nine layers."""
    other = GPUS[-1]
    if gpu == other:
        return []
    facts = {"mask": "random", "density": 0.1, "batch": 1, "precision": "fp32", "cache": "warm"}
    there = Products(measured(other, "fig10")[0])
    pairs = [(item, there.one(name=item.case["name"], **facts)) for item in here.of(**facts)]
    ratios = [products.ratio(products.us(item, "cublas"), products.us(same, "cublas")) for item, same in pairs]
    mean = products.geometric_mean(ratios)
    if mean is None:
        return []
    return [
        "",
        f"Goals were set for an {other.upper()}; what is newer is from an {gpu.upper()}, which has as many "
        "multiprocessors at the same clocks, more L2 and faster memory: in its L2 cuBLAS takes "
        f"{mean:.2f} times as long as on an [{other.upper()}]({other.upper()}.md) for the nine layers "
        "(geometric mean, fp32, one image).",
    ]


OTHERS = (
    ("two_of_four", "2:4 zeros", "Two of every four weights are zeros; cuSPARSELt computes in half precision only."),
    ("depthwise", "Depthwise layers of MobileNetV1", "Channels @ side of the input; every weight is there."),
)
"""Suites whose tables are what every method took: suite, title, text."""
VARIANTS = (
    ("sparsert_slabs", "SparseRT with x in slabs", "Rows of a block x pixels; mates share what they copy of x."),
    ("sparsert_halves", "SparseRT with sums in float16", "Products of pairs, up to so many, then in float32."),
    ("escort_ablation", "Escort with and without reuse from registers", "Each tuned for itself."),
)
"""The same of what a method's configurations took."""


COUNTERS = (
    "Counted by Nsight Compute (tools/counters.py), all caches warm; shares of the time in which multiprocessors are "
    "active. Where L2's output is busy for 64% to 66% of it, x comes about as fast as it can: for 2048^3 that is "
    "over 90% of what plain reads reach (`l2_gbps`)."
)
INSTRUCTIONS = (
    "Multiply-adds of 16 bytes without a load, one block on each of 128 multiprocessors (tools/instructions.py). "
    "Found: the last launch left them in the caches. Schedulers alone would take 64 bytes a cycle over the number of "
    "warps. In clusters of four and eight 128 blocks take two turns."
)


def on_gpu(gpu: str) -> dict[str, list[str]]:
    """Write docs/<GPU>.md, where what was not measured is left out; what README may show of it, by figure."""
    name, short = gpu.upper(), dict[str, list[str]]()
    page = [
        f"# Measured on an {name}",
        "",
        f"Made by `make figures` from `benchmarks/results/{gpu}`; how the numbers were ",
    ]
    page[-1] += 'taken: [MEASURING.md](MEASURING.md). Times in microseconds; "over" is how many times faster.'

    def section(title: str, table: products.Table, *more: str) -> None:
        if table.rows:
            page.extend(["", f"## {title}", "", *more, *([""] * bool(more)), table.markdown().rstrip()])

    def picture(drawn: bool, kind: str, title: str) -> list[str]:
        return ["", f"![{title}](docs/{gpu}-{kind}.svg)"] if drawn else []

    def drawing(kind: str) -> Path:
        return DOCS / f"{gpu}-{kind}.svg"

    suites = {suite: measured(gpu, suite) for suite in SUITES}
    compared = {suite: Products(comparisons) for suite, (comparisons, _) in suites.items()}
    peaks = next((facts["peak_tflops"] for suite in ("fig10", "conv3x3") if (facts := suites[suite][1])), {})

    found = compared["fig10"]
    page += beside_another(gpu, found)
    if found.all:
        title = "Nine pointwise layers at 90% zeros, batch 1, warm L2"
        drawn = plots.columns(found, drawing("columns"), title)
        short["columns"] = [
            machine(gpu, suites["fig10"][1]),
            *picture(drawn, "columns", title),
            *columns.tensor_cores(found, compared["squares"]),
        ]
        text = (
            'Ours with bias and ReLU, cuBLAS without unless it says so. "Best dense fp32" is the best of cuDNN, cuBLAS '
            "and a product of three TF32 products, bias and ReLU included."
        )
        shown = f"{text}\n\n![microseconds by column]({gpu}-columns.svg)" if drawn else text
        section(title, products.columns_table(found), shown)
        section("The same with cold caches", products.columns_table(found, cache="cold"))
        text = "With others' code in the instruction caches, as plans time them ([MEASURING.md](MEASURING.md))."
        section("The same between other layers", products.columns_table(found, cache="between"), text)
        for batch in BATCHES:
            table = products.masks_table(found, batch)
            apart = sorted((row[-1] for row in table.rows), key=lambda cell: float(cell.rstrip("%")))
            text = "The survey says that it does not. Our fastest method's times are "
            text += f"{apart[0]} to {apart[-1]} apart between masks of the same density." if apart else "not known."
            text += " Columns may be of different runs and commits, as their records say."
            section(f"Does the pattern of the zeros matter? {images(batch).capitalize()}", table, text)
        text = "Our best, in brackets over cuBLAS fp32 and over the fastest dense fp32."
        section("Several images", products.batches_table(found), text)
        text = (
            "Time over that of cuBLAS fp32 in the same run, one image, warm. Sputnik's own code and the cuBLAS beside "
            "it ran on an H100 before there were records here."
        )
        section("Against Sputnik's own code", rivals.sputnik_table(found), text)
        text = columns.halves_said(found, peaks)
        section("What half the bytes gain, by images and cache", columns.halves_table(found, peaks), text)
    for title, table, text in against_dense(compared, peaks):
        section(title, table, *([text] if text else []))
    found = compared["fig11"]
    title = "(128,128,3136) over sparsity, batch 1, warm L2"
    if plots.sparsities(found, drawing("sparsity"), title):
        section(title, products.sparsity_table(found), f"![time over sparsity]({gpu}-sparsity.svg)")
        short["sparsity"] = [machine(gpu, suites["fig11"][1]), *picture(True, "sparsity", title)]
    for batch in BATCHES[1:]:
        section(f"The same with {images(batch)}", products.sparsity_table(found, batch))
    found = compared["squares"]
    title = "Square products at 90% zeros, warm L2"
    if plots.squares(found, drawing("squares"), title):
        section(title, products.columns_table(found), f"![square products]({gpu}-squares.svg)")
        for density in (0.2, 0.05):
            section(f"The same at {1 - density:.0%}", products.columns_table(found, density=density))
    found = compared["sputnik_ablation"]
    title = "Sputnik without one of its steps"
    if plots.ablation(found, drawing("ablation"), title):
        text = f"How many times longer it takes, tuned anew without the step.\n\n![ablation]({gpu}-ablation.svg)"
        section(title, products.ablation_table(found), text)
    if (found := compared["sparsert_ablation"]).all:
        text = "How many times longer it takes, tuned anew over the others. Why: the method's README, on instructions."
        section("SparseRT with one of its choices fixed", products.ablation_table(found), text)
    for suite, title, text in OTHERS:
        for batch in BATCHES:
            table = rivals.times_table(compared[suite], lambda method: method != "cublas", cache="warm", batch=batch)
            section(f"{title}, {images(batch)}, warm", table, text)
    for suite, title, text in VARIANTS:
        for batch in sorted({item.case["batch"] for item in compared[suite].all}):
            table = rivals.variants_table(compared[suite], cache="warm", batch=batch)
            section(f"{title}, {images(batch)}, warm", table, text)
    table = evidence.counters_table(RESULTS / gpu / "counters.json")
    section("What kernels wait for", table, COUNTERS)
    table = evidence.instructions_table(RESULTS / gpu / "instructions.jsonl")
    section("How fast instructions arrive", table, INSTRUCTIONS)
    comparisons, facts = suites["networks_cuda"]
    whole = networks.networks(comparisons)
    title = "Whole networks at 90% zeros"
    if plots.networks(whole, drawing("networks"), title):
        table = networks.networks_table(whole)
        text = "One graph on each side. Only the factor of the last step is credited to zeros."
        section(title, table, f"{text}\n\n![whole networks]({gpu}-networks.svg)")
        short["networks"] = [machine(gpu, facts), "", table.markdown().rstrip()]
    if any(line.startswith("## ") for line in page):
        (DOCS / f"{name}.md").write_text("\n".join(page) + "\n")
        short["page"] = [f"[docs/{name}.md](docs/{name}.md)"]
    return short


def gpus() -> None:
    """README's section and a page for each GPU."""
    found = [short for gpu in GPUS if (short := on_gpu(gpu))]
    if not found:
        return
    lines: list[str] = []
    for figure in ("networks", "columns", "sparsity"):
        if shown := next((short[figure] for short in found if figure in short), None):
            # A machine is named where it changes; behind its line the figures bring their own blank lines.
            lines += ["", *shown] if shown[0] not in lines else shown[1:]
    pages = " and ".join(page for short in found for page in short["page"])
    write_section("figures-cuda", [*lines[1:], "", f"All tables: {pages}."])


# -- accuracy -----------------------------------------------------------------------------------------
def accuracy() -> None:
    """docs/ACCURACY.md, if there are trained networks; their speeds are looked for in all other records."""
    paths = sorted(RESULTS.rglob("trained-*.jsonl"))
    if not paths:
        return
    files = [read(path) for path in sorted(RESULTS.rglob("*.jsonl")) if path not in paths]
    environments = {name: facts for file in files for name, facts in file.environments.items()}
    records = RecordFile(environments, tuple([record for file in files for record in file.records]))
    rows = treatments(read_trained(paths), records)
    places = ", ".join(f"[`{path.relative_to(ROOT)}`](../{path.relative_to(ROOT)})" for path in paths)
    page = ["# Accuracy of pruned networks", "", f"Made by `make figures` from {places}.", "", accuracy_tables.EASY]
    title = "Accuracy over speed-up"
    if plots.paretos(paretos(rows), DOCS / "accuracy.svg", title):
        text = (
            "Up and to the right is better; percent are of single weights that went; the dotted line joins the "
            "treatments that no other of the network beats."
        )
        page += ["", f"![{title}](accuracy.svg)", "", text]
    for heading, table, text in (
        ("Wanted and reached", accuracy_tables.goals_table(rows), "The mean of three seeds."),
        ("Treatments", accuracy_tables.accuracy_table(rows), accuracy_tables.ROWS),
        ("Speed", accuracy_tables.times_table(rows), accuracy_tables.SPEEDS),
    ):
        if table.rows:
            page += ["", f"## {heading}", "", text, "", table.markdown().rstrip()]
    (DOCS / "ACCURACY.md").write_text("\n".join(page) + "\n")


def main() -> None:
    cpu()
    gpus()
    accuracy()


if __name__ == "__main__":
    main()
