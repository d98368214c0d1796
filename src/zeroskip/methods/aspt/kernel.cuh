// Adaptive sparse tiling in one pass (after Hong et al., PPoPP 2019).
//
//     y[row, col] = finish(sum_k W[row, k] * x[k, col], bias[row], residual[row, col])
//
// `col` counts the pixels of all images, `k` the input channels.  A block owns a panel of rows, in kPositions places, and a
// strip of kCols columns.  Channels that are heavy in the panel (many of its rows need them) are copied to a tile in shared
// memory, as they lie in x, and read there; the others are read from x where they are needed.  Both parts add to the same
// registers, so that nothing is zeroed before, added atomically, or finished by another kernel.
//
//   kVector  neighbouring columns that a thread reads at once: a piece
//   kLanes   threads of a subwarp; together they own kRows places and kLanes * kPieces pieces
//   kPieces  of a thread, of each of its places
//   kRows    places of a subwarp
//   kWarps   of a block
//   kSplit   a long row has several places, whose sums meet in shared memory, always in the same order
//
// For each nonzero: its weight and place (one broadcast of 16 bytes for two of them), one load for each piece.
//
// Work comes in sections: some heavy channels, and a share of the light nonzeros.  Between two barriers of the block a
// section's heavy part is computed and the next one's light part, while what the barrier after them needs is copied:
//
//     computed      |                    light 0           | heavy 0, light 1     | heavy 1, light 2     | ...
//     copied        | weights 0          tile 0, weights 1 | tile 1, weights 2    | tile 2, weights 3    | ...
//
// Weights 0 are copied before the kernel waits for the one before it.
//
// Shared memory: the head, 16 bytes a place; up to three chunks of weights; up to two tiles of `width` channels x kCols
// elements.  With kSplit the sums (kPositions x kCols floats) lie where chunks and tiles were.
// Bytes per output: (heavy channels + light nonzeros) / rows of the panel * sizeof(T) of x at most, the light ones less what
// L1 keeps; the chunks' over kCols of W; sizeof(T) of y.
//
// Assumes: a channel of x lies less than 4 GB from the next, columns of y and residual are contiguous; for kVector > 1 x, y and
// residual have planes without gaps, of a multiple of kVector pixels, and every image and channel begins at a multiple of
// kVector elements.
#pragma once

#include <zeroskip/copy.cuh>
#include <zeroskip/pixels.cuh>
#include <zeroskip/types.cuh>

namespace zeroskip::aspt {

struct alignas(8) Nonzero {
    float weight;
    int place;  // the channel of a light one; bytes from the beginning of the tile for a heavy one
};

// Of one place of the panel: its row (-1: none, or one that goes on), its bias, and how many places the row takes.
struct alignas(16) Head {
    int row;
    float bias;
    int parts;
    int unused;
};

// Nonzeros whose loads of x are under way together.
enum : int { kTogether = 4 };

// Nonzeros for which ptxas converts what they meet before it is needed.
template <typename T>
constexpr int kConverted = 0;
template <>
constexpr int kConverted<__nv_bfloat16> = 2;

// So few registers for the rest that as many warps as possible hide each other's latency, and none is spilled.  (cuda.py counts
// with the same.)
template <typename T, int kVector, int kPieces, int kRows>
__device__ constexpr int blocks_per_sm(int threads) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    const int rest = 72;
#else
    const int rest = 40;
#endif
    const int words = (kVector * static_cast<int>(sizeof(T)) + 3) / 4;
    const int floats = (kRows + kConverted<T>) * kPieces * kVector;
    const int registers = (rest + floats + kTogether * kPieces * words + 7) / 8 * 8;
    const int blocks = 65536 / (registers * threads);
    return blocks > 0 ? blocks : 1;
}

// kBytes from global to shared memory; there after copy_wait and a barrier.
template <int kBytes, typename T>
__device__ __forceinline__ void copy(void* shared, const T* global) {
    if constexpr (kBytes == 16) {
        copy_16(shared, global);
    } else if constexpr (kBytes >= 4) {
        copy_short<kBytes>(shared, global);
    } else {
        *static_cast<T*>(shared) = *global;
    }
}

// Where light nonzeros find x: the thread's columns in the first channel.  Addresses are counted in bytes, unsigned: they
// then take one instruction.
template <typename T, int kVector, int kPieces>
struct FromGlobal {
    const char* pieces[kPieces];
    unsigned channel_bytes;

