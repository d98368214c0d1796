// Sparse times dense matrix product in one-dimensional tiles (Gale et al., SC 2020, section V).
//
//     y[row, col] = finish(sum_k W[row, k] * x[k, col], bias[row], residual[row, col])
//
// W is CSR, `col` counts the pixels of all images, `k` the input channels.
//
// spmm: a subwarp of `kSubwarp` threads owns one row and kSubwarp * kVector * kPieces neighbouring columns; a thread holds
// kPieces vectors of kVector columns.  A block has `kRows` subwarps, so that short rows share a warp; the order of rows
// ("row swizzle") is data.  The subwarp copies kTile nonzeros at a time to shared memory, `kSparse` to a load: the row's
// first one is rounded down to a multiple of kSparse and the foreign ones in front are skipped ("reverse offset memory
// alignment"; the arrays have kSparse spare elements behind).  Then it walks them: one broadcast, one load of x, kVector
// FMAs for each piece.
// Shared memory: kRows * kTile * 8 bytes, static.  Bytes per output: x is read once for each nonzero from L1 or L2.
//
// spmv: the linear layer, y[n, row] with few n.  A subwarp owns one row and `kBatch` rows of x; its lanes share the
// nonzeros and add up at the end.
//
// Assumes: columns of y and residual are contiguous; for kVector > 1 x, y and residual have planes without gaps, of a
// multiple of kVector pixels, and every image and channel begins at a multiple of kVector elements.
#pragma once

#include <zeroskip/pixels.cuh>
#include <zeroskip/types.cuh>

namespace zeroskip::sputnik {

struct alignas(8) Nonzero {
    float value;
    int place;  // elements from the first channel of x
};

template <int kSubwarp>
__device__ __forceinline__ unsigned subwarp_mask() {
    const unsigned lane = (threadIdx.x + threadIdx.y * kSubwarp) % 32;
    return (0xffffffffu >> (32 - kSubwarp)) << (lane / kSubwarp * kSubwarp);
}

// Nonzeros in shared memory at a time.
enum : int { kTile = 32 };

template <typename T, int kSubwarp, int kVector, int kPieces, int kSparse, int kRows>
__global__ void __launch_bounds__(kSubwarp* kRows, 1)
    spmm(const int* __restrict__ row_offsets, const int* __restrict__ row_order, const int* __restrict__ columns,
         const T* __restrict__ values, const float* __restrict__ bias, const T* x, T* y, const T* residual, int rows,
         int count, int per_image, int per_row, int x_image, int x_channel, int x_row, int x_column, int y_image,
         int y_channel, int y_row, int r_image, int r_channel, int r_row, int activation, int place) {
    constexpr int kTogether = 4;
    __shared__ Nonzero tiles[kRows][kTile];
    dependent_launch();
    const int slot = blockIdx.x * kRows + threadIdx.y, lane = threadIdx.x;
    const bool mine = slot < rows;
    const int row = mine ? row_order[slot] : 0;
    const int begin = row_offsets[row], end = row_offsets[row + 1];
    const float offset = bias[row];
    dependent_wait();
    if (!mine) return;

    const Pixels pixels{count, per_image, per_row};
    const Plane x_plane{x_image, x_channel, x_row, x_column};
    const Plane y_plane{y_image, y_channel, y_row, 1}, r_plane{r_image, r_channel, r_row, 1};
    const int first_col = (blockIdx.y * kPieces * kSubwarp + lane) * kVector;
    // What lies behind the last pixel is read from the last one and never stored.
    const T* pieces[kPieces];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
        pieces[p] = x + pixels.offset(x_plane, min(first_col + p * kSubwarp * kVector, count - kVector));
    }
    float sums[kPieces][kVector] = {};
    auto add = [&](float value, const Vector<T, kVector>& piece, float* sum) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) sum[j] = fmaf(value, to_float(piece[j]), sum[j]);
    };

    const unsigned mask = subwarp_mask<kSubwarp>();
    Nonzero* const tile = tiles[threadIdx.y];
    for (int first = begin / kSparse * kSparse; first < end; first += kTile) {
        __syncwarp(mask);
#pragma unroll
        for (int i = lane * kSparse; i < kTile; i += kSubwarp * kSparse) {
            if (first + i < end) {
                const auto value = Vector<T, kSparse>::load_constant(values + first + i);
                const auto column = Vector<int, kSparse>::load_constant(columns + first + i);
#pragma unroll
                for (int j = 0; j < kSparse; ++j) {
                    tile[i + j] = Nonzero{to_float(value[j]), column[j] * x_channel};
                }
            }
        }
        __syncwarp(mask);
        int i = max(0, begin - first);
        const int stop = min(static_cast<int>(kTile), end - first);
        // The loads of kTogether nonzeros are under way at the same time.
        for (; i + kTogether <= stop; i += kTogether) {
            Vector<T, kVector> loaded[kTogether][kPieces];
#pragma unroll
            for (int t = 0; t < kTogether; ++t) {
#pragma unroll
                for (int p = 0; p < kPieces; ++p) loaded[t][p] = Vector<T, kVector>::load(pieces[p] + tile[i + t].place);
            }
#pragma unroll
            for (int t = 0; t < kTogether; ++t) {
#pragma unroll
                for (int p = 0; p < kPieces; ++p) add(tile[i + t].value, loaded[t][p], sums[p]);
            }
        }
#pragma unroll 1
        for (; i < stop; ++i) {
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
                add(tile[i].value, Vector<T, kVector>::load(pieces[p] + tile[i].place), sums[p]);
            }
        }
    }

