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
//   boxes    kLanes * kPieces * 4 neighbouring columns of one image, by the copy engine; four of them lie together and
//            aligned, in x, y and the residual, from every column that is a multiple of 4
//   runs     one image of at most kLanes * kPieces * kWide pixels, whose channels follow each other without a gap, by the
//            copy engine: as it lies in memory, so that planes of odd size need no alignment
//   vectors  as boxes, of any images, by the threads
//   gather   as vectors, but element by element, for x of any strides
//
// What the engine brings, no thread waits for but at its first use: the warp that is the last to be done with a stage asks
// for the slab that comes into it next, and warps may be `stages` slabs apart.  What threads bring, all wait for.
//
// `mates` blocks of neighbouring rows share boxes and runs of a tile: each asks for a part, which the engine writes to all
// of them, so that x leaves L2 once per cluster.  No stage is used twice then.
//
// The `split` blocks of a cluster share a tile and its rows: each takes a part of the slabs, and at the end finishes a part
// of the rows, whose sums the others write into its shared memory.
//
// Shared memory: 256 bytes of arrivals and counts; the heads, 8 bytes a row; then stages x (slab + 1 rows of the tile, the
// last one zeros; chunk), each part a multiple of 128 bytes; kPositions x kCols floats for the exchange, in the same place
// unless blocks share rows.  A chunk is what a block needs of W for one slab: an index of kPositions + 1 ints (padded to
// 16 bytes), then the nonzeros of each position in pairs (the odd one is paired with a zero weight at the row of zeros).
// Weights are copied before the kernel waits for the one before it.
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

enum class Mode { boxes, runs, vectors, gather };

// How the kernel is told where x lies.
template <typename T, Mode kMode>
struct Input {
    using type = const T*;
};
template <typename T>
struct Input<T, Mode::boxes> {
    using type = Boxes;
};

// In units of 16 bytes, rounded up to whole 128 bytes.
__device__ __forceinline__ int units(int bytes) { return (bytes + 127) / 128 * 8; }

