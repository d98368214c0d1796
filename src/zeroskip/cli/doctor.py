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

    Compiles a kernel, looks for a GPU and for optional parts, and measures the peaks of arithmetic and memory.
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
    from zeroskip.core.cache import BuildCache
    from zeroskip.core.jsonable import to_json
    from zeroskip.cpu.threads import pool_name
    from zeroskip.measure import peaks

    with progress("measuring the peaks"):
        device = peaks.this_cpu(threads)
        cuda = _cuda()
    return {
        "environment": env.environment(device),
        "device": to_json(device),
        "compiler": _compiler(),
        "thread_pool": pool_name(),
        "peak_gflops": round(device.peak_tflops["fp32"] * 1e3, 1),
        "peak_gbps": round(device.bandwidth_gbps, 1),
        "cuda": cuda,
        "caches": {kind: str(BuildCache.of_user(kind).folder) for kind in ("cpu", "cuda")},
        "extras": _extras(),
    }


def _cuda() -> dict[str, Any]:
    """The GPU (``device`` is None and ``no_device`` says why where there is none) and its compiler, likewise."""
    from zeroskip.core.jsonable import to_json
    from zeroskip.cuda import compile as nvrtc
    from zeroskip.measure import peaks

    no_compiler = nvrtc.ready()
    facts: dict[str, Any] = {
        "nvrtc": "" if no_compiler else nvrtc.toolkit().nvrtc,
        "no_nvrtc": no_compiler or "",
        "device": None,
        "no_device": _why_no_gpu(),
        "driver": "",
    }
    if not facts["no_device"]:
        from zeroskip.core import device, env

        gpu = device.cuda() if no_compiler else peaks.this_gpu()
        facts |= {"device": to_json(gpu), "driver": env.environment(gpu)["driver"]}
    return facts


def _why_no_gpu() -> str:
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} finds no NVIDIA GPU; nvidia-smi shows whether the driver does"


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
        *_cuda_rows(facts["cuda"]),
        *((f"{kind} build cache", folder) for kind, folder in facts["caches"].items()),
    ]
    for extra, missing in facts["extras"].items():
        advice = f"missing {', '.join(missing)}: pip install 'zeroskip[{extra}]'"
        rows.append((f"extra {extra}", advice if missing else "present"))
    out_table(("what", "found"), rows)
    out("zeroskip cannot compile its kernels here." if compiler["error"] else "zeroskip works here.")


def _cuda_rows(cuda: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("NVRTC", cuda["nvrtc"] or f"none: {cuda['no_nvrtc']}")]
    device = cuda["device"]
    if device is None:
        return [("GPU", f"none: {cuda['no_device']}"), *rows]
    rows = [("GPU", f"{device['name']} ({device['arch']}), driver {cuda['driver']}"), *rows]
    rows += [(f"GPU peak {name}", f"{tflops:.0f} TFLOP/s") for name, tflops in device["peak_tflops"].items()]
    for name, gbps in (("memory", device["bandwidth_gbps"]), ("L2", device["l2_gbps"])):
        rows += [(f"GPU peak {name}", f"{gbps:.0f} GB/s")] if gbps else []
    return rows


def _short(host: str) -> str:
    """``jit.host()`` without the processor's features."""
    processor, _, *versions = host.split(";")
    return ", ".join([processor, *versions])