    __device__ __forceinline__ const T* at(unsigned channel, int piece) const {
        return reinterpret_cast<const T*>(pieces[piece] + static_cast<unsigned long long>(channel) * channel_bytes);
    }
    __device__ __forceinline__ Vector<T, kVector> load(int channel, int piece) const {
        return Vector<T, kVector>::load(at(channel, piece));
    }
};

// Where heavy nonzeros find x: the thread's columns in the first channel of the tile.
template <typename T, int kVector, int kLanes>
struct FromTile {
    const char* columns;

    __device__ __forceinline__ Vector<T, kVector> load(int place, int piece) const {
        return Vector<T, kVector>::load(reinterpret_cast<const T*>(columns + place) + piece * kLanes * kVector);
    }
};

using Nonzeros = Vector<Nonzero, kTogether>;

// Adds the products of kTogether nonzeros with what they meet, or of the first `count`, which are fewer.
template <bool kAll, int kVector, int kPieces, typename Source>
__device__ __forceinline__ void add(const Nonzeros& nonzeros, int count, const Source& x, float* sums) {
    constexpr int kMost = kAll ? kTogether : kTogether - 1;
    decltype(x.load(0, 0)) loaded[kMost][kPieces];
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
            if (kAll || i < count) loaded[i][p] = x.load(nonzeros[i].place, p);
        }
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                float& sum = sums[p * kVector + j];
                if (kAll || i < count) sum = fmaf(nonzeros[i].weight, to_float(loaded[i][p][j]), sum);
            }
        }
    }
}

// Adds the nonzeros from the place that `index` points to up to the next one.  Weights are read a step ahead, also behind
// the last ones, where the chunk goes on.
template <int kVector, int kPieces, typename Source>
__device__ __forceinline__ void add_row(const int* index, const Nonzero* nonzeros, const Source& x, float* sums) {
    const int end = index[1];
    int i = (index[0] + 1) & ~1;
    Nonzeros next = Nonzeros::load(nonzeros + i);
#pragma unroll 1
    for (; i + kTogether <= end; i += kTogether) {
        const Nonzeros these = next;
        next = Nonzeros::load(nonzeros + i + kTogether);
        add<true, kVector, kPieces>(these, kTogether, x, sums);
    }
    if (i < end) add<false, kVector, kPieces>(next, end - i, x, sums);
}

template <typename T, int kVector, int kLanes, int kPieces, int kRows, int kWarps, bool kSplit>
__global__ void __launch_bounds__(kWarps * 32, blocks_per_sm<T, kVector, kPieces, kRows>(kWarps * 32))
    spmm(const uint4* __restrict__ heads, const uint4* __restrict__ chunks, const T* x, T* y, const T* residual,
         int sections, int chunk_units, int tiles, int width, int count, int per_image, int per_row, int x_image, int x_channel,
         int x_row, int x_column, int y_image, int y_channel, int y_row, int r_image, int r_channel, int r_row,
         int activation, int place) {
    constexpr int kThreads = kWarps * 32;
    constexpr int kSubwarps = kThreads / kLanes;
    constexpr int kPositions = kSubwarps * kRows;
    constexpr int kVectors = kLanes * kPieces;  // that a channel of the tile has
    constexpr int kCols = kVectors * kVector;
    constexpr int kBytes = kVector * sizeof(T);
    constexpr int kPitch = kVectors * kBytes;
    constexpr int kIndex = 2 * kPositions + 1;

    extern __shared__ uint4 memory[];
    const Head* const head = reinterpret_cast<const Head*>(memory);
    uint4* const chunk_memory = memory + kPositions;
    char* const tile_memory = reinterpret_cast<char*>(memory + tiles);
    const int header = (kIndex + 1 + width + 3) / 4;  // in uint4
    auto chunk_at = [&](int s) { return chunk_memory + s % 3 * chunk_units; };
    auto tile_at = [&](int s) { return tile_memory + s % 2 * (width * kPitch); };

    auto copy_units = [](uint4* to, const uint4* from, int units) {
#pragma unroll 2
        for (int i = threadIdx.x; i < units; i += kThreads) copy_16(to + i, from + i);
    };
    const uint4* const weights = chunks + static_cast<long long>(blockIdx.y) * sections * chunk_units;
    copy_units(memory, heads + static_cast<long long>(blockIdx.y) * kPositions, kPositions);
    copy_units(chunk_memory, weights, chunk_units);
    copy_commit();
    dependent_launch();

    const Pixels pixels{count, per_image, per_row};
    const Plane x_plane{x_image, x_channel, x_row, x_column};
    const int lane = threadIdx.x % kLanes, subwarp = threadIdx.x / kLanes;
    const int first_col = blockIdx.x * kCols;
    // What lies behind the last pixel is read from the last one and never stored.
    FromGlobal<T, kVector, kPieces> light;
    light.channel_bytes = static_cast<unsigned>(x_channel * sizeof(T));
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
        const int col = min(first_col + (p * kLanes + lane) * kVector, count - kVector);
        light.pieces[p] = reinterpret_cast<const char*>(x + pixels.offset(x_plane, col));
    }
    auto copy_tile = [&](int s) {
        const int* const channels = reinterpret_cast<const int*>(chunk_at(s)) + kIndex;
        const int heavy = channels[0];
        char* to = tile_at(s) + subwarp * kPitch + lane * kBytes;
#pragma unroll 4
        for (int i = subwarp; i < heavy; i += kSubwarps) {
#pragma unroll
            for (int p = 0; p < kPieces; ++p) copy<kBytes>(to + p * kLanes * kBytes, light.at(channels[1 + i], p));
            to += kSubwarps * kPitch;
        }
    };

    float sums[kRows][kPieces * kVector] = {};
