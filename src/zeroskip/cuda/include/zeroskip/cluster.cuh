// Blocks of a cluster: how they wait for each other and write to each other's shared memory (sm_90).
//
// Below sm_90 there are no clusters: a block is alone in its own.
#pragma once

#include <zeroskip/copy.cuh>

namespace zeroskip {

// All threads of all blocks; what they wrote to shared memory before is visible behind it.  Slow where global writes are
// under way: it waits for those too.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What lies at `local` in our shared memory, in that of block `rank`.
__device__ __forceinline__ unsigned peer_address(const void* local, int rank) {
    unsigned address = shared_address(local);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(rank));
#endif
    return address;
}

// Floats into another block's shared memory; its arrival, at the address `arrival`, counts them.
__device__ __forceinline__ void push(unsigned to, float4 piece, unsigned arrival) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(piece.x), "f"(piece.y), "f"(piece.z), "f"(piece.w), "r"(arrival)
                 : "memory");
#endif
}
__device__ __forceinline__ void push(unsigned to, float2 piece, unsigned arrival) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
                 "f"(piece.x), "f"(piece.y), "r"(arrival)
                 : "memory");
#endif
}
__device__ __forceinline__ void push(unsigned to, float value, unsigned arrival) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(value),
                 "r"(arrival)
                 : "memory");
#endif
}

}  // namespace zeroskip
