// Copies from global to shared memory that a thread need not wait for.
#pragma once

namespace zeroskip {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// ---- by threads (cp.async, sm_80) -----------------------------------------------------------------------------------

// 16 bytes past L1; both addresses are multiples of 16.
__device__ __forceinline__ void copy_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// 4, 8 or 16 bytes through L1; both addresses are multiples of that.
template <int kBytes>
__device__ __forceinline__ void copy_short(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)), "l"(global), "n"(kBytes)
                 : "memory");
}

// Ends a group: the copies of this thread since the last one.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` groups of this thread are still under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- runs of memory by the copy engine (cp.async.bulk, sm_90) -------------------------------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define ZEROSKIP_HAS_RUNS 1
#else
#define ZEROSKIP_HAS_RUNS 0
#endif

// Copies to several blocks at once are fast only in code for one architecture ("sm_90a").
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#define ZEROSKIP_HAS_MULTICAST 1
#else
#define ZEROSKIP_HAS_MULTICAST 0
#endif

// Counts the bytes that have come; in shared memory, 8 bytes.  Without the engine it does nothing: the runs are then
// copied by threads, and copy_wait is what waits for them.
struct Arrival {
    unsigned long long state;

    // By one thread, before a __syncthreads(): a turn takes `count` calls of expect or arrive.
    __device__ __forceinline__ void init(int count = 1) {
#if ZEROSKIP_HAS_RUNS
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(count) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }

    // By one thread: this turn is over once `bytes` have come.
    __device__ __forceinline__ void expect(int bytes) {
#if ZEROSKIP_HAS_RUNS
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
#endif
    }

    // What this thread did to shared memory comes before the end of the turn.
    __device__ __forceinline__ void arrive() {
#if ZEROSKIP_HAS_RUNS
        asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
#endif
    }

    // By every reader: until the turn of this parity (0, 1, 0, ...) is over.  `kFromOthers`: what comes was written by other
    // blocks of the cluster; that also empties L1.
    template <bool kFromOthers = false>
    __device__ __forceinline__ void wait(int parity) {
#if ZEROSKIP_HAS_RUNS
#define ZEROSKIP_TRY_WAIT(how)                                                                                      \
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity" how ".b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"         \
                 : "=r"(done)                                                                                       \
                 : "r"(shared_address(this)), "r"(parity)                                                           \
                 : "memory")
        unsigned done = 0;
        while (!done) {
            if constexpr (kFromOthers) {
                ZEROSKIP_TRY_WAIT(".acquire.cluster.shared::cta");
            } else {
                ZEROSKIP_TRY_WAIT(".shared");
            }
        }
#undef ZEROSKIP_TRY_WAIT
#endif
    }
};

// `bytes` in a row, a multiple of 16, asked for by one thread; both addresses are multiples of 16.
__device__ __forceinline__ void request_run(void* shared, const void* global, int bytes, Arrival* arrival) {
#if ZEROSKIP_HAS_RUNS
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(arrival))
                 : "memory");
#endif
}

// The same into the shared memory of every block of the cluster whose rank is a bit of `mates`, and counted there: each
// must expect it.
__device__ __forceinline__ void share_run(void* shared, const void* global, int bytes, Arrival* arrival,
                                          unsigned short mates) {
#if ZEROSKIP_HAS_MULTICAST
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(arrival)), "h"(mates)
        : "memory");
#else
    __trap();
#endif
}

// `units` x 16 bytes, called by all threads of the block; both addresses are multiples of 16.  For kernels that also run
// without the engine.
__device__ __forceinline__ void copy_run(uint4* shared, const void* global, int units, Arrival* arrival) {
#if ZEROSKIP_HAS_RUNS
    if (threadIdx.x == 0) request_run(shared, global, 16 * units, arrival);
#else
#pragma unroll 1
    for (int i = threadIdx.x; i < units; i += blockDim.x) copy_16(shared + i, static_cast<const uint4*>(global) + i);
#endif
}

// ---- boxes of a tensor by the copy engine (cp.async.bulk.tensor, sm_90) ---------------------------------------------

// What zeroskip.cuda.launch.boxes passes: where a tensor of three dimensions lies, and the size of a box of it.
struct alignas(64) Boxes {
    char opaque[128];

    // Fetches this description, which otherwise the first box waits for.
    __device__ __forceinline__ void prefetch() const {
#if ZEROSKIP_HAS_RUNS
        asm volatile("prefetch.tensormap [%0];" ::"l"(this) : "memory");
#endif
    }

    // The box whose first element is [image, channel, pixel], zeros where there is no tensor, asked for by one thread; the
    // shared address is a multiple of 128.
    __device__ __forceinline__ void request(void* shared, int image, int channel, int pixel, Arrival* arrival) const {
#if ZEROSKIP_HAS_RUNS
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
                "r"(shared_address(shared)),
            "l"(this), "r"(pixel), "r"(channel), "r"(image), "r"(shared_address(arrival))
            : "memory");
#endif
    }

    // The same for every block of the cluster whose rank is a bit of `mates`.
    __device__ __forceinline__ void share(void* shared, int image, int channel, int pixel, Arrival* arrival,
                                          unsigned short mates) const {
#if ZEROSKIP_HAS_MULTICAST
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(shared)),
            "l"(this), "r"(pixel), "r"(channel), "r"(image), "r"(shared_address(arrival)), "h"(mates)
            : "memory");
#else
        __trap();
#endif
    }
};

}  // namespace zeroskip
