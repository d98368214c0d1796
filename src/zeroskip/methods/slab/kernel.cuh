// Sparse matrix product with the input in slabs of shared memory.
//
//     y[row, col] = finish(sum_k W[row, k] * x[k, col], bias[row], residual[row, col])
//
// `col` counts the pixels of all images, `k` the input channels.  A block owns kPositions rows (in packed order) and a tile
// of columns.  It walks the input channels in slabs: a slab of x is copied to shared memory once and serves every
// row of the block, so that x leaves L2 once per block and not once per nonzero.
//
// A subwarp of `kLanes` threads owns `kRows` rows; a thread `kPieces` pieces of `kWide` neighbouring columns of each, in
// registers from the first slab to the last.  For each nonzero: one broadcast of the weight and its place, one
// load of kWide columns from shared memory for each piece.
//
// How a tile comes to shared memory, and what it is:
//   vectors  kLanes * kPieces * 4 neighbouring columns of any images; four of them lie together and aligned, in x, y and the
//            residual, from every column that is a multiple of 4
//   runs     one image of at most kLanes * kPieces pixels, whose channels follow each other without a gap: copied as it
//            lies in memory, so that planes of odd size need no alignment
//   gather   as vectors, but element by element, for x of any strides
//
// The `split` blocks of a cluster share a tile and its rows: each takes a part of the slabs, and at the end a part of the
// rows, whose sums it collects from the others' shared memory.
//
// Shared memory: 32 bytes of arrivals; the head, 8 bytes a row; then stages x (slab + 1 rows of the tile, the last one
// zeros; chunk); for the exchange kPositions x kCols floats in the same place.  A chunk is what a block needs of W for
// one slab: an index of kPositions + 1 ints (padded to 16 bytes), then the nonzeros of each position in pairs (the odd
// one is paired with a zero weight at the row of zeros).  Weights are copied before the kernel waits for the one before
// it.
// Bytes per output: K * sizeof(T) / kPositions of x, the chunk's over the tile's columns of W, sizeof(T) of y.
//
// Assumes: columns of y and residual are contiguous.
#pragma once

#include <zeroskip/cluster.cuh>
#include <zeroskip/copy.cuh>
#include <zeroskip/pixels.cuh>
#include <zeroskip/types.cuh>