template <typename T, Mode kMode, int kWide, int kLanes, int kPieces, int kRows, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, blocks_per_sm(kWide* kPieces* kRows, kWarps * 32))
    spmm(const uint4* __restrict__ heads, const uint4* __restrict__ chunks,
         const __grid_constant__ typename Input<T, kMode>::type x, T* y, const T* residual, int channels, int slab,
         int slabs, int stages, int chunk_units, int mates, int count, int per_image, int per_row, int x_image,
         int x_channel, int x_row, int x_column, int y_image, int y_channel, int y_row, int r_image, int r_channel,
         int r_row, int activation, int place) {
    constexpr bool kEngine = kMode == Mode::boxes || kMode == Mode::runs;
    constexpr int kThreads = kWarps * 32;
    constexpr int kSubwarps = kThreads / kLanes;
    constexpr int kPositions = kSubwarps * kRows;
    constexpr int kCols = kLanes * kPieces * kWide;
    constexpr int kIndex = (kPositions + 1 + 3) / 4;  // in uint4
    constexpr int kHeads = (kPositions + 1) / 2;      // in uint4
    constexpr int kMostStages = 8;
    constexpr int kControl = (2 * kMostStages + 1) * sizeof(Arrival) + kMostStages * sizeof(int);
    constexpr int kUnroll = kWide == 1 ? 4 : 2;  // pairs whose loads are under way together
    static_assert(kCols <= kThreads && kHeads <= kThreads, "one step of the block covers them");

    extern __shared__ __align__(128) uint4 memory[];
    Arrival* const arrivals = reinterpret_cast<Arrival*>(memory);  // of the stages
    Arrival* const freed = arrivals + kMostStages;                 // stages, by all threads
    Arrival* const exchanged = freed + kMostStages;
    int* const done = reinterpret_cast<int*>(exchanged + 1);  // warps, by stage
    uint4* const heads_here = memory + units(kControl);
    uint4* const stage_memory = heads_here + units(16 * kHeads);
    const Pixels pixels{count, per_image, per_row};
    const int split = gridDim.z, rank = blockIdx.z, mate = blockIdx.y & (mates - 1);  // mates: 1, 2, 4 or 8
    const int strips = kMode == Mode::boxes ? (per_image + kCols - 1) / kCols : 1;  // tiles of an image
    const int image = strips == 1 ? blockIdx.x : blockIdx.x / strips;
    const int first_col = kEngine ? image * per_image + (blockIdx.x - image * strips) * kCols : blockIdx.x * kCols;
    const int last_col = min(kMode == Mode::runs ? first_col + per_image : first_col + kCols,
                             kEngine ? (image + 1) * per_image : count);
    const int pitch = kMode == Mode::runs ? per_image : kCols;  // elements from channel to channel of the tile
    const int tile_units = units((slab + 1) * pitch * sizeof(T));
    const int stage_units = tile_units + units(16 * chunk_units);
    const int first_slab = split == 1 ? 0 : static_cast<unsigned>(rank * slabs) / gridDim.z;
    const int last_slab = split == 1 ? slabs : static_cast<unsigned>((rank + 1) * slabs) / gridDim.z;
    const int lane = threadIdx.x % kLanes, subwarp = threadIdx.x / kLanes;
    const uint4* const chunks_here = chunks + static_cast<long long>(blockIdx.y) * slabs * chunk_units;
    float sums[kRows][kPieces * kWide] = {};

    // Adds what the slab in `stage` gives.
    auto compute = [&](int stage) {
        const uint4* const here = stage_memory + stage * stage_units;
        const char* const tile = reinterpret_cast<const char*>(here) + lane * kWide * sizeof(T);
        const int* const index = reinterpret_cast<const int*>(here + tile_units);
        const Pair* const pairs = reinterpret_cast<const Pair*>(here + tile_units + kIndex);
        auto add = [&](float* sum, float weight, int at) {
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
                const auto piece =
                    Vector<T, kWide>::load(reinterpret_cast<const T*>(tile + at + p * kLanes * kWide * sizeof(T)));
#pragma unroll
                for (int i = 0; i < kWide; ++i) sum[kWide * p + i] = fmaf(weight, to_float(piece[i]), sum[kWide * p + i]);
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
    };

    if (threadIdx.x < kMostStages) {
        arrivals[threadIdx.x].init();
        freed[threadIdx.x].init(kThreads);
        done[threadIdx.x] = 0;
    }
    const int owned = kPositions / gridDim.z;  // rows that this block finishes
    if (threadIdx.x == kMostStages) {
        exchanged->init();
        if (split > 1) exchanged->expect((split - 1) * owned * kCols * sizeof(float));
    }
    if (threadIdx.x < pitch) {
#pragma unroll 1
        for (int stage = 0; stage < stages; ++stage) {
            reinterpret_cast<T*>(stage_memory + stage * stage_units)[slab * pitch + threadIdx.x] = from_float<T>(0.0f);
        }
    }
    if (mates > 1 || split > 1) {
        cluster_sync();  // before others write here and count it
    } else {
        __syncthreads();
    }

    if constexpr (kEngine) {
        const unsigned short all_mates = static_cast<unsigned short>(((1u << mates) - 1u) << (mates * rank));
        auto request_weights = [&](int s, int stage) {
            const int depth = kMode == Mode::runs ? min(slab, channels - s * slab) : slab;
            Arrival* const arrival = arrivals + stage;
            arrival->expect(depth * pitch * sizeof(T) + 16 * (chunk_units + (s == first_slab ? kHeads : 0)));
            if (s == first_slab) request_run(heads_here, heads + blockIdx.y * kHeads, 16 * kHeads, arrival);
            request_run(stage_memory + stage * stage_units + tile_units, chunks_here + static_cast<long long>(s) * chunk_units,
                        16 * chunk_units, arrival);
        };
        auto request_tile = [&](int s, int stage) {
            char* const tile = reinterpret_cast<char*>(stage_memory + stage * stage_units);
            Arrival* const arrival = arrivals + stage;
            const int first = s * slab;
            if constexpr (kMode == Mode::boxes) {
                const int pixel = first_col - image * per_image;
                if (mates == 1) {
                    x.request(tile, image, first, pixel, arrival);
                } else {
                    const int part = slab / mates;
                    x.share(tile + mate * part * kCols * sizeof(T), image, first + mate * part, pixel, arrival, all_mates);
                }
            } else if constexpr (kMode == Mode::runs) {
                // The channels of an image are one run of memory.
                const char* const source = reinterpret_cast<const char*>(x + static_cast<long long>(image) * x_image +
                                                                         static_cast<long long>(first) * x_channel);
                const int whole = min(slab, channels - first) * pitch * sizeof(T) / 16;
                if (mates == 1) {
                    request_run(tile, source, 16 * whole, arrival);
                } else {
                    const int begin = mate * whole / mates, end = (mate + 1) * whole / mates;
                    if (begin < end) share_run(tile + 16 * begin, source + 16 * begin, 16 * (end - begin), arrival, all_mates);
                }
            }
        };
        // Weights do not depend on what ran before.
        const int ahead = min(stages, last_slab - first_slab);
        if (threadIdx.x == 0) {
            if constexpr (kMode == Mode::boxes) x.prefetch();
#pragma unroll 1
            for (int i = 0; i < ahead; ++i) request_weights(first_slab + i, i);
        }
        dependent_launch();
        dependent_wait();
        if (threadIdx.x == 0) {
#pragma unroll 1
            for (int i = 0; i < ahead; ++i) request_tile(first_slab + i, i);
        }
        for (int s = first_slab, stage = 0, parity = 0; s < last_slab; ++s) {
            arrivals[stage].wait(parity);
            compute(stage);
            if (s + stages < last_slab) {
                freed[stage].arrive();
                if (threadIdx.x % 32 == 0 && atomicAdd(done + stage, 1) == kWarps - 1) {
                    done[stage] = 0;
                    freed[stage].wait(parity);  // for lanes of other warps that are behind, at most
                    request_weights(s + stages, stage);
                    request_tile(s + stages, stage);
                }
            }
            if (++stage == stages) {
                stage = 0;
                parity ^= 1;
            }
        }
    } else {
        auto load_tile = [&](T* tile, int s) {
            const int first = s * slab, depth = min(slab, channels - first);
            const Plane plane{x_image, x_channel, x_row, x_column};
            const T* const from = x + static_cast<long long>(first) * x_channel;
            if constexpr (kMode == Mode::vectors) {
                constexpr int kVectors = kCols / 4;
                constexpr int kStep = kThreads / kVectors;
                const int piece = threadIdx.x % kVectors, col = first_col + 4 * piece;
                if (col >= count) return;
                int k = threadIdx.x / kVectors;
                const T* source = from + pixels.offset(plane, col) + static_cast<long long>(k) * x_channel;
                const long long step = static_cast<long long>(kStep) * x_channel;
                T* to = tile + k * kCols + 4 * piece;
#pragma unroll 2
                for (; k < depth; k += kStep) {
                    if constexpr (sizeof(T) == 4) {
                        copy_16(to, source);
                    } else {
                        copy_short<8>(to, source);
                    }
                    source += step;
                    to += kStep * kCols;
                }
            } else if constexpr (kMode == Mode::gather) {
                // Neighbouring threads take one channel, each always the same column.
                constexpr int kStep = kThreads / kCols;
                const int col = threadIdx.x % kCols;
                if (first_col + col >= last_col) return;
                const T* const source = from + pixels.offset(plane, first_col + col);
#pragma unroll 4
                for (int k = threadIdx.x / kCols; k < depth; k += kStep) {
                    if constexpr (sizeof(T) == 4) {
                        copy_short<4>(tile + k * kCols + col, source + static_cast<long long>(k) * x_channel);
                    } else {
                        tile[k * kCols + col] = source[static_cast<long long>(k) * x_channel];
                    }
                }
            }
        };
        const int ahead = max(1, stages - 1);
        int load_stage = 0, stage = 0, parity = 0;
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
                const bool first = s + ahead == first_slab;
                if (threadIdx.x == 0) arrivals[load_stage].expect(16 * (chunk_units + (first ? kHeads : 0)));
                if (first) copy_run(heads_here, heads + blockIdx.y * kHeads, kHeads, arrivals + load_stage);
                copy_run(target + tile_units, chunks_here + static_cast<long long>(s + ahead) * chunk_units, chunk_units,
                         arrivals + load_stage);
                if (first) {
                    dependent_launch();
                    dependent_wait();
                }
                load_tile(reinterpret_cast<T*>(target), s + ahead);
                load_stage = load_stage + 1 == stages ? 0 : load_stage + 1;
            }
            copy_commit();
            if (s < first_slab) continue;
            compute(stage);
            if (++stage == stages) {
                stage = 0;
                parity ^= 1;
            }
        }
    }

    const Plane y_plane{y_image, y_channel, y_row, 1}, r_plane{r_image, r_channel, r_row, 1};
    const Head* const head = reinterpret_cast<const Head*>(heads_here);
    const auto act = static_cast<Activation>(activation);
    const auto where = static_cast<Residual>(place);
    constexpr bool kAligned = kMode == Mode::boxes || kMode == Mode::vectors || (kMode == Mode::runs && kWide == 4);
    constexpr int kOut = kAligned ? 4 : 1;
    // Where a column lies; of the engine's tiles the image is known.
    auto offset = [&](const Plane& plane, int col) {
        if constexpr (!kEngine) return pixels.offset(plane, col);
        return image * plane.image + Pixels{per_image, per_image, per_row}.offset(plane, col - image * per_image);
    };
    // The sums of kOut neighbouring columns from `col` on, of the row at `position`.
    auto write = [&](int position, int col, const float* sum) {
        const Head one = head[position];
        if (one.row < 0 || col >= last_col) return;
        T* const out = y + static_cast<long long>(one.row) * y_channel;
        const T* const more = residual + static_cast<long long>(one.row) * r_channel;
        if constexpr (kAligned) {
            Vector<T, 4> added, result;
            if (residual != nullptr) added = Vector<T, 4>::load(more + offset(r_plane, col));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float extra = residual != nullptr ? to_float(added[i]) : 0.0f;
                result[i] = from_float<T>(finish(sum[i], one.bias, extra, act, where));
            }
            result.store(out + offset(y_plane, col));
        } else {
            const float extra = residual != nullptr ? to_float(more[offset(r_plane, col)]) : 0.0f;
            out[offset(y_plane, col)] = from_float<T>(finish(sum[0], one.bias, extra, act, where));
        }
    };

    constexpr bool kDirect = kAligned || (kMode == Mode::runs && kRows * kPieces <= 2);
    if (kDirect && split == 1) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
                write(subwarp + r * kSubwarps, first_col + (p * kLanes + lane) * kWide, sums[r] + p * kWide);
            }
        }
        return;
    }

    // Elsewhere through shared memory: single elements in neighbouring threads, or the sums of all blocks.  Those have a
    // place of their own, since a block may still compute when another is done.
    float* const sums_here = reinterpret_cast<float*>(stage_memory + (split == 1 ? 0 : stages * stage_units));
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int position = subwarp + r * kSubwarps;
        const int owner = split == 1 ? 0 : static_cast<unsigned>(position) / static_cast<unsigned>(owned);
        float* const to = sums_here + (rank * owned + position - owner * owned) * kCols + lane * kWide;
        const bool ours = split == 1 || owner == rank;
        const unsigned there = ours ? 0 : peer_address(to, mate + mates * owner);
        const unsigned arrival = ours ? 0 : peer_address(exchanged, mate + mates * owner);
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
            if constexpr (kWide == 4) {
                const float4 piece = {sums[r][4 * p], sums[r][4 * p + 1], sums[r][4 * p + 2], sums[r][4 * p + 3]};
                if (ours) {
                    *reinterpret_cast<float4*>(to + p * kLanes * 4) = piece;
                } else {
                    push(there + p * kLanes * 16, piece, arrival);
                }
            } else {
                if (ours) {
                    to[p * kLanes] = sums[r][p];
                } else {
                    push(there + p * kLanes * 4, sums[r][p], arrival);
                }
            }
        }
    }
    __syncthreads();
    if (split > 1) exchanged->wait<true>(0);
#pragma unroll 1
    for (int i = threadIdx.x; i < owned * (kCols / kOut); i += kThreads) {
        const int row = i / (kCols / kOut), col = i % (kCols / kOut) * kOut;
        float sum[kOut] = {};
#pragma unroll 1
        for (int part = 0; part < split; ++part) {
            const auto piece = Vector<float, kOut>::load(sums_here + (part * owned + row) * kCols + col);
#pragma unroll
            for (int j = 0; j < kOut; ++j) sum[j] += piece.item[j];
        }
        write(rank * owned + row, first_col + col, sum);
    }
}

}  // namespace zeroskip::slab
