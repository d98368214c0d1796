"""Escort's CUDA kernel as C++ on the CPU: threads of a cluster as fibers, every load of x checked.

CUDA's built-in variables become globals, and ``async.cuh`` and ``windows.cuh`` are replaced by what they mean.  Copies
that a kernel does not wait for come at once in one run and as late as they may in another, in which blocks and threads
also take their turns backwards; both must give the same bits.  Shared memory begins as NaN.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeroskip.cuda.compile import INCLUDE
from zeroskip.methods.escort import cuda

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
    "machine.h": """
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
struct Triple { unsigned x, y, z; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
template <typename T> T __ldg(const T* from) { return *from; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

struct Region { const char* begin; int64_t bytes; const char* readable; };
struct Block { char* memory; int arrived = 0; int64_t turn = 0; };
struct Thread {
    ucontext_t context;
    char* stack;
    Triple index, block;
    int rank;
    bool done = false;
    std::function<bool()> ready;
    std::vector<std::vector<std::function<void()>>> groups{1};
};
inline Triple gridDim, blockDim, blockIdx, threadIdx;
inline Region regions[3];
inline int64_t faults, shared_bytes;
inline bool late;
inline std::vector<Block> blocks;
inline std::vector<Thread> threads;
inline std::vector<std::function<void()>> pushed;
inline Thread* running;
inline ucontext_t scheduler;
inline int cluster_arrived;
inline int64_t cluster_turn;

inline void pause_until(std::function<bool()> ready) {
    running->ready = ready;
    swapcontext(&running->context, &scheduler);
}
inline void meet(int& arrived, int64_t& turn, int count) {
    const int64_t now = turn;
    if (++arrived == count) { arrived = 0; ++turn; }
    else pause_until([&turn, now] { return turn != now; });
}
inline void __syncwarp() {}
inline void __syncthreads() { Block& mine = blocks[running->rank]; meet(mine.arrived, mine.turn, blockDim.x); }
inline bool readable(const void* from, int bytes) {
    const char* address = static_cast<const char*>(from);
    for (const Region& region : regions)
        if (region.begin <= address && address + bytes <= region.begin + region.bytes) {
            bool all = true;
            for (int byte = 0; byte < bytes; ++byte)
                all = all && (region.readable == nullptr || region.readable[address - region.begin + byte]);
            return all;
        }
    return false;
}
inline bool in_shared(const void* pointer, int bytes) {
    const char* memory = blocks[running->rank].memory;
    const char* address = static_cast<const char*>(pointer);
    return memory <= address && address + bytes <= memory + shared_bytes;
}
inline bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }
""",
    "async.cuh": """
#pragma once
#include <zeroskip/types.cuh>
namespace zeroskip::escort {
inline uint4* shared_memory() { return reinterpret_cast<uint4*>(blocks[running->rank].memory); }
inline unsigned shared_address(const void* pointer) {
    return static_cast<const char*>(pointer) - blocks[running->rank].memory;
}
inline uint4 load_early(unsigned address) {
    const char* from = blocks[running->rank].memory + address;
    uint4 loaded{};
    if (!in_shared(from, 16) || address % 16) ++faults;
    else memcpy(&loaded, from, 16);
    return loaded;
}
template <typename T, int kCount> void copy(void* shared, const T* global, bool now) {
    const int bytes = kCount * sizeof(T);
    if (!readable(global, bytes) || !aligned(global, bytes) || !in_shared(shared, bytes)) { ++faults; return; }
    std::vector<T> values(global, global + kCount);
    auto come = [=] {
        if constexpr (std::is_same_v<T, uint4>) memcpy(shared, values.data(), bytes);
        else for (int i = 0; i < kCount; ++i) static_cast<float*>(shared)[i] = to_float(values[i]);
    };
    if (now || !late) come();
    else running->groups.back().push_back(come);
}
inline void copy_weights(uint4* shared, const uint4* global) {
    if (!aligned(shared, 16)) ++faults;
    copy<uint4, 1>(shared, global, false);
}
template <int kWide, typename T> void copy_pixels(float* shared, const T* global) {
    if (!aligned(shared, 4 * kWide)) ++faults;
    copy<T, kWide>(shared, global, sizeof(T) != 4);
}
inline void copy_commit() { running->groups.emplace_back(); }
template <int kPending> void copy_wait() {
    auto& groups = running->groups;
    while (int(groups.size()) > kPending + 1) {
        for (auto& come : groups.front()) come();
        groups.erase(groups.begin());
    }
}
struct Arrival {
    int64_t state;
    void expect(int bytes) { state = bytes; }
    void wait() {
        for (auto& come : pushed) come();
        pushed.clear();
        if (state) pause_until([this] { return state == 0; });
    }
};
inline void cluster_sync() { meet(cluster_arrived, cluster_turn, threads.size()); }
template <int kCount> void push(const float* local, const float* values, int rank, const Arrival* arrival) {
    const Block& mine = blocks[running->rank];
    const auto there = [&](const void* pointer) {
        return blocks[rank].memory + (static_cast<const char*>(pointer) - mine.memory);
    };
    if (!in_shared(local, 4 * kCount) || !aligned(local, 4 * kCount)) { ++faults; return; }
    float* to = reinterpret_cast<float*>(there(local));
    Arrival* count = reinterpret_cast<Arrival*>(there(arrival));
    std::vector<float> copied(values, values + kCount);
    auto come = [=] { memcpy(to, copied.data(), 4 * kCount); count->state -= 4 * kCount; };
    if (late) pushed.push_back(come);
    else come();
}
}  // namespace zeroskip::escort
""",
    "windows.cuh": """
#pragma once
#include <async.cuh>
namespace zeroskip::escort {
template <int kRows, int kPixels, int kStep, int kPitch>
void run_program(float (&sums)[kRows][kPixels], const uint2* program, const float* lane) {
    float window[(kPixels - 1) * kStep + 3];
    for (float& pixel : window) pixel = NAN;
    const uint2* record = program;
    for (unsigned code = record++->y; code != 3 * kRows + 1;) {
        if (code > 3 * kRows + 1 || !in_shared(record, 16)) { ++faults; return; }
        const uint2 step = *record++;
        if (code == 3 * kRows) {
            const float* from = reinterpret_cast<const float*>(reinterpret_cast<const char*>(lane) + int(step.x));
            for (float& pixel : window) { pixel = *from; from += kPitch; }
        } else {
            for (int i = 0; i < kPixels; ++i)
                sums[code / 3][i] = fmaf(__uint_as_float(step.x), window[i * kStep + code % 3], sums[code / 3][i]);
        }
        code = step.y;
    }
}
}  // namespace zeroskip::escort
""",
    "driver.h": """
#include "machine.h"
#include KERNEL
template <typename A> A as(int64_t value) {
    if constexpr (std::is_pointer_v<A>) return reinterpret_cast<A>(value);
    else return static_cast<A>(value);
}
inline std::function<void()> body;
inline void begin() {
    body();
    running->done = true;
    swapcontext(&running->context, &scheduler);
}
// Lets each thread of a block run until it waits; whether one moved.
inline bool run_block(int rank) {
    bool moved = false;
    for (unsigned i = 0; i < blockDim.x; ++i) {
        Thread& thread = threads[rank * blockDim.x + (late ? blockDim.x - 1 - i : i)];
        if (thread.done || (thread.ready && !thread.ready())) continue;
        thread.ready = nullptr;
        running = &thread;
        threadIdx = thread.index;
        blockIdx = thread.block;
        swapcontext(&scheduler, &thread.context);
        moved = true;
    }
    return moved;
}
// The blocks of a cluster in turns, or the last ones as far as they get before the first ones begin, until all are
// done; what none can end is a fault.
inline void run_cluster() {
    for (bool moved = true; moved;) {
        moved = false;
        for (int i = 0; i < int(blocks.size()); ++i) {
            const int rank = late ? blocks.size() - 1 - i : i;
            while (run_block(rank)) {
                moved = true;
                if (!late) break;
            }
        }
    }
    for (const Thread& thread : threads)
        if (!thread.done) faults += 1000000;
}
template <typename... A, size_t... I>
void run(void (*kernel)(A...), const int64_t* arguments, std::index_sequence<I...>) {
    constexpr int kStack = 48 * 1024, kGuard = 4096;
    body = [=] { kernel(as<A>(arguments[I])...); };
    std::vector<char> stacks(size_t(kStack) * blockDim.x * gridDim.z);
    std::vector<uint4> memory((shared_bytes + kGuard) / 16 * gridDim.z);
    for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; ++x) {
        memset(memory.data(), 0xff, memory.size() * 16);
        blocks.assign(gridDim.z, Block{});
        threads.assign(blockDim.x * gridDim.z, Thread{});
        pushed.clear();
        cluster_arrived = 0;
        for (unsigned z = 0; z < gridDim.z; ++z)
            blocks[z].memory = reinterpret_cast<char*>(memory.data()) + z * (shared_bytes + kGuard);
        for (size_t i = 0; i < threads.size(); ++i) {
            Thread& thread = threads[i];
            thread.rank = i / blockDim.x;
            thread.index = {unsigned(i % blockDim.x), 0, 0};
            thread.block = {x, y, unsigned(thread.rank)};
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = stacks.data() + i * kStack;
            thread.context.uc_stack.ss_size = kStack;
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, begin, 0);
        }
        run_cluster();
        for (const Block& block : blocks)
            for (int byte = 0; byte < kGuard; ++byte) faults += block.memory[shared_bytes + byte] != char(0xff);
        if (faults) return;
    }
}
template <typename... A>
int64_t launch(void (*kernel)(A...), int64_t count, const int64_t* arguments, const int64_t* sizes,
               const int64_t* memory) {
    if (count != sizeof...(A)) return -1;
    gridDim = {unsigned(sizes[0]), unsigned(sizes[1]), unsigned(sizes[2])};
    blockDim = {unsigned(sizes[3]), 1, 1};
    shared_bytes = sizes[4];
    late = sizes[5];
    for (int i = 0; i < 3; ++i)
        regions[i] = {as<const char*>(memory[3 * i]), memory[3 * i + 1], as<const char*>(memory[3 * i + 2])};
    faults = 0;
    run(kernel, arguments, std::make_index_sequence<sizeof...(A)>{});
    return faults;
}
#define ENTRY(name, ...) extern "C" int64_t name(int64_t n, const int64_t* a, const int64_t* s, const int64_t* m) { \\
    return launch(__VA_ARGS__, n, a, s, m); }
