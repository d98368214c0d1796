// Depthwise convolution: every output channel reads one input channel.
//
//   y[n, k, i, j] = tail(bias[k] + sum over a, b of
//                        W[k, a, b] * x[n, k / multiplier, i * stride_h - padding_h + a * dilation_h,
//                                                          j * stride_w - padding_w + b * dilation_w])
//
// with tail = activation and residual; sums in fp32, rounded once.  NCHW: columns are contiguous, while images, channels
// and rows may lie anywhere (strides are arguments, in elements).
//
//   grid     x: groups of planes (a plane is one output channel of one image; a group is blockDim.z of them, so that
//            neither batch nor channels meet the limit of 65535), y: tiles of rows, z: tiles of columns
//   block    (tiles of columns, tiles of rows, planes), at most kMaxThreads threads; those beyond a plane's edge idle
//   thread   kRows x kCols outputs
//
// `window` knows the convolution when it is compiled: a thread keeps its taps and the part of x that they meet in
// registers, and reads every element of that part once, in the widest pieces that alignment allows.  `loop` takes any
// convolution as arguments and reads x anew for each tap.
//
// Shared memory: none.  Bytes per output: x once (stride_h * stride_w elements; what neighbouring threads share comes
// from L1), y once, the residual once, and a channel's taps once for each block that works on it.
//
// Assumptions: `taps` is 16-byte aligned.  Neither kernel reads outside x: padding is a test, not memory.
//
// With a dependent launch taps are fetched before the wait; x and the residual are ordinary loads after it.
//
// Source: the operation is Sputnik's (google-research/sputnik, sputnik/depthwise); the decomposition is ours.
#pragma once

#include <load_if.cuh>
#include <zeroskip/types.cuh>

namespace zeroskip::depthwise {

constexpr int kMaxThreads = 256;

// What `window` knows of a convolution: R x S taps, steps, and the padding on the left, which decides where a thread's
// columns lie in an aligned vector.
template <int R, int S, int StrideH, int StrideW, int DilationH, int DilationW, int PaddingW>
struct Conv {
    static constexpr int kR = R, kS = S, kStrideH = StrideH, kStrideW = StrideW;
    static constexpr int kDilationH = DilationH, kDilationW = DilationW, kPaddingW = PaddingW;
};

// Outputs of one thread, and the elements of the widest access to x and to y (and the residual).
//   VectorX   a power of two that divides x's width and Cols * stride_w
//   VectorY   a power of two that divides y's width and Cols
template <int Rows, int Cols, int VectorX, int VectorY>
struct Tile {
    static constexpr int kRows = Rows, kCols = Cols, kVectorX = VectorX, kVectorY = VectorY;
};

// n / divisor for 0 <= n < 2^31, without dividing.
//   magic, shift   from cuda.py's divider(divisor)
// Source: T. Granlund and P. Montgomery, Division by invariant integers using multiplication, PLDI 1994, figure 4.1.
__device__ __forceinline__ int divide(unsigned n, int magic, int shift) {
    return static_cast<int>((__umulhi(n, static_cast<unsigned>(magic)) + n) >> shift);
}

// The output channel of an image that a thread works on, and its first output there.
struct Place {
    int image, channel, row, column;

    // In elements, of this channel (or another one) of a tensor with these strides.
    __device__ __forceinline__ long long plane(int image_stride, int channel_stride, int of) const {
        return static_cast<long long>(image) * image_stride + static_cast<long long>(of) * channel_stride;
    }
};

// ---- inputs of one thread in registers ------------------------------------------------------------------------------

// Whether input `at` of a row (or column) of them, counted from the first that a thread meets, meets any output.
__device__ constexpr bool met(int at, int outputs, int taps, int stride, int dilation) {
    for (int output = 0; output < outputs; ++output)
        for (int tap = 0; tap < taps; ++tap)
            if (output * stride + tap * dilation == at) return true;
    return false;
}

// Element (i, j) is x[row + i, column + j], 0 in the padding.  What no tap meets is not loaded.
//   Width   elements of the widest load; 1 where the tensor is not aligned as Tile says
template <typename C, typename T, int Width>
struct Window {
    static constexpr int kHeight = (T::kRows - 1) * C::kStrideH + (C::kR - 1) * C::kDilationH + 1;
    static constexpr int kWidth = (T::kCols - 1) * C::kStrideW + (C::kS - 1) * C::kDilationW + 1;

