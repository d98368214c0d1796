"""CUDA kernels as C++ on the CPU, compiled by g++: what their emulators share.

CUDA's types and functions become C++, its built-in variables globals, and ``zeroskip/copy.cuh`` checked copies that
come as late as they may.  What may be read is known byte by byte.  How threads run is each emulator's ``machine.h``.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeroskip.cuda.compile import INCLUDE

FILES = {
    "cuda_fp16.h": """
#pragma once
using __half = _Float16;
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
""",
    "cuda_bf16.h": """
#pragma once
struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return {uint16_t(0x7fc0)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
""",
    # Before machine.h.  Variables are static, since emulators in one process have some of the same name.
    "cuda_on_cpu.h": """
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
struct Triple { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static Triple gridDim, blockDim, blockIdx, threadIdx;
template <typename T> T __ldg(const T* from) { return *from; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (static_cast<uint64_t>(a) * b) >> 32; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// Storage of a tensor, and for each of its bytes: may it be read?
struct Region { const char* begin; int64_t bytes; const char* readable; };
static Region regions[3];
static int64_t faults;
inline bool readable(const void* from, int bytes) {
    const char* address = static_cast<const char*>(from);
    for (const Region& region : regions)
        if (region.begin <= address && address + bytes <= region.begin + region.bytes) {
            bool all = true;
            for (int byte = 0; byte < bytes; ++byte) all = all && region.readable[address - region.begin + byte];
            return all;
        }
    return false;
}
inline bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }
// A copy to shared memory that is under way, and those of a thread.
struct Copy { void* to; const void* from; int bytes; };
using Groups = std::vector<std::vector<Copy>>;

static std::function<void()> body;  // the kernel with its arguments
""",
    # Behind machine.h, which then says where the shared memory of the running thread's block begins (shared_begin()),
    # how large it is (shared_bytes), which copies the thread has begun (groups()), and whether they come late (late).
    "zeroskip/copy.cuh": """
#pragma once
namespace zeroskip {
inline unsigned shared_address(const void* pointer) { return static_cast<const char*>(pointer) - shared_begin(); }
inline bool in_shared(const void* pointer, int bytes) {
    const char* address = static_cast<const char*>(pointer);
    return shared_begin() <= address && address + bytes <= shared_begin() + shared_bytes;
}
template <int kBytes> void copy_short(void* to, const void* from) {
    const bool right = in_shared(to, kBytes) && aligned(to, kBytes) && readable(from, kBytes) && aligned(from, kBytes);
    if (!right) ++faults;
    else if (late) groups().back().push_back({to, from, kBytes});
    else memcpy(to, from, kBytes);
}
inline void copy_16(void* to, const void* from) { copy_short<16>(to, from); }
inline void copy_commit() { groups().emplace_back(); }
template <int kPending> void copy_wait() {
    for (; groups().size() > kPending + 1; groups().erase(groups().begin()))
        for (const Copy& one : groups().front()) memcpy(one.to, one.from, one.bytes);
}
}  // namespace zeroskip
""",
    # machine.h has run_grid(sizes), which calls body() once in each thread of the grid.
    "launch.h": """
#include <setjmp.h>
#include <signal.h>
template <typename A> A as(int64_t value) {
    if constexpr (std::is_pointer_v<A>) return reinterpret_cast<A>(value);
    else return static_cast<A>(value);
}
template <typename... A, size_t... I>
std::function<void()> bound(void (*kernel)(A...), const int64_t* arguments, std::index_sequence<I...>) {
    return [=] { kernel(as<A>(arguments[I])...); };
}
static sigjmp_buf before;
inline void leave(int) { siglongjmp(before, 1); }
template <typename... A>
int64_t launch(void (*kernel)(A...), int64_t count, const int64_t* arguments, const int64_t* sizes,
               const int64_t* memory) {
    if (count != sizeof...(A)) return -1;
    gridDim = {unsigned(sizes[0]), unsigned(sizes[1]), unsigned(sizes[2])};
    blockDim = {unsigned(sizes[3]), unsigned(sizes[4]), unsigned(sizes[5])};
    for (int i = 0; i < 3; ++i)
        regions[i] = {as<const char*>(memory[3 * i]), memory[3 * i + 1], as<const char*>(memory[3 * i + 2])};
    faults = 0;
    body = bound(kernel, arguments, std::make_index_sequence<sizeof...(A)>{});
    struct sigaction ours = {}, theirs;
    ours.sa_handler = leave;
    sigaction(SIGSEGV, &ours, &theirs);
    if (sigsetjmp(before, 1)) faults = -2;
    else run_grid(sizes + 6);
    sigaction(SIGSEGV, &theirs, nullptr);
    return faults;
}
#define ENTRY(name, ...) extern "C" int64_t name(int64_t n, const int64_t* a, const int64_t* s, const int64_t* m) { \\
    return launch(__VA_ARGS__, n, a, s, m); }
""",
}


class CpuKernel:
    """Instances of the kernel in ``source``, compiled into ``folder``; stands in for ``zeroskip.cuda.launch.load``.

    ``files`` are an emulator's ``machine.h`` and what else it replaces, by name.
    """

    def __init__(self, folder: Path, source: Path, expressions: Sequence[str], files: Mapping[str, str]) -> None:
        (folder / "zeroskip").mkdir()
        for name, text in {**FILES, **files}.items():
            (folder / name).write_text(text)
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
        flags += [f"-I{folder}", f"-I{INCLUDE}"]
        texts, jobs = list(dict.fromkeys(expressions)), []
        for part in range(min(2, len(texts))):
            names = {text: f"entry_{i}" for i, text in enumerate(texts) if i % 2 == part}
            lines = [f'#include "{header}"' for header in ("cuda_on_cpu.h", "machine.h", source, "launch.h")]
            lines += [f"ENTRY({name}, {text})" for text, name in names.items()]
            driver, library = folder / f"driver{part}.cpp", folder / f"emulated{part}.so"
            driver.write_text("\n".join([*lines, ""]))
            command = ["g++", *flags, "-o", str(library), str(driver)]
            jobs.append((names, library, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        self.functions: dict[str, Any] = {}
        for names, library, job in jobs:
            _, errors = job.communicate()
            assert job.returncode == 0, errors[:4000]
            loaded = ctypes.CDLL(str(library))
            self.functions |= {text: getattr(loaded, name) for text, name in names.items()}

    def load(self, built: bytes) -> Any:
        self.expression = built.decode()
        return self

    def run(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
        read: Sequence[Tensor | None],
        *more: int,
    ) -> int:
        """The number of faults.  ``read``: three tensors (or None) that may be read; ``more`` goes to ``run_grid``."""
        assert max(grid[1:]) <= 65535
        assert len(read) == 3
        numbers, memory = [_number(argument) for argument in arguments], []
        masks = [_mask(tensor) for tensor in read]
        for tensor, mask in zip(read, masks, strict=True):
            memory += [0 if tensor is None else tensor.untyped_storage().data_ptr(), mask.numel(), mask.data_ptr()]
        function = self.functions[self.expression]
        function.restype = ctypes.c_int64
        sizes = _array([*grid, *block, *more])
        faults: int = function(ctypes.c_int64(len(numbers)), _array(numbers), sizes, _array(memory))
        assert faults != -1, "the kernel takes other arguments"
        assert faults != -2, "an address lies far from everything or is not aligned"
        return faults


def _mask(tensor: Tensor | None) -> Tensor:
    """A byte for each byte of a tensor's storage: is it the tensor's?"""
    if tensor is None:
        return torch.zeros(0, dtype=torch.uint8)
    mask = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=torch.uint8)
    mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(1)
    return mask.repeat_interleave(tensor.element_size())


def _number(argument: object) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    assert argument is None or isinstance(argument, int)
    assert -(2**31) <= (argument or 0) < 2**31
    return argument or 0


def _array(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)
