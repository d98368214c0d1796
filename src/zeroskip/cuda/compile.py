"""CUDA C++ template -> machine code of one instance, with or without a GPU in this machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import re
import threading
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from zeroskip._version import __version__
from zeroskip.core.cache import BuildCache
from zeroskip.core.errors import CompileError, FileFormatError, Unsupported
from zeroskip.core.jsonable import from_json

INCLUDE = Path(__file__).parent / "include"
"""Device code shared by the methods: ``#include <zeroskip/types.cuh>``."""

_importing = threading.Lock()
_ADVICE = "pip install 'zeroskip[cuda]' nvidia-cuda-nvrtc nvidia-nvjitlink nvidia-cuda-runtime"


@dataclass(frozen=True)
class Resources:
    """What ptxas says one thread (registers, spills, stack) and one block (static shared memory) take."""

    registers: int
    spill_bytes: int
    """Spill stores and spill loads together, as written in the code (not as executed)."""
    stack_bytes: int
    """Local memory of a thread: arrays that are indexed at run time show here and not among the spills."""
    shared_bytes: int
    """Static shared memory.  The dynamic part is up to the launch."""
    warnings: str = ""
    """What NVRTC and ptxas warned of; empty is what we ship."""


@dataclass(frozen=True)
class Instance:
    """One template instance that a method compiles, e.g. ``zeroskip::sputnik::spmm<float, 4>`` of ``kernel.cuh``.

    ``spill_budget`` is how many bytes ptxas may spill (stores and loads together) before CI fails.  Registers need no
    budget of their own: launch bounds cap them, and what does not fit is spilled.
    """

    source: Path
    expression: str
    spill_budget: int = 0

    def objection(self, found: Resources) -> str | None:
        """None, or why ``found`` is not what we ship."""
        if found.warnings:
            return f"the compiler warns: {found.warnings}"
        if found.spill_bytes > self.spill_budget:
            return f"spills {found.spill_bytes} bytes, the budget is {self.spill_budget}"
        if found.stack_bytes > self.spill_budget:  # what is spilled is kept on the stack
            return f"has a stack frame of {found.stack_bytes} bytes: is an array indexed by what is no constant?"
        return None


@dataclass(frozen=True)
class Built:
    """Machine code of one kernel, ``symbol``, for GPUs of ``arch``."""

    symbol: str
    arch: str
    resources: Resources
    cubin: bytes


@dataclass(frozen=True)
class _Header:
    """First line of what ``build`` returns, as JSON; the cubin follows."""

    symbol: str
    arch: str
    resources: Resources


@dataclass(frozen=True)
class Toolkit:
    """The compiler and the CUDA headers this process found."""

    nvrtc: str
    """Version, as exact as it is known."""
    include: Path


def build(source: Path, expression: str, arch: str) -> bytes:
    """Compile the instance ``expression`` of a kernel in ``source`` for GPUs of ``arch`` ("sm_80", "sm_90a", ...).

    ``source`` finds CUDA's headers, ``<zeroskip/...cuh>`` and the files of its own folder, and nothing else.  The
    result comes from the user's build cache where it was made before from the same texts by the same compiler.
    Threads and processes may call this at once.

    Returns:
        What ``unpack`` and ``launch.load`` read.

    Raises:
        CompileError: NVRTC refused the text, the expression or the architecture.
        Unsupported: there is no NVRTC or no CUDA headers here.
    """
    tools = toolkit()
    text = source.read_text()
    cache = BuildCache.of_user("cuda")
    key = (identity(__file__), tools.nvrtc, arch, expression, source.name, text, _headers(source.parent))
    if (known := cache.get(*key)) is not None:
        return known
    built = _compile(source, text, expression, arch, tools)
    cache.put(built, *key)
    return built


def unpack(built: bytes) -> Built:
    """Read what ``build`` returned.

    Raises:
        FileFormatError: ``built`` is something else, or only a part of it.
    """
    line, found, cubin = built.partition(b"\n")
    try:
        header = from_json(_Header, json.loads(line))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"not a CUDA kernel as zeroskip.cuda.compile.build returns it: {error}") from error
    if not found or not cubin.startswith(b"\x7fELF"):
        raise FileFormatError(f"CUDA kernel {header.symbol}: expected a cubin after its header, got {len(cubin)} bytes")
    return Built(header.symbol, header.arch, header.resources, cubin)


def resources(built: bytes) -> Resources:
    """Registers, spills, stack and shared memory of what ``build`` returned."""
    return unpack(built).resources


def ready() -> str | None:
    """None, or why CUDA code cannot be compiled here and what to do about it."""
    try:
        toolkit()
    except Unsupported as refusal:
        return str(refusal)
    return None


def imported(name: str) -> Any:
    """The module ``name`` of CUDA's Python packages, whole.  Every import of them in this folder goes through here.

    Early in its own import cuda.core (1.2) takes over the ``__spec__`` of a submodule that is done: Python then holds
    no other thread back, which finds cuda.core without most of its names.
    """
    with _importing:
        return importlib.import_module(name)