    float item[kHeight][kWidth];

    // Of x's plane with `height` rows and `width` columns.
    template <typename Number>
    __device__ __forceinline__ void load(const Number* plane, int stride, int row, int column, int height, int width) {
        const Number* from = plane + static_cast<long long>(row) * stride + column;
#pragma unroll
        for (int i = 0; i < kHeight; ++i) {
            if (!met(i, T::kRows, C::kR, C::kStrideH, C::kDilationH)) continue;
            const bool inside = static_cast<unsigned>(row + i) < static_cast<unsigned>(height);
            load_row<0>(from + i * static_cast<long long>(stride), inside, column, width, item[i]);
        }
    }

private:
    // Elements of the load at column j: the widest that is aligned there.  A thread's first column is a multiple of
    // Width less the padding.
    static __device__ constexpr int piece(int j) {
        int size = Width;
        while ((j - C::kPaddingW) % size != 0 || j + size > kWidth) size /= 2;
        return size;
    }

    static __device__ constexpr bool any_met(int j, int count) {
        for (int column = j; column < j + count; ++column)
            if (met(column, T::kCols, C::kS, C::kStrideW, C::kDilationW)) return true;
        return false;
    }

    template <int J, typename Number>
    static __device__ __forceinline__ void load_row(
        const Number* from, bool inside, int column, int width, float (&to)[kWidth]) {
        if constexpr (J < kWidth) {
            constexpr int kPiece = piece(J);
            if constexpr (any_met(J, kPiece)) {
                // A piece starts at a multiple of its size, which divides the width: it is inside or outside as a whole.
                const bool there = inside && static_cast<unsigned>(column + J) < static_cast<unsigned>(width);
                typename Word<kPiece * sizeof(Number)>::type word = {};
                load_if<J * static_cast<int>(sizeof(Number))>(there, from, word);
                Vector<Number, kPiece> vector;
                memcpy(&vector, &word, sizeof(word));
#pragma unroll
                for (int e = 0; e < kPiece; ++e) to[J + e] = to_float(vector[e]);
            }
            load_row<J + kPiece>(from, inside, column, width, to);
        }
    }
};

// A thread's outputs in a plane of y, and the residual there.  The sums hold the bias already, and x + -0.0f is x for every
// x: finish() adds nothing.
//   Width   elements of the widest access; 1 where the tensors are not aligned as Tile says
template <typename T, int Width, Activation Act, Residual Where, typename Number>
struct Outputs {
    static constexpr int kPieces = T::kCols / Width;
    using Piece = Vector<Number, Width>;

    Piece residual[T::kRows][kPieces];

    __device__ __forceinline__ void load_residual(
        const Number* plane, int stride, const Place& place, int height, int width) {
        each(place, height, width, [&](int i, int piece, bool there, long long row, int column) {
            typename Word<sizeof(Piece)>::type word = {};
            load_if<0>(there, plane + row * stride + column, word);
            memcpy(&residual[i][piece], &word, sizeof(word));
        });
    }

    __device__ __forceinline__ void store(
        Number* plane, int stride, const Place& place, int height, int width, const float (&sum)[T::kRows][T::kCols]) {
        each(place, height, width, [&](int i, int piece, bool there, long long row, int column) {
            if (!there) return;
            Piece result;
#pragma unroll
            for (int e = 0; e < Width; ++e) {
                const float added = Where == Residual::no ? 0.0f : to_float(residual[i][piece][e]);
                result[e] = from_float<Number>(finish(sum[i][piece * Width + e], -0.0f, added, Act, Where));
            }
            result.store(plane + row * stride + column);
        });
    }

private:
    // Calls with the indices of every piece, and whether it lies in the plane, and where.
    template <typename Call>
    static __device__ __forceinline__ void each(const Place& place, int height, int width, const Call& call) {
#pragma unroll
        for (int i = 0; i < T::kRows; ++i)
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                const int row = place.row + i, column = place.column + piece * Width;
                call(i, piece, row < height && column < width, row, column);
            }
    }
};

