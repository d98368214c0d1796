"""Run every method's kernels under compute-sanitizer: `make sanitize` on a machine with a GPU.

Four tools over the same work, racecheck without what it does not know, each of which must find nothing, and two planted
faults that must be found.  Every tool looks at each method in a process of its own, as many at once as there are cores.
The summary is printed and, with --out FILE, written.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
WORK, WITHOUT_COPIES = "work", "work-without-copies"
"""With kinds that bring x to several stages by the copy engine, and without them, for racecheck: that counts what the
engine writes as written by the thread that asked, and does not see that others wait for its bytes at a barrier, so that
every such pipeline is an error (FlashAttention 2.8.3, AI/RACECHECK_TMA_HAZARD.md, has it down to a few lines)."""
KINDS = "kinds of "
"""Not what a method proposes for small layers, but every kind of its configurations (``tests/methods/kinds.py``)."""
BARRIERS = ("sparsert", "slab", "escort")
"""Methods that have barriers in memory."""
OWN: dict[str, Callable[[Any], bool]] = {"dense": lambda config: config.library == "triton"}
"""Of methods that call libraries, which configurations are kernels of ours."""
FAULTS = {"write_behind": "memcheck", "race": "racecheck"}
SHAPES = (
    "1x1",
    "1x1 large batch",
    "1x1 stride 2",
    "many channels 1x1",
    "groups 3 of 1x1",
    "depthwise",
    "depthwise stride 2",
    "3x3",
    "3x3 stride 2",
    "3x3 batch 5 of small images",
    "groups 2",
    "many channels",
)


def methods() -> tuple[str, ...]:
    """Those with kernels of ours: the vendor's are the vendor's."""
    from contract.cases import OURS
    from zeroskip.methods import registry

    return (*(name for name in OURS if registry()[name].reproducible and name != "cusparselt"), *OWN)


def work(name: str, copies: bool) -> None:
    """A few configurations of a method, on small layers with every kind of epilogue, or of each kind one; ``copies``:
    kinds that the copy engine brings x to, too."""
    import torch

    from contract.cases import on, rounded_often, some
    from contract.cases import work as layer
    from contract.shapes import SHAPES as ALL
    from zeroskip.core.device import cuda
    from zeroskip.core.errors import Unsupported
    from zeroskip.core.graph import Segment
    from zeroskip.core.layer import ConvShape, Precision
    from zeroskip.core.method import AnyMethod, Candidate, Parameters
    from zeroskip.measure.bound import Case, Oracle, Stage, bind, check
    from zeroskip.methods import registry

    device, ran = cuda(), 0
    precisions: tuple[Precision, ...] = ("fp32", "fp16")

    def run(method: AnyMethod, segment: Segment, parameters: Parameters, candidates: list[Candidate[Any]]) -> int:
        case = Case.random(segment, device=device.torch)
        oracle = Oracle(segment, parameters, case)
        for candidate in candidates:
            stage = Stage(bind(method, segment, parameters, candidate, device), case)
            verdict = check(stage, oracle)
            close = method.exploits == "nothing" and rounded_often(verdict, case)
            assert verdict.right or close, (method.name, candidate.config)
        return len(candidates)

    with on("cuda"):
        works = [
            layer(ALL[shape], activation="relu", residual="before", precision=precision)
            for shape in SHAPES
            for precision in precisions
        ]
        works += [layer(ALL[shape], residual="after", precision="bf16") for shape in ("1x1", "3x3", "depthwise")]
        works += [layer(ConvShape(1, 64, 14, 14, 96, 1, 1)), layer(ConvShape(9, 300, 1, 1, 31, 1, 1), linear=True)]
        for one in works if not name.startswith(KINDS) else ():
            method = registry()[name]
            try:
                (segment,) = method.claim(one.program.graph, one.program.layers(), "layer", device)
            except Unsupported:
                continue
            found = [item for item in method.configs(segment, device) if name not in OWN or OWN[name](item.config)]
            ran += run(method, segment, one.parameters, some(found, 3))
        if name.startswith(KINDS):
            from methods.kinds import KINDS as KINDS_OF

            for kind in KINDS_OF[name.removeprefix(KINDS)].values():
                if kind.watched and (copies or not kind.copied):
                    job = kind.job()
                    ran += run(registry()[kind.method], job.segment, job.parameters, [kind.candidate(job)])
    torch.cuda.synchronize()
    print(f"{ran} launches checked")


def fault(name: str) -> None:
    """Launch a planted fault."""
    import torch

    from zeroskip.core.device import cuda
    from zeroskip.cuda.compile import build
    from zeroskip.cuda.launch import load

    y = torch.zeros(64, device="cuda")
    kernel = load(build(Path(__file__).with_name("fault.cuh"), f"zeroskip::{name}<float>", cuda().arch))
    kernel.launch((1, 1, 1), (64, 1, 1), (y, 64) if name == "write_behind" else (y,))
    torch.cuda.synchronize()


def under(tool: str, *arguments: str) -> tuple[int, str]:
    """Errors that ``tool`` counts while this file runs with ``arguments``, and its output."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "0"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # cuda.core asks for parameters until the driver refuses
    if tool == "synccheck" and arguments[-1].endswith(BARRIERS):
        command += ["--num-cuda-barriers", "65536"]  # of all blocks; the tool gives up beyond its limit
    started = time.perf_counter()
    done = subprocess.run(
        [*command, sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
    )
    print(f"{time.perf_counter() - started:6.1f} s  {tool}  {' '.join(arguments)}", file=sys.stderr, flush=True)
    text = done.stdout + done.stderr
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if not found:
        raise SystemExit(f"{tool} gave no summary:\n{text[-2000:]}")
    return sum(map(int, found)), text


def main() -> None:
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    if sys.argv[1:2] in ([WORK], [WITHOUT_COPIES]):
        return work(sys.argv[2], copies=sys.argv[1] == WORK)
    if sys.argv[1:2] == ["fault"]:
        return fault(sys.argv[2])
    lines, bad = [], False
    from methods.kinds import KINDS as KINDS_OF

    names = (*(KINDS + name for name in KINDS_OF), *methods())  # the longest first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        works = {
            (tool, name): pool.submit(under, tool, WITHOUT_COPIES if tool == "racecheck" else WORK, name)
            for name in names
            for tool in TOOLS
        }
        faults = {name: pool.submit(under, tool, "fault", name) for name, tool in FAULTS.items()}
    for tool in TOOLS:
        errors, launches, said = 0, 0, []
        for name in names:
            found, text = works[tool, name].result()
            ran = re.search(r"(\d+) launches checked", text)
            errors, launches = errors + found, launches + int(ran[1] if ran else 0)
            if found or ran is None:
                bad = True
                said.append(f"{tool}, {name}{'' if ran else ', which did not end'}:\n{text[-20000:]}")
        without = ", without pipelines of the copy engine" if tool == "racecheck" else ""
        lines += [f"{tool}: {errors} errors, {launches} launches checked{without}", *said]
    for name, planted in faults.items():
        errors, _ = planted.result()
        lines.append(f"planted fault {name}: {FAULTS[name]} found {errors}")
        bad |= errors == 0
    summary = "\n".join(lines)
    print(summary)
    if sys.argv[1:2] == ["--out"]:
        Path(sys.argv[2]).write_text(summary + "\n")
    raise SystemExit(int(bad))


if __name__ == "__main__":
    main()
