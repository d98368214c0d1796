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

// 4 bytes; both addresses are multiples of 4.
__device__ __forceinline__ void copy_4(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
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

// Counts the bytes that have come; in shared memory, 8 bytes.  Without the engine it does nothing: the runs are then
// copied by threads, and copy_wait is what waits for them.
struct Arrival {
    unsigned long long state;

    // By one thread, before a __syncthreads().
    __device__ __forceinline__ void init() {
#if ZEROSKIP_HAS_RUNS
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(this)) : "memory");
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

    // By every reader: until the turn of this parity (0, 1, 0, ...) is over.
    __device__ __forceinline__ void wait(int parity) {
#if ZEROSKIP_HAS_RUNS
        unsigned done = 0;
        while (!done) {
            asm volatile(
                "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                : "=r"(done)
                : "r"(shared_address(this)), "r"(parity)
                : "memory");
        }
#endif
    }
};

// `units` x 16 bytes, called by all threads of the block; both addresses are multiples of 16.
__device__ __forceinline__ void copy_run(uint4* shared, const void* global, int units, Arrival* arrival) {
#if ZEROSKIP_HAS_RUNS
    if (threadIdx.x == 0) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(shared)),
                     "l"(global), "r"(units * 16), "r"(shared_address(arrival))
                     : "memory");
    }
#else
#pragma unroll 1
    for (int i = threadIdx.x; i < units; i += blockDim.x) copy_16(shared + i, static_cast<const uint4*>(global) + i);
#endif
}

}  // namespace zeroskip
