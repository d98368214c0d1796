"""NVRTC behind the build cache: what makes a key, what an error says, what a result must look like.  Needs no GPU."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zeroskip.core.cache import BuildCache
from zeroskip.core.errors import CompileError, FileFormatError, Unsupported
from zeroskip.cuda import compile as nvrtc
from zeroskip.cuda.compile import build, ready, resources, toolkit, unpack

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the compiler's wheels are for Linux")

KERNELS = Path(__file__).with_name("kernels.cuh")
ADD = "zeroskip::testing::add<float, 4>"
SIMPLE = """
#include "own.cuh"
template <int N> __global__ void fill(float* y) { y[threadIdx.x] = N * SCALE; }
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildCache:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return BuildCache.of_user("cuda")


@pytest.fixture
def compiled(cache: BuildCache, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Expressions that reached the compiler."""
    seen: list[str] = []
    compile_ = nvrtc._compile

    def counting(source: Path, text: str, expression: str, arch: str, tools: nvrtc.Toolkit) -> bytes:
        seen.append(expression)
        return compile_(source, text, expression, arch, tools)

    monkeypatch.setattr(nvrtc, "_compile", counting)
    return seen


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "fill"
    folder.mkdir()
    (folder / "own.cuh").write_text("#define SCALE 2\n")
    path = folder / "kernel.cuh"
    path.write_text(SIMPLE)
    return path


@pytest.fixture
def forgetful() -> Iterator[None]:
    """The compiler is looked for again, now and afterwards."""
    toolkit.cache_clear()
    yield
    toolkit.cache_clear()


# -- results ------------------------------------------------------------------------------------------
def test_a_build_holds_symbol_code_and_resources(cache: BuildCache) -> None:
    built = unpack(build(KERNELS, ADD, "sm_90a"))
    assert built.arch == "sm_90a"
    assert built.symbol.startswith("_ZN8zeroskip7testing3add")
    assert built.symbol.encode() in built.cubin
    assert 8 <= built.resources.registers <= 64
    assert built.resources.spill_bytes == built.resources.stack_bytes == built.resources.shared_bytes == 0


def test_static_shared_memory_is_counted(source: Path, cache: BuildCache) -> None:
    source.write_text("""
        template <int N> __global__ void turn(float* y) {
            __shared__ float kept[N];
            kept[threadIdx.x] = y[threadIdx.x];
            __syncthreads();
            y[threadIdx.x] = kept[N - 1 - threadIdx.x];
        }""")
    assert resources(build(source, "turn<256>", "sm_90a")).shared_bytes == 1024


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_an_array_indexed_at_run_time_shows_as_a_stack_frame(cache: BuildCache, arch: str) -> None:
    found = resources(build(KERNELS, "zeroskip::testing::indexed<float>", arch))
    assert found.stack_bytes == 128
    assert found.spill_bytes == 0


def test_spills_are_counted(cache: BuildCache) -> None:
    assert resources(build(KERNELS, "zeroskip::testing::spilling<64>", "sm_80")).spill_bytes > 0


def test_kernels_that_are_no_templates_do_not_lend_their_resources(source: Path, cache: BuildCache) -> None:
    source.write_text("""
        template <int N> __device__ int turned(int* y) {
            int kept[N];
            for (int i = 0; i < N; ++i) kept[(i * y[0]) % N] = y[i];
            return kept[y[1] % N];
        }
        __device__ __noinline__ int far(int* y) { return turned<16>(y); }
        __global__ void bad(int* y) { y[0] = turned<32>(y); }
        template <int N> __global__ void good(int* y) { y[0] = N; }
        template <int N> __global__ void calling(int* y) { y[0] = far(y) + far(y + N); }""")
    assert resources(build(source, "bad", "sm_90a")).stack_bytes == 128
    assert resources(build(source, "good<1>", "sm_90a")).stack_bytes == 0
    assert resources(build(source, "calling<1>", "sm_90a")).stack_bytes == 64


def test_what_ptxas_warns_of_is_kept() -> None:
    log = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
        "ptxas info    : 0 bytes gmem\nptxas info    : Compiling entry function 'f' for 'sm_90a'\n"
        "ptxas         .     0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 18 registers, used 1 barriers\nptxas warning : something\n\n"
    )
    warned = log.splitlines()[0] + "\nptxas warning : something"
    assert nvrtc._resources(log, "f") == nvrtc.Resources(18, 24, 0, 0, warned)
    with pytest.raises(CompileError, match="did not say"):
        nvrtc._resources(log, "g")


@pytest.mark.parametrize(
    "damage",
    [
        lambda built: b"",
        lambda built: built[:40],
        lambda built: built.partition(b"\n")[0],
        lambda built: built.partition(b"\n")[0] + b"\n",
        lambda built: built.partition(b"\n")[2],
        lambda built: b"{}\n" + built.partition(b"\n")[2],
        lambda built: b"[" * 100_000,
        lambda built: built.replace(b'"registers": ', b'"registers": "', 1),
        lambda built: built.replace(b'"arch"', b'"march"', 1),
        lambda built: b"\xff" + built,
    ],
)
def test_what_is_no_build_is_refused(damage: object) -> None:
    assert callable(damage)
    with pytest.raises(FileFormatError, match="CUDA kernel"):
        unpack(damage(build(KERNELS, ADD, "sm_90a")))


# -- the cache ----------------------------------------------------------------------------------------
def test_what_was_built_is_not_built_again(compiled: list[str]) -> None:
    first = build(KERNELS, ADD, "sm_80")
    assert build(KERNELS, ADD, "sm_80") == first
    assert compiled == [ADD]


def test_everything_a_kernel_depends_on_is_in_its_key(
    source: Path, compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "include"
    shutil.copytree(nvrtc.INCLUDE, shared)
    monkeypatch.setattr(nvrtc, "INCLUDE", shared)
    builds = [build(source, "fill<1>", "sm_80")]

    def changes() -> Iterator[None]:
        yield builds.append(build(source, "fill<2>", "sm_80"))
        yield builds.append(build(source, "fill<1>", "sm_90a"))
        source.with_name("own.cuh").write_text("#define SCALE 3\n")
        yield builds.append(build(source, "fill<1>", "sm_80"))
        source.with_name("another.cuh").write_text("")
        yield builds.append(build(source, "fill<1>", "sm_80"))
        (shared / "zeroskip" / "types.cuh").write_text("// changed")
        yield builds.append(build(source, "fill<1>", "sm_80"))
        (shared / "zeroskip" / "below").mkdir()
        (shared / "zeroskip" / "below" / "new.cuh").write_text("")
        yield builds.append(build(source, "fill<1>", "sm_80"))
        source.write_text(SIMPLE.replace("N *", "4 + N *"))
        yield builds.append(build(source, "fill<1>", "sm_80"))
        monkeypatch.setattr(nvrtc, "_cuda_headers", lambda folder: "another toolkit")
        yield builds.append(build(source, "fill<1>", "sm_80"))
        monkeypatch.setattr(nvrtc, "identity", lambda file: "another zeroskip")
        yield builds.append(build(source, "fill<1>", "sm_80"))

    for count, _ in enumerate(changes(), 2):
        assert len(compiled) == count
    assert builds[0] != builds[3]  # the other scale arrived


def test_a_corrupt_entry_is_compiled_again(cache: BuildCache, compiled: list[str]) -> None:
    good = build(KERNELS, ADD, "sm_80")
    (entry,) = cache.folder.iterdir()
    damaged = bytearray(entry.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    entry.write_bytes(damaged)
    assert build(KERNELS, ADD, "sm_80") == good
    assert len(compiled) == 2
    assert build(KERNELS, ADD, "sm_80") == good
    assert len(compiled) == 2


def test_a_folder_that_others_may_write_is_not_used(
    cache: BuildCache, compiled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    build(KERNELS, ADD, "sm_80")
    cache.folder.chmod(0o770)
    with caplog.at_level(logging.WARNING):
        unpack(build(KERNELS, ADD, "sm_80"))
    assert len(compiled) == 2
    assert "must belong to this user" in caplog.text


def _build_elsewhere(xdg: str) -> bytes:
    os.environ["XDG_CACHE_HOME"] = xdg
    return build(KERNELS, ADD, "sm_90a")


def test_four_processes_at_once_get_one_result(cache: BuildCache) -> None:
    with multiprocessing.get_context("forkserver").Pool(4) as pool:
        builds = pool.map(_build_elsewhere, [os.environ["XDG_CACHE_HOME"]] * 4, chunksize=1)
    assert {unpack(built).symbol for built in builds} == {unpack(build(KERNELS, ADD, "sm_90a")).symbol}
    assert len(list(cache.folder.iterdir())) == 1


def test_threads_at_once_get_their_own(compiled: list[str]) -> None:
    expressions = [f"zeroskip::testing::add<float, {count}>" for count in (1, 2, 4, 8)]
    with ThreadPoolExecutor(8) as pool:
        builds = list(pool.map(lambda expression: build(KERNELS, expression, "sm_90a"), expressions * 2))
    for expression, built in zip(expressions * 2, builds, strict=True):
        count = expression.partition(", ")[2].rstrip(">")
        assert f"IfLi{count}E" in unpack(built).symbol


FIRST_OF_ALL = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zeroskip.cuda.compile import build, unpack

class SlowDisk:
    def find_spec(self, name, path, target=None):
        if name.startswith("cuda.core."):
            time.sleep(0.01)

sys.meta_path.insert(0, SlowDisk())

def first(count):
    time.sleep(0.05 * count)  # somebody comes at every moment of the import
    return unpack(build(Path(sys.argv[1]), f"fill<{count}>", "sm_90a")).symbol

with ThreadPoolExecutor(8) as pool:
    print(len(set(pool.map(first, range(8)))), "kernels")
"""


def fresh(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own that finds what this one finds."""
    known = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.run([sys.executable, "-c", code, *arguments], env=known, capture_output=True, text=True)


@pytest.mark.parametrize("run", range(3))
def test_threads_may_compile_before_anything_is_imported(source: Path, tmp_path: Path, run: int) -> None:
    """Without our lock cuda.core shows itself half-made to every thread but the one that imports it."""
    done = fresh(FIRST_OF_ALL, str(source), XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert done.stdout == "8 kernels\n", done.stderr[-2000:]


# -- errors -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("broken", "expression", "arch", "words"),
    [
        (SIMPLE.replace("SCALE", "SCALE +"), "fill<1>", "sm_80", ("expected an expression", "fill/kernel.cuh(3)")),
        (SIMPLE, "nothing<1>", "sm_80", ("identifier", "nothing")),
        (SIMPLE, "fill<float>", "sm_80", ("fill<float>",)),
        (SIMPLE, "fill<1>", "sm_1", ("--gpu-architecture",)),
        (SIMPLE.replace("own.cuh", "absent.cuh"), "fill<1>", "sm_80", ("absent.cuh",)),
        (
            SIMPLE.replace("{ ", "{ __shared__ float x[99999]; x[y != 0] = 1; y[1] = x[N]; "),
            "fill<1>",
            "sm_80",
            ("shared",),
        ),
    ],
)
def test_a_compile_error_carries_the_log_and_the_files_name(
    source: Path, compiled: list[str], broken: str, expression: str, arch: str, words: tuple[str, ...]
) -> None:
    source.write_text(broken)
    with pytest.raises(CompileError) as caught:
        build(source, expression, arch)
    assert str(caught.value).startswith(f"fill/kernel.cuh: {expression} did not compile for {arch}\n")
    for word in words:
        assert word in caught.value.log
    assert "\0" not in caught.value.log


def test_the_working_folder_is_not_searched(
    source: Path, tmp_path: Path, cache: BuildCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody's file reaches a kernel because of where a program was started."""
    for folder in (tmp_path / "work", tmp_path / "work" / "fill"):
        folder.mkdir()
        (folder / "stray.cuh").write_text("#define SCALE 1")
    monkeypatch.chdir(tmp_path / "work")
    source.write_text(SIMPLE.replace("own.cuh", "stray.cuh"))
    with pytest.raises(CompileError, match=r"stray\.cuh"):
        build(source, "fill<1>", "sm_80")


@pytest.mark.usefixtures("forgetful")
def test_without_cuda_core_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    assert "pip install 'zeroskip[cuda]'" in str(ready())
    with pytest.raises(Unsupported, match="needs cuda-core"):
        build(KERNELS, ADD, "sm_80")


@pytest.mark.usefixtures("forgetful")
def test_without_nvrtc_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise RuntimeError("no libnvrtc")

    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcVersion", absent)
    assert "NVRTC library" in str(ready())
    assert "nvidia-cuda-nvrtc" in str(ready())


@pytest.mark.usefixtures("forgetful")
def test_without_headers_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda.pathfinder.find_nvidia_header_directory", lambda name: str(tmp_path))
    assert "CUDA headers" in str(ready())
    assert "nvidia-cuda-runtime" in str(ready())


def test_here_everything_is_ready() -> None:
    assert ready() is None
    assert toolkit().nvrtc.startswith("1")
    assert (toolkit().include / "cuda_fp16.h").is_file()


def test_importing_imports_no_cuda() -> None:
    code = (
        "import sys, zeroskip, zeroskip.cuda.compile, zeroskip.cuda.launch;"
        "sys.exit(', '.join(m for m in ('cuda.core', 'cuda.bindings.nvrtc', 'triton') if m in sys.modules) or 0)"
    )
    done = fresh(code)
    assert done.returncode == 0, done.stderr
