"""PTX text -> machine code of its kernel, with or without a GPU in this machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable

from zeroskip.core.cache import BuildCache
from zeroskip.core.errors import CompileError, Unsupported
from zeroskip.cuda.compile import Resources, exact_version, identity, imported

_ADVICE = "pip install 'zeroskip[cuda]' nvidia-nvjitlink"
_RESERVED = 1024
"""Bytes of shared memory that nvJitLink counts as the kernel's and Hopper keeps for itself."""
_SPLITS = 13
"""The first nvJitLink that is known to assemble the functions of one text side by side."""
_locks: dict[bytes, threading.Lock] = {}
"""By what texts are made of.  Whoever wants one assembled waits for who does it already: it can take a minute."""
_MOST_SAID, _MOST_QUOTED = 20, 5
"""Lines of the assembler and of the text that an error shows: generated text repeats its mistakes."""


def build(text: str, symbol: str, arch: str) -> bytes:
    """Assemble the PTX ``text`` for GPUs of ``arch`` ("sm_80", "sm_90a", ...); its entry is ``symbol``.

    The result comes from the user's build cache where the same text was assembled before by the same nvJitLink.
    Threads and processes may call this at once: nvJitLink lets other Python threads run.

    Returns:
        What ``compile.unpack`` and ``launch.load`` read.

    Raises:
        CompileError: nvJitLink refused the text or the architecture; the log ends with the lines it points at.
        Unsupported: there is no nvJitLink here.
    """
    return build_from(lambda: text, text, symbol, arch)


def build_from(emit: Callable[[], str], made_of: str, symbol: str, arch: str) -> bytes:
    """``build`` of a text that is written only if the cache does not have its code.

    Args:
        emit: writes the text.
        made_of: all that the text depends on.
    """
    cache, key = BuildCache.of_user("cuda"), (identity(__file__), linker(), arch, symbol, made_of)
    with _locks.setdefault(hashlib.sha256(made_of.encode()).digest(), threading.Lock()):
        if (known := cache.get(*key)) is not None:
            return known
        built = _assemble(emit(), symbol, arch)
        cache.put(built, *key)
        return built


@functools.cache
def linker() -> str:
    """The version of nvJitLink, as exact as it is known.

    Raises:
        Unsupported: something is missing; the message says what to install.
    """
    try:
        imported("cuda.core")
        major, minor = imported("cuda.bindings.nvjitlink").version()
    except (ImportError, RuntimeError) as error:
        raise Unsupported(f"assembling PTX needs cuda-core and the nvJitLink library ({error}): {_ADVICE}") from error
    return exact_version("nvidia-nvjitlink", major, minor)


def _assemble(text: str, symbol: str, arch: str) -> bytes:
    if not re.fullmatch(r"sm_\d{2,3}[af]?", arch):  # nvJitLink would end the process
        raise CompileError(f"{symbol} did not assemble for {arch}", 'an architecture is called like "sm_90a"')
    core = imported("cuda.core")
    # The info log is what `verbose` and `-v` ask for.  What nvJitLink has cached would come without one.
    wishes = ["-v"]
    if imported("cuda.bindings.nvjitlink").version()[0] >= _SPLITS:
        wishes.append(f"--split-compile={os.cpu_count()}")
    options = core.LinkerOptions(name=symbol, arch=arch, verbose=True, ptxas_options=wishes, no_cache=True)
    try:
        linking = core.Linker(core.ObjectCode.from_ptx(text.encode(), name=symbol), options=options)
        cubin = bytes(linking.link("cubin").code)
        log = linking.get_info_log() + linking.get_error_log()
    except Exception as error:  # noqa: BLE001  (nvJitLink's own error has no base, and cuda.core lets others through)
        said = str(error).replace("\0", "").splitlines()[:_MOST_SAID]
        log = "\n".join(line for line in [*said, *_quoted("\n".join(said), text)] if line)
        raise CompileError(f"{symbol} did not assemble for {arch}", log) from None
    header = {
        "symbol": symbol,
        "arch": arch,
        "resources": dataclasses.asdict(_resources(log.replace("\0", ""), symbol, arch)),
    }
    return json.dumps(header).encode() + b"\n" + cubin


def _quoted(log: str, text: str) -> list[str]:
    """The lines of ``text`` that ``log`` names."""
    lines = text.splitlines()
    numbers = dict.fromkeys(int(number) for number in re.findall(r"\bline (\d+)", log))
    return [f"line {number}: {lines[number - 1]}" for number in numbers if number <= len(lines)][:_MOST_QUOTED]


def _resources(log: str, symbol: str, arch: str) -> Resources:
    """Read what ptxas says of every function and nvJitLink of the kernel with all that it calls."""
    _, _, whole = log.partition(f"Function properties for '{symbol}':")
    used = re.search(r"used (\d+) registers.*?(\d+) stack(?:.*?(\d+) bytes smem)?", whole)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if used is None or not frames:
        raise CompileError(f"nvJitLink did not say what {symbol} takes; please report this", log)
    shared = int(used[3] or 0)
    if arch.startswith("sm_9"):
        shared = max(0, shared - _RESERVED)
    warnings = [line for line in log.splitlines() if "warning" in line or re.match(r"ptxas info +: \(C", line)]
    return Resources(
        registers=int(used[1]),
        spill_bytes=sum(int(stores) + int(loads) for _, stores, loads in frames),
        stack_bytes=int(used[2]),
        shared_bytes=shared,
        warnings="\n".join(warnings),
    )
