// Planted faults that compute-sanitizer must find (tools/sanitize.py).
#pragma once

namespace zeroskip {

// memcheck: writes one element behind y[count].
template <typename T>
__global__ void write_behind(T* y, int count) {
    if (threadIdx.x == 0) y[count] = T(1);
}

// racecheck: threads of different warps read what others write without a barrier between.
template <typename T>
__global__ void race(T* y) {
    __shared__ T shared[64];
    shared[threadIdx.x] = T(threadIdx.x);
    y[threadIdx.x] = shared[63 - threadIdx.x];
}

}  // namespace zeroskip
