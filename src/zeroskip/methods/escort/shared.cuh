// Shared memory of a block, as Escort uses it beside <zeroskip/copy.cuh>.
//
// In a file of its own so that the kernel can be run on a CPU with these few functions replaced.
#pragma once

#include <zeroskip/copy.cuh>
#include <zeroskip/types.cuh>

namespace zeroskip::escort {

__device__ __forceinline__ uint4* shared_memory() {
    extern __shared__ uint4 memory[];
    return memory;
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

// kWide neighbouring elements as floats, there after copy_wait; both addresses are aligned to all of them.  Elements of
// 16 bits need converting and are there at once.
template <int kWide>
__device__ __forceinline__ void copy_pixels(float* shared, const float* global) {
    copy_short<4 * kWide>(shared, global);
}
template <int kWide, typename T>
__device__ __forceinline__ void copy_pixels(float* shared, const T* global) {
    const auto loaded = Vector<T, kWide>::load(global);
    Vector<float, kWide> wide;
#pragma unroll
    for (int i = 0; i < kWide; ++i) wide[i] = to_float(loaded[i]);
    wide.store(shared);
}

}  // namespace zeroskip::escort