#pragma unroll 1
    for (int s = -1; s < sections; ++s) {
        copy_wait<0>();
        __syncthreads();
        if (s < 0) dependent_wait();
        if (s + 1 < sections) copy_tile(s + 1);
        if (s + 2 < sections) {
            copy_units(chunk_at(s + 2), weights + static_cast<long long>(s + 2) * chunk_units, chunk_units);
        }
        copy_commit();
        if (s >= 0) {
            const uint4* const chunk = chunk_at(s);
            const int* const index = reinterpret_cast<const int*>(chunk) + kPositions + subwarp;
            const Nonzero* const nonzeros = reinterpret_cast<const Nonzero*>(chunk + header);
            const FromTile<T, kVector, kLanes> heavy{tile_at(s) + lane * kBytes};
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                add_row<kVector, kPieces>(index + r * kSubwarps, nonzeros, heavy, sums[r]);
            }
        }
        if (s + 1 < sections) {
            const uint4* const chunk = chunk_at(s + 1);
            const int* const index = reinterpret_cast<const int*>(chunk) + subwarp;
            const Nonzero* const nonzeros = reinterpret_cast<const Nonzero*>(chunk + header);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                add_row<kVector, kPieces>(index + r * kSubwarps, nonzeros, light, sums[r]);
            }
        }
    }

    const Plane y_plane{y_image, y_channel, y_row, 1}, r_plane{r_image, r_channel, r_row, 1};
    auto write = [&](const Head& at, int col, const float* sum) {
        if (at.row < 0 || col >= count) return;
        Vector<T, kVector> added, result;
        if (residual != nullptr) {
            added = Vector<T, kVector>::load(residual + pixels.offset(r_plane, col) +
                                             static_cast<long long>(at.row) * r_channel);
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float extra = residual != nullptr ? to_float(added[j]) : 0.0f;
            result[j] = from_float<T>(finish(sum[j], at.bias, extra, static_cast<Activation>(activation),
                                             static_cast<Residual>(place)));
        }
        result.store(y + pixels.offset(y_plane, col) + static_cast<long long>(at.row) * y_channel);
    };

    if constexpr (!kSplit) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const Head at = head[subwarp + r * kSubwarps];
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
                write(at, first_col + (p * kLanes + lane) * kVector, sums[r] + p * kVector);
            }
        }
    } else {
        using Sum = Vector<float, kVector>;
        Sum* const all = reinterpret_cast<Sum*>(chunk_memory);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
                Sum sum;
#pragma unroll
                for (int j = 0; j < kVector; ++j) sum[j] = sums[r][p * kVector + j];
                all[(subwarp + r * kSubwarps) * kVectors + p * kLanes + lane] = sum;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kPositions * kVectors; i += kThreads) {
            const Head at = head[i / kVectors];
            Sum sum = all[i];
            for (int part = 1; part < at.parts; ++part) {
                const Sum more = all[i + part * kVectors];
#pragma unroll
                for (int j = 0; j < kVector; ++j) sum[j] += more[j];
            }
            write(at, first_col + i % kVectors * kVector, sum.item);
        }
    }
}

}  // namespace zeroskip::aspt
