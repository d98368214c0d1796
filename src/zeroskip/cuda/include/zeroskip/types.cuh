// Element types, vectors of them, and the end of every layer: bias, residual, activation, one rounding.
//
// Compiled by NVRTC: nothing of the C++ standard library is here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace zeroskip {

// ---- float <-> element ----------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// ---- vectors --------------------------------------------------------------------------------------------------------

// The widest type that one memory instruction moves, by its size in bytes.
template <int Bytes>
struct Word;
template <>
struct Word<1> {
    using type = unsigned char;
};
template <>
struct Word<2> {
    using type = unsigned short;
};
template <>
struct Word<4> {
    using type = unsigned int;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};

// N elements of type T in registers, moved by instructions of up to 16 bytes.  Index it by constants only (unrolled
// loops): an index known at run time would put it into local memory.
//   N   a power of two; addresses given to load, load_constant and store are aligned to kAlignment bytes
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
    static constexpr int kBytes = N * sizeof(T);
    static constexpr int kAlignment = kBytes < 16 ? kBytes : 16;
    static_assert((N & (N - 1)) == 0, "a vector has a power of two elements");
    using Piece = typename Word<kAlignment>::type;

    T item[N];

    __device__ __forceinline__ T& operator[](int i) { return item[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return item[i]; }

    // What the kernel before this one may have written: activations (ld.global).  With a dependent launch, load after
    // dependent_wait(), and do not declare the pointer __restrict__: the compiler could move its loads ahead of the wait.
    static __device__ __forceinline__ Vector load(const T* from) {
        Vector vector;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) vector.set(i, reinterpret_cast<const Piece*>(from)[i]);
        return vector;
    }

    // What was written long before: weights and their indices (ld.global.nc, which later writes need not reach).
    static __device__ __forceinline__ Vector load_constant(const T* from) {
        Vector vector;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) vector.set(i, __ldg(reinterpret_cast<const Piece*>(from) + i));
        return vector;
    }

    __device__ __forceinline__ void store(T* to) const {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            Piece piece;
            memcpy(&piece, reinterpret_cast<const char*>(item) + i * kAlignment, kAlignment);
            reinterpret_cast<Piece*>(to)[i] = piece;
        }
    }

private:
    static constexpr int kPieces = kBytes / kAlignment;

    __device__ __forceinline__ void set(int i, Piece piece) {
        memcpy(reinterpret_cast<char*>(item) + i * kAlignment, &piece, kAlignment);
    }
};

// ---- the end of a layer ---------------------------------------------------------------------------------------------

enum class Activation { none, relu, relu6 };

// Where the residual is added: nowhere, before the activation, after it.
enum class Residual { no, before, after };

// NaN stays NaN, as in torch (fmaxf would drop it).
__device__ __forceinline__ float activate(float x, Activation activation) {
    if (activation == Activation::none) return x;
    const float positive = x < 0.0f ? 0.0f : x;
    return activation == Activation::relu6 && positive > 6.0f ? 6.0f : positive;
}

// activation(acc + bias + residual), or activation(acc + bias) + residual, in fp32.  Round its result once, with
// from_float.  Pass template constants for `activation` and `place`, so that no branch remains.
__device__ __forceinline__ float finish(float acc, float bias, float residual, Activation activation, Residual place) {
    const float sum = place == Residual::before ? acc + bias + residual : acc + bias;
    const float active = activate(sum, activation);
    return place == Residual::after ? active + residual : active;
}

// ---- programmatic dependent launch ----------------------------------------------------------------------------------

// Wait until the kernel before this one in the stream has ended and its writes are visible.  A kernel that is launched
// `dependent` calls this before it reads what others wrote and before its own first write (memory is reused), and calls
// it in any case: the next kernel waits for this one only.  Weights may be read before.  Harmless in other launches.
__device__ __forceinline__ void dependent_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel of the stream may start once every block has said this or ended.  Its dependent_wait() still waits
// for this kernel's end, so that the only question is when its blocks may take room on the SMs.
__device__ __forceinline__ void dependent_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace zeroskip