namespace zeroskip::slab {

struct alignas(16) Pair {
    float weight0;
    int place0;  // bytes from the slab's first row
    float weight1;
    int place1;
};

// Of one row of the block: its number, -1 where there is none, and its bias.
struct alignas(8) Head {
    int row;
    float bias;
};

// So few registers for the rest that as many warps as possible hide each other's latency.
__device__ constexpr int blocks_per_sm(int sums, int threads) {
    const int registers = sums <= 8 ? 64 : sums <= 16 ? 80 : sums <= 32 ? 96 : 128;
    const int blocks = 65536 / (registers * threads);
    return blocks > 0 ? blocks : 1;
}

enum class Mode { vectors, runs, gather };

template <typename T, Mode kMode, int kLanes, int kPieces, int kRows, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, blocks_per_sm((kMode == Mode::runs ? 1 : 4) * kPieces * kRows, kWarps * 32))
    spmm(const uint4* __restrict__ heads, const uint4* __restrict__ chunks, const T* x, T* y, const T* residual,
         int channels, int slab, int slabs, int stages, int chunk_units, int count, int per_image, int per_row,
         int x_image, int x_channel, int x_row, int x_column, int y_image, int y_channel, int y_row, int r_image,
         int r_channel, int r_row, int activation, int place) {
    constexpr bool kRuns = kMode == Mode::runs;
    constexpr int kWide = kRuns ? 1 : 4;  // neighbouring columns that a thread reads at once
    constexpr int kThreads = kWarps * 32;
    constexpr int kSubwarps = kThreads / kLanes;
    constexpr int kPositions = kSubwarps * kRows;
    constexpr int kCols = kLanes * kPieces * kWide;
    constexpr int kIndex = (kPositions + 1 + 3) / 4;  // in uint4
    constexpr int kHeads = (kPositions + 1) / 2;      // in uint4
    constexpr int kArrivals = 2;                      // in uint4: room for four, one a stage
    constexpr int kUnroll = kRuns ? 4 : 2;            // pairs whose loads are under way together
    static_assert(kCols <= kThreads && kHeads <= kThreads, "one step of the block covers them");

    extern __shared__ uint4 memory[];
    Arrival* const arrivals = reinterpret_cast<Arrival*>(memory);
    uint4* const heads_here = memory + kArrivals;
    uint4* const stage_memory = heads_here + kHeads;
    const Pixels pixels{count, per_image, per_row};
    const Plane x_plane{x_image, x_channel, x_row, x_column};
    const int split = gridDim.z, rank = blockIdx.z;
    const int first_col = blockIdx.x * (kRuns ? per_image : kCols);
    const int last_col = kRuns ? first_col + per_image : min(first_col + kCols, count);
    const int pitch = kRuns ? per_image : kCols;  // floats from channel to channel of the tile
    const int tile_units = ((slab + 1) * pitch + 3) / 4;
    const int stage_units = tile_units + chunk_units;
    const int first_slab = split == 1 ? 0 : rank * slabs / split;
    const int last_slab = split == 1 ? slabs : (rank + 1) * slabs / split;

    int load_stage = 0, stage = 0, parity = 0;
    // Copies slab s of x, or what of it does not come as a run.
    auto load_tile = [&](float* tile, int s) {
        const int first = s * slab, depth = min(slab, channels - first);
        const T* const from = x + static_cast<long long>(first) * x_channel;
        if constexpr (kRuns) {
            // The channels of an image are one run of memory.
            const T* const source = from + static_cast<long long>(blockIdx.x) * x_image;
            const int whole = depth * per_image / 4;
            if constexpr (sizeof(T) == 4) {
                copy_run(reinterpret_cast<uint4*>(tile), source, whole, arrivals + load_stage);
            } else {
#pragma unroll 4
                for (int i = threadIdx.x; i < whole; i += kThreads) {
                    const auto loaded = Vector<T, 4>::load(source + 4 * i);
#pragma unroll
                    for (int j = 0; j < 4; ++j) tile[4 * i + j] = to_float(loaded[j]);
                }
            }
            const int rest = 4 * whole + threadIdx.x;
            if (rest < depth * per_image) tile[rest] = to_float(source[rest]);
        } else if constexpr (kMode == Mode::vectors) {
            constexpr int kVectors = kCols / 4;
            constexpr int kStep = kThreads / kVectors;
            const int piece = threadIdx.x % kVectors, col = first_col + 4 * piece;
            if (col >= count) return;
            int k = threadIdx.x / kVectors;
            const T* source = from + pixels.offset(x_plane, col) + static_cast<long long>(k) * x_channel;
            const long long step = static_cast<long long>(kStep) * x_channel;
            float* to = tile + k * kCols + 4 * piece;
#pragma unroll 2
            for (; k < depth; k += kStep) {
                if constexpr (sizeof(T) == 4) {
                    copy_16(to, source);
                } else {
                    const auto loaded = Vector<T, 4>::load(source);
#pragma unroll
                    for (int j = 0; j < 4; ++j) to[j] = to_float(loaded[j]);
                }
                source += step;
                to += kStep * kCols;
            }
        } else {
            // Neighbouring threads take one channel, each always the same column.
            constexpr int kStep = kThreads / kCols;
            const int col = threadIdx.x % kCols;
            if (first_col + col >= last_col) return;
            const T* const source = from + pixels.offset(x_plane, first_col + col);
#pragma unroll 4
            for (int k = threadIdx.x / kCols; k < depth; k += kStep) {
                if constexpr (sizeof(T) == 4) {
                    copy_4(tile + k * pitch + col, source + static_cast<long long>(k) * x_channel);
                } else {
                    tile[k * pitch + col] = to_float(source[static_cast<long long>(k) * x_channel]);
                }
            }
        }
    };

    const int ahead = max(1, stages - 1);
    const int lane = threadIdx.x % kLanes, subwarp = threadIdx.x / kLanes;
    const uint4* source = chunks + (static_cast<long long>(blockIdx.y) * slabs + first_slab) * chunk_units;
    float sums[kRows][kPieces * kWide] = {};
    if (threadIdx.x < stages) arrivals[threadIdx.x].init();
    __syncthreads();
    // At s, slab s is computed with and slab s + ahead begins to come.
    for (int s = first_slab - ahead; s < last_slab; ++s) {
        if (s >= first_slab) {
            if (ahead == 1) {
                copy_wait<0>();
            } else if (ahead == 2) {
                copy_wait<1>();
            } else {
                copy_wait<2>();
            }
            arrivals[stage].wait(parity);
            __syncthreads();
        }
        if (s + ahead < last_slab) {
            uint4* const target = stage_memory + load_stage * stage_units;
            float* const tile = reinterpret_cast<float*>(target);
            const bool first = s + ahead == first_slab;
            if (threadIdx.x == 0) {
                const int depth = min(slab, channels - (s + ahead) * slab);
                const int run = kRuns && sizeof(T) == 4 ? depth * per_image / 4 : 0;
                arrivals[load_stage].expect(16 * (chunk_units + run + (first ? kHeads : 0)));
            }
            // Weights do not depend on what ran before.
            if (first) copy_run(heads_here, heads + blockIdx.y * kHeads, kHeads, arrivals + load_stage);
            copy_run(target + tile_units, source, chunk_units, arrivals + load_stage);
            source += chunk_units;
            if (threadIdx.x < pitch) tile[slab * pitch + threadIdx.x] = 0.0f;
            if (first) {
                dependent_launch();
                dependent_wait();
            }
            load_tile(tile, s + ahead);
            load_stage = load_stage + 1 == stages ? 0 : load_stage + 1;
        }
        copy_commit();
        if (s < first_slab) continue;

        const uint4* const here = stage_memory + stage * stage_units;
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
        const char* const tile = reinterpret_cast<const char*>(here) + lane * kWide * 4;
        const int* const index = reinterpret_cast<const int*>(here + tile_units);
        const Pair* const pairs = reinterpret_cast<const Pair*>(here + tile_units + kIndex);
        auto add = [&](float* sum, float weight, int at) {
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
                const char* const from = tile + at + p * kLanes * kWide * 4;
                if constexpr (kWide == 4) {
                    const float4 piece = *reinterpret_cast<const float4*>(from);
                    sum[4 * p + 0] = fmaf(weight, piece.x, sum[4 * p + 0]);
                    sum[4 * p + 1] = fmaf(weight, piece.y, sum[4 * p + 1]);
                    sum[4 * p + 2] = fmaf(weight, piece.z, sum[4 * p + 2]);
                    sum[4 * p + 3] = fmaf(weight, piece.w, sum[4 * p + 3]);
                } else {
                    sum[p] = fmaf(weight, *reinterpret_cast<const float*>(from), sum[p]);
                }
            }
        };
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int position = subwarp + r * kSubwarps;
            const int end = index[position + 1];
#pragma unroll kUnroll
            for (int i = index[position]; i < end; ++i) {
                const Pair pair = pairs[i];
                add(sums[r], pair.weight0, pair.place0);
                add(sums[r], pair.weight1, pair.place1);
            }
        }
    }

    const Plane y_plane{y_image, y_channel, y_row, 1}, r_plane{r_image, r_channel, r_row, 1};
    const Head* const head = reinterpret_cast<const Head*>(heads_here);
    const auto act = static_cast<Activation>(activation);
    const auto where = static_cast<Residual>(place);
    // The sums of `width` (1 or 4) neighbouring columns from `col` on, of the row at `position`.
    auto write = [&](int position, int col, const float* sum, int width) {
        const Head one = head[position];
        if (one.row < 0 || col >= last_col) return;
        T* const out = y + static_cast<long long>(one.row) * y_channel;
        const T* const more = residual + static_cast<long long>(one.row) * r_channel;
        if constexpr (kMode == Mode::vectors) {
            Vector<T, 4> added, result;
            if (residual != nullptr) added = Vector<T, 4>::load(more + pixels.offset(r_plane, col));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float extra = residual != nullptr ? to_float(added[i]) : 0.0f;
                result[i] = from_float<T>(finish(sum[i], one.bias, extra, act, where));
            }
            result.store(out + pixels.offset(y_plane, col));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i >= width || col + i >= last_col) break;
                const float extra = residual != nullptr ? to_float(more[pixels.offset(r_plane, col + i)]) : 0.0f;
                out[pixels.offset(y_plane, col + i)] = from_float<T>(finish(sum[i], one.bias, extra, act, where));
            }
        }
    };

    constexpr bool kDirect = kMode == Mode::vectors || (kRuns && kRows * kPieces <= 2);
    if (kDirect && split == 1) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
                write(subwarp + r * kSubwarps, first_col + (p * kLanes + lane) * kWide, sums[r] + p * kWide, kWide);
            }
        }
        return;
    }

    // Elsewhere through shared memory: single elements in neighbouring threads, or the sums of all blocks.
    __syncthreads();
    float* const shared_sums = reinterpret_cast<float*>(stage_memory);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
            float* const to = shared_sums + (subwarp + r * kSubwarps) * kCols + (p * kLanes + lane) * kWide;
            if constexpr (kWide == 4) {
                *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(sums[r] + 4 * p);
            } else {
                *to = sums[r][p];
            }
        }
    }
    if (split > 1) {
        cluster_sync();
    } else {
        __syncthreads();
    }
    const int first_row = split == 1 ? 0 : rank * kPositions / split;
    const int last_row = split == 1 ? kPositions : (rank + 1) * kPositions / split;
    for (int i = threadIdx.x; i < (last_row - first_row) * (kCols / 4); i += kThreads) {
        const int position = first_row + i / (kCols / 4), col = i % (kCols / 4) * 4;
        const float4* const mine = reinterpret_cast<const float4*>(shared_sums + position * kCols + col);
        float sum[4] = {};
        for (int other = 0; other < split; ++other) {
            const float4 part = split > 1 ? cluster_load(mine, other) : *mine;
            sum[0] += part.x;
            sum[1] += part.y;
            sum[2] += part.z;
            sum[3] += part.w;
        }
        write(position, first_col + col, sum, 4);
    }
    if (split > 1) cluster_meet();  // a block's shared memory goes with it
}

}  // namespace zeroskip::slab
