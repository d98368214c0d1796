"""LLVM IR text -> object code -> function pointer, for the machine this process runs on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from zeroskip.core.cache import BuildCache
from zeroskip.core.errors import CompileError


@functools.cache
def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="jitdefault",
    )


@functools.cache
def host() -> str:
    """What object code depends on besides its text: processor, its features, and the compiler's version."""
    features = llvm.get_host_cpu_features().flatten()
    return f"{llvm.get_host_cpu_name()};{features};llvmlite {llvmlite.__version__};llvm {llvm.llvm_version_info}"


def _optimised(text: str) -> tuple[Any, Any]:
    machine = _machine()
    try:
        module = llvm.parse_assembly(text)
        module.verify()
    except RuntimeError as error:
        raise CompileError("the generated LLVM IR was refused; please report this", str(error)) from error
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    # The kernels are vectorised and unrolled as written; these passes only cost time here.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module, machine


def assemble(text: str) -> bytes:
    """Object code of IR ``text`` for this machine, from the user's build cache where it was made before.

    Raises:
        CompileError: LLVM refused the text.
    """
    cache = BuildCache.of_user("cpu")
    if (known := cache.get(text, host())) is not None:
        return known
    module, machine = _optimised(text)
    built = bytes(machine.emit_object(module))
    cache.put(built, text, host())
    return built


def assembly(text: str) -> str:
    """The same as assembly language, for people."""
    module, machine = _optimised(text)
    return str(machine.emit_assembly(module))


@dataclass(frozen=True)
class Loaded:
    """Machine code in memory.  ``address`` is valid as long as this object lives."""

    address: int
    engine: Any


@functools.lru_cache(1024)
def load(object_code: bytes, symbol: str) -> Loaded:
    """Link ``object_code`` into this process and find ``symbol``; layers of one shape share their code."""
    machine = _machine()
    module = llvm.parse_assembly("")
    module.triple = machine.triple
    # A machine of its own: the engine takes ownership of the one it is given.
    own = llvm.Target.from_default_triple().create_target_machine(opt=0, reloc="pic", codemodel="jitdefault")
    engine = llvm.create_mcjit_compiler(module, own)
    engine.add_object_file(llvm.ObjectFileRef.from_data(object_code))
    engine.finalize_object()
    return Loaded(engine.get_function_address(symbol), engine)
