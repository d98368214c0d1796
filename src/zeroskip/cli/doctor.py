"""``zeroskip doctor``: what this machine and installation can do."""

from __future__ import annotations

from typing import Any

import typer

from zeroskip.cli.options import Json, Threads, thread_count
from zeroskip.cli.show import out, out_json, out_table, progress

EXTRAS = {
    "report": ("plotly", "matplotlib"),
    "demo": ("skimage", "PIL"),
    "bench": ("onnxruntime", "onnx", "onnxscript"),
}
"""Optional dependencies by the extra that brings them."""


def doctor(threads: Threads = None, as_json: Json = False) -> None:
    """Check the installation and this machine.

    Compiles a kernel, looks for optional parts, and measures the peaks of arithmetic and memory.
    """
    facts = examine(thread_count(threads))
    if as_json:
        out_json(facts)
    else:
        _print(facts)
    if facts["compiler"]["error"]:
        raise typer.Exit(1)


def examine(threads: int) -> dict[str, Any]:
    """Everything doctor reports, as JSON values."""
    from zeroskip.core import env
    from zeroskip.core.device import cpu
    from zeroskip.core.jsonable import to_json
    from zeroskip.cpu.threads import pool_name
    from zeroskip.measure.peaks import peaks

    with progress("measuring the peaks"):
        gflops, gbps = peaks(threads)
    return {
        "environment": env.environment(threads),
        "device": to_json(cpu(threads)),
        "compiler": _compiler(),
        "thread_pool": pool_name(),
        "peak_gflops": round(gflops, 1),
        "peak_gbps": round(gbps, 1),
        "extras": _extras(),
    }


def _compiler() -> dict[str, str]:
    from zeroskip.core.errors import CompileError
    from zeroskip.cpu import jit

    try:
        jit.load(jit.assemble("define i32 @probe() {\n  ret i32 0\n}"), "probe")
    except (CompileError, RuntimeError, OSError) as error:
        return {"host": "", "error": str(error)}
    return {"host": jit.host(), "error": ""}


def _extras() -> dict[str, list[str]]:
    """The modules that are missing, by extra."""
    from importlib.util import find_spec

    return {extra: [module for module in modules if find_spec(module) is None] for extra, modules in EXTRAS.items()}


def _print(facts: dict[str, Any]) -> None:
    environment, compiler = facts["environment"], facts["compiler"]
    rows = [(name, environment[name]) for name in ("device", "threads", "system", "python", "zeroskip", "torch_cpu")]
    rows += list(environment["libraries"].items())
    rows += [
        ("compiler", f"FAILED: {compiler['error']}" if compiler["error"] else _short(compiler["host"])),
        ("thread pool", facts["thread_pool"]),
        ("peak arithmetic", f"{facts['peak_gflops']} GFLOP/s"),
        ("peak memory", f"{facts['peak_gbps']} GB/s"),
    ]
    for extra, missing in facts["extras"].items():
        advice = f"missing {', '.join(missing)}: pip install 'zeroskip[{extra}]'"
        rows.append((f"extra {extra}", advice if missing else "present"))
    out_table(("what", "found"), rows)
    out("zeroskip cannot compile its kernels here." if compiler["error"] else "zeroskip works here.")


def _short(host: str) -> str:
    """``jit.host()`` without the processor's features."""
    processor, _, *versions = host.split(";")
    return ", ".join([processor, *versions])
