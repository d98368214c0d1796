"""Assembling PTX: results, resources, the cache and the errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zeroskip.core.cache import BuildCache
from zeroskip.core.errors import CompileError, Unsupported
from zeroskip.cuda import assemble
from zeroskip.cuda.assemble import build, linker
from zeroskip.cuda.compile import Resources, resources, unpack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the linker's wheels are for Linux")

TEXT = """.version 8.1
.target sm_80
.address_size 64
.visible .entry fill(.param .u64 y)
.reqntid 32
{
	.reg .b32 %r<2>;
	.reg .b64 %d<3>;
	.reg .f32 %f<2>;
	ld.param.u64 %d0, [y];
	cvta.to.global.u64 %d1, %d0;
	mov.u32 %r0, %tid.x;
	mad.wide.u32 %d2, %r0, 4, %d1;
	mov.f32 %f0, 0f40400000;
	st.global.f32 [%d2], %f0;
	ret;
}
"""
SHARED = TEXT.replace(".visible", ".shared .align 4 .b8 kept[256];\n.visible").replace(
    "mov.f32 %f0, 0f40400000;", "st.shared.u32 [kept], %r0;\n\tbar.sync 0;\n\tld.shared.f32 %f0, [kept+4];"
)


def many(numbers: int, registers: int) -> str:
    """A kernel and a function it calls, which holds so many numbers at once."""
    loads = "\n".join(f"\tld.volatile.global.f32 %f{i}, [%d0+{4 * i}];" for i in range(numbers))
    stores = "\n".join(f"\tst.volatile.global.f32 [%d0+{4 * i}], %f{numbers - 1 - i};" for i in range(numbers))
    return f""".version 8.1
.target sm_80
.address_size 64
.func far(.param .b64 y)
.noreturn
{{
	.reg .b64 %d<1>;
	.reg .f32 %f<{numbers}>;
	ld.param.b64 %d0, [y];
{loads}
{stores}
	exit;
}}
.visible .entry fill(.param .u64 y)
.reqntid 32
.maxnreg {registers}
{{
	.reg .b64 %d<1>;
	ld.param.u64 %d0, [y];
	{{
	.param .b64 a0;
	st.param.b64 [a0], %d0;
	call.uni far, (a0);
	}}
}}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildCache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return BuildCache.of_user("cuda")


