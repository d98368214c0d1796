// Small kernels for the tests of zeroskip.cuda.
#pragma once

#include <zeroskip/types.cuh>

namespace zeroskip::testing {

// y[i] = x[i] + scale * y[i] for a vector of N per thread; any 1-D grid that covers count / N.
//   T      element of x and y
//   N      elements per thread; divides count
template <typename T, int N>
__global__ void add(T* y, const T* x, float scale, int count) {
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= count) return;
    const Vector<T, N> added = Vector<T, N>::load_constant(x + i);
    dependent_wait();
    const Vector<T, N> before = Vector<T, N>::load(y + i);
    Vector<T, N> result;
#pragma unroll
    for (int k = 0; k < N; ++k) result[k] = from_float<T>(to_float(added[k]) + scale * to_float(before[k]));
    dependent_launch();
    result.store(y + i);
}

// y[i] = finish(acc[i], bias, residual[i]) with one thread per element; residual may be null where place is no.
//   activation, place   see types.cuh
template <typename T, Activation activation, Residual place>
__global__ void end(T* y, const float* acc, const T* residual, float bias, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float added = place == Residual::no ? 0.0f : to_float(residual[i]);
    y[i] = from_float<T>(finish(acc[i], bias, added, activation, place));
}

// y = x reversed, through dynamic shared memory of count floats; one block.
//   Steps   of blockDim.x elements each
template <int Steps>
__global__ void reverse(float* y, const float* x) {
    extern __shared__ float kept[];
    const int count = Steps * blockDim.x;
    for (int i = threadIdx.x; i < count; i += blockDim.x) kept[i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) y[i] = kept[count - 1 - i];
}

// y[block] = the block's rank in its cluster.
template <typename T>
__global__ void rank(T* y) {
    unsigned int value = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
#endif
    if (threadIdx.x == 0) y[blockIdx.x] = static_cast<T>(value);
}

// An array that is indexed at run time lives in local memory: a stack frame, and no spill.
template <typename T>
__global__ void indexed(T* y, const T* x, int n) {
    T kept[32];
    for (int i = 0; i < 32; ++i) kept[(i * n) & 31] = x[i];
    y[threadIdx.x] = kept[threadIdx.x & 31];
}

// More live values than 32 registers hold.
template <int N>
__global__ void __launch_bounds__(1024, 2) spilling(float* y, const float* x) {
    float kept[N];
#pragma unroll
    for (int i = 0; i < N; ++i) kept[i] = x[threadIdx.x + i * 1024];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) y[threadIdx.x + i * 1024] = kept[i] * kept[N - 1 - i];
}

// NVRTC warns of this.
template <typename T>
__global__ void careless(T* y) {
    int unused = 0;
    y[0] = 0;
}

}  // namespace zeroskip::testing
