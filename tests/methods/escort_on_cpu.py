"""Escort's CUDA kernel as C++ on the CPU: threads of a cluster as fibers, every load of x checked.

``cluster.cuh``, ``shared.cuh`` and ``windows.cuh`` are replaced by what they mean.  Copies that a kernel does not wait
for come at once in one run and as late as they may in another, in which blocks and threads also take their turns
backwards; both must give the same bits.  Shared memory begins as NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.cuda_on_cpu import CpuKernel
from zeroskip.methods.escort import cuda

FILES = {
    "machine.h": """
#pragma once
#include <ucontext.h>

struct Block { char* memory; int arrived = 0; int64_t turn = 0; };
struct Thread {
    ucontext_t context;
    Triple index, block;
    int rank;
    bool done = false;
    std::function<bool()> ready;
    Groups groups{1};
};
static int64_t shared_bytes;
static bool late;
static std::vector<Block> blocks;
static std::vector<Thread> threads;
static std::vector<std::function<void()>> pushed;
static Thread* running;
static ucontext_t scheduler;
static int cluster_arrived;
static int64_t cluster_turn;
inline char* shared_begin() { return blocks[running->rank].memory; }
inline Groups& groups() { return running->groups; }

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
// sizes: bytes of shared memory; do copies come late?
inline void run_grid(const int64_t* sizes) {
    constexpr int kStack = 48 * 1024, kGuard = 4096;
    shared_bytes = sizes[0];
    late = sizes[1];
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
""",
    "zeroskip/cluster.cuh": """
#pragma once
#include <zeroskip/copy.cuh>
namespace zeroskip {
struct Arrival {
    int64_t state;
    void init(int count = 1) { state = 0; faults += count != 1; }
    void expect(int bytes) { state += bytes; }
    template <bool kFromOthers = false> void wait(int parity) {
        faults += !kFromOthers || parity != 0;  // what else there is, Escort does not need
        for (auto& come : pushed) come();
        pushed.clear();
        if (state) pause_until([this] { return state == 0; });
    }
};
inline void cluster_sync() { meet(cluster_arrived, cluster_turn, threads.size()); }
// 20 bits for the place in the shared memory of a block, and its rank above.
inline unsigned peer_address(const void* local, int rank) { return unsigned(rank) << 20 | shared_address(local); }
inline char* peer(unsigned address, int bytes) {
    const unsigned rank = address >> 20, offset = address & 0xfffff;
    const bool right = rank < blocks.size() && offset + bytes <= shared_bytes && offset % bytes == 0;
    return right ? blocks[rank].memory + offset : nullptr;
}
template <typename T> void push(unsigned to, T piece, unsigned arrival) {
    char* const there = peer(to, sizeof(T));
    Arrival* const count = reinterpret_cast<Arrival*>(peer(arrival, sizeof(Arrival)));
    if (!there || !count) { ++faults; return; }
    auto come = [=] { memcpy(there, &piece, sizeof(T)); count->state -= sizeof(T); };
    if (late) pushed.push_back(come);
    else come();
}
}  // namespace zeroskip
""",
    "shared.cuh": """
#pragma once
#include <zeroskip/copy.cuh>
#include <zeroskip/types.cuh>
namespace zeroskip::escort {
inline uint4* shared_memory() { return reinterpret_cast<uint4*>(shared_begin()); }
inline uint4 load_early(unsigned address) {
    const char* from = shared_begin() + address;
    uint4 loaded{};
    if (!in_shared(from, 16) || !aligned(from, 16)) ++faults;
    else memcpy(&loaded, from, 16);
    return loaded;
}
template <int kWide, typename T> void copy_pixels(float* shared, const T* global) {
    constexpr int kBytes = kWide * sizeof(T);
    if constexpr (std::is_same_v<T, float>) copy_short<kBytes>(shared, global);
    else if (!readable(global, kBytes) || !aligned(global, kBytes) || !in_shared(shared, 4 * kWide) ||
             !aligned(shared, 4 * kWide)) ++faults;
    else for (int i = 0; i < kWide; ++i) shared[i] = to_float(global[i]);
}
}  // namespace zeroskip::escort
""",
    "windows.cuh": """
#pragma once
#include <zeroskip/copy.cuh>
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
}


class Emulator(CpuKernel):
    def __init__(self, folder: Path, expressions: Sequence[str]) -> None:
        super().__init__(folder, cuda.KERNEL, expressions, FILES)

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
        *,
        shared_bytes: int,
        cluster: tuple[int, int, int] | None,
        dependent: bool,
    ) -> None:
        assert dependent
        assert shared_bytes <= 227 * 1024
        assert cluster == (None if grid[2] == 1 else (1, 1, grid[2]))
        y: Tensor = arguments[3]
        results = []
        for late in (0, 1):
            y.fill_(torch.nan)
            faults = self.run(grid, block, arguments, arguments[:3], -(-shared_bytes // 16) * 16, late)
            assert faults == 0, f"{faults} faults in {self.expression}"
            results.append(y.clone())
        assert torch.equal(results[0].nan_to_num(7.0), results[1].nan_to_num(7.0)), "depends on when copies come"