// ---- the kernels ----------------------------------------------------------------------------------------------------

// A thread of `window` from its first load of x to its last store.
//   XWidth, YWidth   elements of the widest access: those of T, or 1 where the tensors are not aligned
template <typename C, typename T, bool Skip, Activation Act, Residual Where, int XWidth, int YWidth, typename Number>
__device__ __forceinline__ void convolve(
    const Number* x, int x_row, Number* y, int y_row, const Number* residual, int residual_row, const float* tap,
    const Place& place, int padding_h, int h, int w, int p, int q) {
    Window<C, T, XWidth> window;
    window.load(x, x_row, place.row * C::kStrideH - padding_h, place.column * C::kStrideW - C::kPaddingW, h, w);
    Outputs<T, YWidth, Act, Where, Number> outputs;
    if constexpr (Where != Residual::no) outputs.load_residual(residual, residual_row, place, p, q);

    float sum[T::kRows][T::kCols];
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
        for (int j = 0; j < T::kCols; ++j) sum[i][j] = tap[C::kR * C::kS];
#pragma unroll
    for (int a = 0; a < C::kR; ++a)
#pragma unroll
        for (int b = 0; b < C::kS; ++b) {
            const float weight = tap[a * C::kS + b];
            if (Skip && weight == 0.0f) continue;  // NaN is not 0
#pragma unroll
            for (int i = 0; i < T::kRows; ++i)
#pragma unroll
                for (int j = 0; j < T::kCols; ++j) {
                    const int row = i * C::kStrideH + a * C::kDilationH, column = j * C::kStrideW + b * C::kDilationW;
                    sum[i][j] = fmaf(weight, window.item[row][column], sum[i][j]);
                }
        }
    outputs.store(y, y_row, place, p, q, sum);
}

// 16 bytes at a time.
template <int At, int Count>
__device__ __forceinline__ void load_taps(const float* from, float (&to)[Count]) {
    if constexpr (At < Count) {
        uint4 word = {};
        load_if<At * static_cast<int>(sizeof(float))>(true, from, word);
        memcpy(to + At, &word, sizeof(word));
        load_taps<At + 4>(from, to);
    }
}

// A convolution known at compile time.
//   Number         float, __half or __nv_bfloat16: x, y, residual
//   C, T           Conv and Tile
//   Multiplier     output channels of one input channel
//   Skip           branch around taps that are 0 (blockDim.z is then 1, so that a warp goes one way); else multiply them
//   taps           fp32 [channels, R * S + 1 rounded up to 4]: weights, bias, zeros
//   planes         images * channels (of y)
//   magic, shift   of `channels`, see divide
//   aligned        whether x (and y, residual) may be accessed by kVectorX (kVectorY) elements
template <typename Number, typename C, typename T, int Multiplier, bool Skip, Activation Act, Residual Where>
__global__ void __launch_bounds__(kMaxThreads, 1) window(
    const Number* x, int x_image, int x_channel, int x_row, Number* y, int y_image, int y_channel, int y_row,
    const Number* residual, int residual_image, int residual_channel, int residual_row, const float* taps, int planes,
    int channels, int magic, int shift, int h, int w, int p, int q, int padding_h, int aligned) {
    dependent_launch();
    const unsigned plane = Skip ? blockIdx.x : blockIdx.x * blockDim.z + threadIdx.z;
    Place place;
    place.image = divide(plane, magic, shift);
    place.channel = static_cast<int>(plane) - place.image * channels;
    place.row = (blockIdx.y * blockDim.y + threadIdx.y) * T::kRows;
    place.column = (blockIdx.z * blockDim.x + threadIdx.x) * T::kCols;
    const bool exists = plane < static_cast<unsigned>(planes) && place.row < p && place.column < q;

    constexpr int kTaps = (C::kR * C::kS + 4) / 4 * 4;
    float tap[kTaps];
    load_taps<0>(taps + static_cast<long long>(place.channel) * kTaps, tap);
    dependent_wait();
    if (!exists) return;

    x += place.plane(x_image, x_channel, place.channel / Multiplier);
    y += place.plane(y_image, y_channel, place.channel);
    residual += place.plane(residual_image, residual_channel, place.channel);
    if (T::kVectorX * T::kVectorY > 1 && aligned)
        convolve<C, T, Skip, Act, Where, T::kVectorX, T::kVectorY>(
            x, x_row, y, y_row, residual, residual_row, tap, place, padding_h, h, w, p, q);
    else
        convolve<C, T, Skip, Act, Where, 1, 1>(
            x, x_row, y, y_row, residual, residual_row, tap, place, padding_h, h, w, p, q);
}

