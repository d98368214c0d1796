"""Where a number comes from: machine, versions, commit, and a hash of the sources."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from zeroskip._version import __version__
from zeroskip.core.device import Device

_LIBRARIES = ("torch", "numpy", "llvmlite", "onnxruntime", "triton", "cuda-core", "nvidia-cuda-nvrtc")


def data_folder() -> Path:
    """Real weights and photographs for tests and measurements: ``ZEROSKIP_DATA``, default ``../shared/data``."""
    return Path(os.environ.get("ZEROSKIP_DATA", "../shared/data"))


@functools.cache
def source_hash() -> str:
    """Hash of every source file of the package: two records with the same one ran the same code."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".cuh") and path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    """Driver and libraries that a time on the GPU depends on."""
    smi = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        found = subprocess.run(smi, capture_output=True, text=True, timeout=10, check=False).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        found = []
    driver, clock, power = ([part.strip() for part in found[0].split(",")] if found else []) or ("", "", "")
    return {
        "driver": driver,
        "most_clock": clock,
        "power_limit": power,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def environment(device: Device) -> dict[str, Any]:
    """Everything that must stand beside a time taken on ``device``, as JSON values, with its own hash as ``id``."""
    told = os.environ.get("ZEROSKIP_COMMIT", "")  # by who copied the sources away from their repository
    found = told or _git("rev-parse", "HEAD")
    facts: dict[str, Any] = {
        "device": device.name,
        "kind": device.kind,
        "threads": device.threads,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": sys.version.split()[0],
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        **(_cuda() if device.kind == "cuda" else {}),
        "zeroskip": __version__,
        "commit": found,
        "dirty": bool(not told and _git("status", "--porcelain", "--untracked-files=no")),
        "source": source_hash(),
    }
    facts["id"] = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:12]
    return facts
