// Blocks of a cluster: who they are, how they wait for each other, how they read each other's shared memory (sm_90).
//
// Below sm_90 there are no clusters: a block is alone in its own.
#pragma once

#include <zeroskip/copy.cuh>

namespace zeroskip {

__device__ __forceinline__ int cluster_rank() {
    int rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// All threads of all blocks; what they wrote to shared memory before is visible behind it.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// All threads of all blocks, and nothing more: what they wrote need not be visible.  Before a block ends whose shared
// memory others have read.
__device__ __forceinline__ void cluster_meet() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// `local` in the shared memory of block `rank`: four floats, aligned to 16 bytes.
__device__ __forceinline__ float4 cluster_load(const float4* local, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    unsigned address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(rank));
    float4 piece;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(piece.x), "=f"(piece.y), "=f"(piece.z), "=f"(piece.w)
                 : "r"(address)
                 : "memory");
    return piece;
#else
    return *local;
#endif
}

}  // namespace zeroskip