// Any convolution.  A thread's outputs are blockDim.y rows and blockDim.x columns apart, so that a warp reads and writes
// neighbours.
//   Rows, Cols     outputs of one thread
//   tap_stride     of `taps`; the other parameters are those of `window`, and Conv's as arguments
template <typename Number, int Rows, int Cols, bool Skip, Activation Act, Residual Where>
__global__ void __launch_bounds__(kMaxThreads, 1) loop(
    const Number* x, int x_image, int x_channel, int x_row, Number* y, int y_image, int y_channel, int y_row,
    const Number* residual, int residual_image, int residual_channel, int residual_row, const float* taps, int planes,
    int channels, int magic, int shift, int h, int w, int p, int q, int padding_h, int padding_w, int multiplier, int r,
    int s, int stride_h, int stride_w, int dilation_h, int dilation_w, int tap_stride) {
    dependent_launch();
    const unsigned plane = Skip ? blockIdx.x : blockIdx.x * blockDim.z + threadIdx.z;
    Place place;
    place.image = divide(plane, magic, shift);
    place.channel = static_cast<int>(plane) - place.image * channels;
    place.row = blockIdx.y * blockDim.y * Rows + threadIdx.y;
    place.column = blockIdx.z * blockDim.x * Cols + threadIdx.x;
    const bool exists = plane < static_cast<unsigned>(planes) && place.row < p && place.column < q;
    const float* tap = taps + static_cast<long long>(place.channel) * tap_stride;
    const float bias = exists ? __ldg(tap + r * s) : 0.0f;
    dependent_wait();
    if (!exists) return;

    x += place.plane(x_image, x_channel, place.channel / multiplier);
    y += place.plane(y_image, y_channel, place.channel);
    residual += place.plane(residual_image, residual_channel, place.channel);
    float sum[Rows][Cols];
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
        for (int j = 0; j < Cols; ++j) sum[i][j] = bias;
    for (int a = 0; a < r; ++a)
        for (int b = 0; b < s; ++b) {
            const float weight = __ldg(tap++);
            if (Skip && weight == 0.0f) continue;
#pragma unroll
            for (int i = 0; i < Rows; ++i) {
                const int row = (place.row + i * blockDim.y) * stride_h - padding_h + a * dilation_h;
                const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(h);
                const Number* from = x + static_cast<long long>(row) * x_row;
#pragma unroll
                for (int j = 0; j < Cols; ++j) {
                    const int column = (place.column + j * blockDim.x) * stride_w - padding_w + b * dilation_w;
                    const bool there = inside && static_cast<unsigned>(column) < static_cast<unsigned>(w);
                    sum[i][j] = fmaf(weight, there ? to_float(from[column]) : 0.0f, sum[i][j]);
                }
            }
        }
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
        for (int j = 0; j < Cols; ++j) {
            const int row = place.row + i * blockDim.y, column = place.column + j * blockDim.x;
            if (row >= p || column >= q) continue;
            float added = 0.0f;
            if (Where != Residual::no) added = to_float(residual[static_cast<long long>(row) * residual_row + column]);
            y[static_cast<long long>(row) * y_row + column] =
                from_float<Number>(finish(sum[i][j], -0.0f, added, Act, Where));
        }
}

}  // namespace zeroskip::depthwise