@pytest.fixture
def assembled(cache: BuildCache, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that reached the assembler."""
    seen: list[str] = []
    assemble_ = assemble._assemble

    def counting(text: str, symbol: str, arch: str) -> bytes:
        seen.append(text)
        return assemble_(text, symbol, arch)

    monkeypatch.setattr(assemble, "_assemble", counting)
    return seen


@pytest.fixture
def forgetful() -> Iterator[None]:
    """The linker is looked for again, now and afterwards."""
    linker.cache_clear()
    yield
    linker.cache_clear()


# -- results ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_a_build_holds_symbol_code_and_resources(cache: BuildCache, arch: str) -> None:
    built = unpack(build(TEXT, "fill", arch))
    assert (built.symbol, built.arch) == ("fill", arch)
    assert b"fill" in built.cubin
    assert 4 <= built.resources.registers <= 32
    assert built.resources == Resources(built.resources.registers, 0, 0, 0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_static_shared_memory_is_counted(cache: BuildCache, arch: str) -> None:
    """And what newer GPUs take for themselves is not."""
    assert resources(build(SHARED, "fill", arch)).shared_bytes == 256


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_functions_that_a_kernel_calls_count(cache: BuildCache, arch: str) -> None:
    roomy, tight = (resources(build(many(80, registers), "fill", arch)) for registers in (128, 40))
    assert 80 <= roomy.registers <= 128
    assert roomy.spill_bytes == roomy.stack_bytes == 0
    assert tight.registers <= 40
    assert tight.spill_bytes > 0
    assert tight.stack_bytes > 0


def test_what_ptxas_warns_of_is_kept() -> None:
    log = (
        "ptxas info    : (C7510) Potential Performance Loss\n"
        "ptxas info    : Compiling entry function 'f' for 'sm_90a'\n"
        "ptxas         .     0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 18 registers, used 1 barriers\nptxas warning : something\n"
        "info    : Function properties for 'f':\n"
        "info    : used 20 registers, used 1 barriers, 8 stack, 1280 bytes smem\n"
    )
    warned = "ptxas info    : (C7510) Potential Performance Loss\nptxas warning : something"
    assert assemble._resources(log, "f", "sm_90a") == Resources(20, 24, 8, 256, warned)
    with pytest.raises(CompileError, match="did not say"):
        assemble._resources(log, "g", "sm_90a")


# -- the cache ----------------------------------------------------------------------------------------
def test_what_was_assembled_is_not_assembled_again(assembled: list[str]) -> None:
    first = build(TEXT, "fill", "sm_80")
    assert build(TEXT, "fill", "sm_80") == first
    assert len(assembled) == 1


def test_everything_a_kernel_depends_on_is_in_its_key(assembled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    build(TEXT, "fill", "sm_80")
    build(TEXT, "fill", "sm_90a")
    build(TEXT.replace("0f4040", "0f4080"), "fill", "sm_80")
    monkeypatch.setattr(assemble, "linker", lambda: "another")
    build(TEXT, "fill", "sm_80")
    monkeypatch.setattr(assemble, "identity", lambda file: "another zeroskip")
    build(TEXT, "fill", "sm_80")
    assert len(assembled) == 5


def test_a_corrupt_entry_is_assembled_again(cache: BuildCache, assembled: list[str]) -> None:
    good = build(TEXT, "fill", "sm_80")
    (entry,) = cache.folder.iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    assert build(TEXT, "fill", "sm_80") == good
    assert len(assembled) == 2


def test_threads_at_once_get_their_own(assembled: list[str]) -> None:
    texts = [TEXT.replace("0f40400000", f"0f4040000{digit}") for digit in range(8)]
    with ThreadPoolExecutor(8) as pool:
        builds = list(pool.map(lambda text: build(text, "fill", "sm_90a"), texts * 2))
    assert builds[:8] == builds[8:]
    assert len(set(builds)) == 8


# -- errors -------------------------------------------------------------------------------------------
def test_an_error_shows_the_lines_it_is_about(assembled: list[str]) -> None:
    broken = TEXT.replace("mov.f32 %f0", "mov.f32 %q0")
    with pytest.raises(CompileError) as caught:
        build(broken, "fill", "sm_80")
    assert str(caught.value).startswith("fill did not assemble for sm_80\n")
    assert "Unknown symbol '%q0'" in caught.value.log
    assert caught.value.log.endswith("line 14: \tmov.f32 %q0, 0f40400000;")
    assert "\0" not in caught.value.log


def test_an_error_is_short_however_often_it_is_made(assembled: list[str]) -> None:
    broken = TEXT.replace("\tret;", "\tmov.f32 %q0, %q1;\n" * 1000 + "\tret;")
    with pytest.raises(CompileError) as caught:
        build(broken, "fill", "sm_80")
    assert len(caught.value.log.splitlines()) <= 25


@pytest.mark.parametrize(
    ("text", "symbol", "arch", "words"),
    [
        (TEXT, "fill", "sm_1", "an architecture is called like"),
        (TEXT, "fill", "sm_20", "fill did not assemble for sm_20"),
        (TEXT.replace("sm_80", "sm_90"), "fill", "sm_80", "higher than"),
        (TEXT, "nothing", "sm_80", "did not say what nothing takes"),
        ("hello", "fill", "sm_80", "fill did not assemble"),
    ],
)
def test_what_does_not_assemble_says_why(assembled: list[str], text: str, symbol: str, arch: str, words: str) -> None:
    with pytest.raises(CompileError, match=words):
        build(text, symbol, arch)


@pytest.mark.usefixtures("forgetful")
def test_without_nvjitlink_the_message_says_what_to_install(cache: BuildCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise RuntimeError("no libnvJitLink")

    monkeypatch.setattr("cuda.bindings.nvjitlink.version", absent)
    with pytest.raises(Unsupported, match="nvidia-nvjitlink"):
        build(TEXT, "fill", "sm_80")


def test_importing_imports_no_cuda() -> None:
    code = (
        "import sys, zeroskip.cuda.assemble, zeroskip.methods.sparsert.method;"
        "sys.exit(', '.join(m for m in ('cuda.core', 'cuda.bindings.nvjitlink') if m in sys.modules) or 0)"
    )
    known = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
