// The rate at which the L2 cache feeds the whole GPU.
//
// Every block reads the same vectors `times` times with loads that bypass L1, starting at a place of its own so that
// blocks do not ask for one line at once.  sums[block] keeps the compiler from dropping the loads.
#pragma once

namespace zeroskip {

__global__ void __launch_bounds__(256) read_again(const float4* source, float* sums, int vectors, int times) {
    float sum = 0.0f;
    const int start = static_cast<int>((static_cast<long long>(blockIdx.x) * vectors) / gridDim.x);
    for (int turn = 0; turn < times; ++turn) {
#pragma unroll 8
        for (int i = threadIdx.x; i < vectors; i += 256) {
            int at = start + i;
            at -= at >= vectors ? vectors : 0;
            const float4 piece = __ldcg(source + at);
            sum += piece.x + piece.y + piece.z + piece.w;
        }
    }
    if (threadIdx.x == 0 || sum == 1.2345f) sums[blockIdx.x] = sum;
}

}  // namespace zeroskip
