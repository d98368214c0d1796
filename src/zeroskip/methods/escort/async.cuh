// Shared memory of a block: what comes to it while threads do something else, from global memory and from other blocks.
//
// In a file of its own so that the kernel can be run on a CPU with these few functions replaced.
#pragma once

#include <zeroskip/types.cuh>

namespace zeroskip::escort {

__device__ __forceinline__ uint4* shared_memory() {
    extern __shared__ uint4 memory[];
    return memory;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes at a shared_address, loaded where the program says so and not where the compiler thinks is early enough.
__device__ __forceinline__ uint4 load_early(unsigned address) {
    uint4 loaded;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
                 : "r"(address)
                 : "memory");
    return loaded;
}

// ---- copies by threads (cp.async, sm_80) ----------------------------------------------------------------------------

// 16 bytes of what was written long before; both addresses are multiples of 16.
__device__ __forceinline__ void copy_weights(uint4* shared, const uint4* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// kWide neighbouring elements as floats; both addresses are aligned to all of them.  Elements of 16 bits need
// converting and are there at once.
template <int kWide>
__device__ __forceinline__ void copy_pixels(float* shared, const float* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)), "l"(global), "n"(4 * kWide)
                 : "memory");
}
template <int kWide, typename T>
__device__ __forceinline__ void copy_pixels(float* shared, const T* global) {
    const auto loaded = Vector<T, kWide>::load(global);
    Vector<float, kWide> wide;
#pragma unroll
    for (int i = 0; i < kWide; ++i) wide[i] = to_float(loaded[i]);
    wide.store(shared);
}

// Ends a group: the copies of this thread since the last one.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` groups of this thread are still under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- blocks of a cluster (sm_90; below, a block is alone) -----------------------------------------------------------

// Counts the bytes that others have pushed; in shared memory, 8 bytes.
struct Arrival {
    unsigned long long state;

    // By one thread, before a cluster_sync(): `bytes` will come.
    __device__ __forceinline__ void expect(int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(this)) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }

    // By every reader: until they have come.
    __device__ __forceinline__ void wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        unsigned done = 0;
        while (!done) {
            asm volatile(
                "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
                "selp.u32 %0, 1, 0, p; }"
                : "=r"(done)
                : "r"(shared_address(this))
                : "memory");
        }
#endif
    }
};

// All threads of all blocks; what they wrote to shared memory before is visible behind it.
__device__ __forceinline__ void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// kCount (1, 2 or 4) floats to where `local` would be in the shared memory of block `rank`, whose `arrival` counts them.
template <int kCount>
__device__ __forceinline__ void push(const float* local, const float* values, int rank, const Arrival* arrival) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    unsigned to, there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(local)), "r"(rank));
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(arrival)), "r"(rank));
    if constexpr (kCount == 4) {
        asm volatile(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
            "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(there)
            : "memory");
    } else if constexpr (kCount == 2) {
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
                     "f"(values[0]), "f"(values[1]), "r"(there)
                     : "memory");
    } else {
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to),
                     "f"(values[0]), "r"(there)
                     : "memory");
    }
#endif
}

}  // namespace zeroskip::escort