@functools.cache
def toolkit() -> Toolkit:
    """NVRTC and the CUDA headers: from pip's wheels (torch brings them), conda, CUDA_HOME or /usr/local/cuda.

    Raises:
        Unsupported: something is missing; the message says what to install.
    """
    try:
        imported("cuda.core")  # not used here, but its own needs are checked by importing it
        nvrtc, pathfinder = imported("cuda.bindings.nvrtc"), imported("cuda.pathfinder")
    except ImportError as error:
        raise Unsupported(f"compiling CUDA code needs cuda-core ({error}): {_ADVICE}") from error
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise Unsupported(f"compiling CUDA code needs the NVRTC library, which was not found: {_ADVICE}") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise Unsupported(f"NVRTC does not answer ({status}): {_ADVICE}")
    # pathfinder looks in wheels, conda, and below CUDA_HOME; the last resort is where NVIDIA's installers put it.
    include = Path(pathfinder.find_nvidia_header_directory("cudart") or "/usr/local/cuda/include")
    if not (include / "cuda_fp16.h").is_file():
        raise Unsupported(f"compiling CUDA code needs the CUDA headers, which were not found: {_ADVICE}")
    return Toolkit(exact_version("nvidia-cuda-nvrtc", major, minor), include)


def exact_version(library: str, major: int, minor: int) -> str:
    """Of NVIDIA's ``library``, as exact as a wheel tells it."""
    for wheel in (library, f"{library}-cu{major}"):
        try:
            version = metadata.version(wheel)
        except metadata.PackageNotFoundError:
            continue
        if version.startswith(f"{major}.{minor}."):
            return version
    return f"{major}.{minor}"


@functools.cache
def identity(file: str) -> str:
    """Of zeroskip and one of its files, which says with what options is built and what form the result has."""
    return f"{__version__} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"


@functools.cache
def _cuda_headers(folder: Path) -> str:
    """CUDA's headers are many and change with their version only; two that hold much code stand for the rest."""
    digest = hashlib.sha256(str(folder).encode())
    for name in ("cuda_runtime_api.h", "cuda_fp16.hpp", "cuda_bf16.hpp"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _headers(folder: Path) -> str:
    """Hash of every header that a source in ``folder`` can reach, with the names they are reached by."""
    ours = tuple((root, *_stamps(root)) for root in (INCLUDE, folder))
    return _hash(_cuda_headers(toolkit().include), ours)


def _stamps(root: Path) -> list[tuple[str, int, int]]:
    """Name below ``root``, time and size of every header: looked at hundreds of times by a planner, read once."""
    paths = [os.path.join(place, name) for place, _, names in os.walk(root) for name in names if name.endswith(".cuh")]
    stats = [(os.path.relpath(path, root), os.stat(path)) for path in paths]
    return sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


@functools.lru_cache(64)
def _hash(theirs: str, folders: tuple[tuple[Any, ...], ...]) -> str:
    digest = hashlib.sha256(theirs.encode())
    for index, (root, *stamps) in enumerate(folders):
        for name, _, _ in stamps:
            content = (root / name).read_bytes()
            digest.update(f"{index} {name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _compile(source: Path, text: str, expression: str, arch: str, tools: Toolkit) -> bytes:
    core = imported("cuda.core")
    name, log = f"{source.parent.name}/{source.name}", io.StringIO()
    options = core.ProgramOptions(
        name=name,
        arch=arch,
        std="c++17",
        include_path=[str(INCLUDE), str(source.parent), str(tools.include)],
        no_source_include=True,  # that folder would be the working folder
        ptxas_options=["-v"],
        no_cache=True,  # what the driver has cached comes without a log; the user's build cache is ours
    )
    try:
        code = core.Program(text, "c++", options).compile("cubin", name_expressions=(expression,), logs=log)
    except Exception as error:  # cuda.core has errors of its own in a private module, and lets others through
        raise CompileError(f"{name}: {expression} did not compile for {arch}", str(error).replace("\0", "")) from error
    symbol = code.symbol_mapping[expression].decode()
    header = _Header(symbol, arch, _resources(log.getvalue().replace("\0", ""), symbol))
    return json.dumps(dataclasses.asdict(header)).encode() + b"\n" + bytes(code.code)


def _resources(log: str, symbol: str) -> Resources:
    """Read ``ptxas -v``: the part on ``symbol``, which ends with the device functions that were not inlined into it.

    There are other parts where the source has kernels that are no templates: they are compiled every time.
    """
    _, _, part = log.partition(f"Compiling entry function '{symbol}'")
    part, _, _ = part.partition("Compiling entry function")
    used = re.search(r"Used (\d+) registers(.*)", part)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
    if used is None or not frames:
        raise CompileError(f"ptxas did not say what {symbol} takes; please report this", log)
    shared = re.search(r"(\d+) bytes smem", used[2])
    return Resources(
        registers=int(used[1]),
        spill_bytes=sum(int(stores) + int(loads) for _, stores, loads in frames),
        stack_bytes=max(int(stack) for stack, _, _ in frames),
        shared_bytes=int(shared[1]) if shared else 0,
        warnings=_warnings(log),
    )


def _warnings(log: str) -> str:
    """All but what ``-v`` asked for.  Some warnings of ptxas are "info" with a number, such as a serialised wgmma."""
    verbose = re.compile(r"\s*$|Remark: |ptxas info +: (?!\(C)|ptxas +\.")
    return "\n".join(line for line in log.splitlines() if not verbose.match(line))