""",
}


class Emulator:
    """Instances of the kernel, compiled by g++ on first use; stands in for ``zeroskip.cuda.launch.load``."""

    def __init__(self, folder: Path, expressions: Sequence[str]) -> None:
        for name, text in FILES.items():
            (folder / name).write_text(text)
        self.functions: dict[str, Any] = {}
        texts = list(dict.fromkeys(expressions))
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", f'-DKERNEL="{cuda.KERNEL}"']
        flags += [f"-I{folder}", f"-I{INCLUDE}"]
        jobs = []
        for part in range(2):
            source, library = folder / f"driver{part}.cpp", folder / f"emulated{part}.so"
            names = {text: f"entry_{i}" for i, text in enumerate(texts) if i % 2 == part}
            entries = "".join(f"ENTRY({name}, {text})\n" for text, name in names.items())
            source.write_text('#include "driver.h"\n' + entries)
            command = ["g++", *flags, "-o", str(library), str(source)]
            jobs.append((names, library, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        for names, library, job in jobs:
            _, errors = job.communicate()
            assert job.returncode == 0, errors[:4000]
            loaded = ctypes.CDLL(str(library))
            self.functions |= {text: getattr(loaded, name) for text, name in names.items()}
        self.tensors: list[Tensor] = []

    def load(self, built: bytes) -> Any:
        self.expression = built.decode()
        return self

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[object],
        *,
        shared_bytes: int,
        cluster: tuple[int, int, int] | None,
        dependent: bool,
    ) -> None:
        assert dependent
        assert max(grid[1:]) <= 65535
        assert shared_bytes <= 227 * 1024
        assert cluster == (None if grid[2] == 1 else (1, 1, grid[2]))
        numbers = [_number(argument) for argument in arguments]
        memory = [*_region(arguments[0]), *_region(arguments[1]), *self._masked(arguments[2])]
        function, y = self.functions[self.expression], arguments[3]
        function.restype = ctypes.c_int64
        assert isinstance(y, Tensor)
        results = []
        for late in (0, 1):
            y.fill_(torch.nan)
            faults = function(
                ctypes.c_int64(len(numbers)),
                _array(numbers),
                _array([*grid, block[0], -(-shared_bytes // 16) * 16, late]),
                _array(memory),
            )
            assert faults == 0, f"{faults} faults in {self.expression}"
            results.append(y.clone())
        assert torch.equal(results[0].nan_to_num(7.0), results[1].nan_to_num(7.0)), "depends on when copies come"

    def _masked(self, tensor: object) -> list[int]:
        """A tensor's storage, and a byte for each of its bytes: may it be read?"""
        assert isinstance(tensor, Tensor)
        storage, item = tensor.untyped_storage(), tensor.element_size()
        mask = torch.zeros(storage.nbytes() // item, dtype=torch.uint8)
        mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(1)
        mask = mask.repeat_interleave(item)
        self.tensors.append(mask)
        return [storage.data_ptr(), storage.nbytes(), mask.data_ptr()]


def _region(tensor: object) -> list[int]:
    assert isinstance(tensor, Tensor)
    return [tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0]


def _number(argument: object) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    assert argument is None or isinstance(argument, int)
    assert -(2**31) <= (argument or 0) < 2**31
    return argument or 0


def _array(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)