#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
        const int col = first_col + p * kSubwarp * kVector;
        if (col >= count) continue;
        Vector<T, kVector> added, result;
        if (residual != nullptr) {
            added = Vector<T, kVector>::load(residual + pixels.offset(r_plane, col) +
                                             static_cast<long long>(row) * r_channel);
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float extra = residual != nullptr ? to_float(added[j]) : 0.0f;
            result[j] = from_float<T>(finish(sums[p][j], offset, extra, static_cast<Activation>(activation),
                                             static_cast<Residual>(place)));
        }
        result.store(y + pixels.offset(y_plane, col) + static_cast<long long>(row) * y_channel);
    }
}

template <typename T, int kSubwarp, int kBatch, int kRows>
__global__ void __launch_bounds__(kSubwarp* kRows)
    spmv(const int* __restrict__ row_offsets, const int* __restrict__ row_order, const int* __restrict__ columns,
         const T* __restrict__ values, const float* __restrict__ bias, const T* x, T* y, const T* residual, int rows,
         int batch, int x_pitch, int y_pitch, int r_pitch, int activation, int place) {
    dependent_launch();
    dependent_wait();
    const int slot = blockIdx.x * kRows + threadIdx.y, first = blockIdx.y * kBatch;
    if (slot >= rows) return;
    const int row = row_order[slot], lane = threadIdx.x;
    const T* source[kBatch];
    float sums[kBatch] = {};
#pragma unroll
    for (int n = 0; n < kBatch; ++n) source[n] = x + static_cast<long long>(min(first + n, batch - 1)) * x_pitch;
#pragma unroll 4
    for (int i = row_offsets[row] + lane; i < row_offsets[row + 1]; i += kSubwarp) {
        const float value = to_float(values[i]);
        const int column = columns[i];
#pragma unroll
        for (int n = 0; n < kBatch; ++n) sums[n] = fmaf(value, to_float(source[n][column]), sums[n]);
    }
    const unsigned mask = subwarp_mask<kSubwarp>();
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
#pragma unroll
        for (int step = kSubwarp / 2; step > 0; step /= 2) sums[n] += __shfl_xor_sync(mask, sums[n], step);
    }
    if (lane != 0) return;
    const float offset = bias[row];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
        if (first + n >= batch) break;
        const long long at = first + n;
        const float extra = residual != nullptr ? to_float(residual[at * r_pitch + row]) : 0.0f;
        y[at * y_pitch + row] = from_float<T>(finish(sums[n], offset, extra, static_cast<Activation>(activation),
                                                     static_cast<Residual>(place)));
    }
}

}  // namespace zeroskip::sputnik
