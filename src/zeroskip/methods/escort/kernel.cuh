// Direct sparse convolution: every nonzero weight meets a tile of pixels in shared memory.
//
//   y[n, k, i, j] = finish(sum over the nonzeros of W[k] of
//                              W[k, c, a, b] * x[n, c, i * stride_h - padding_h + a * dilation_h,
//                                                      j * stride_w - padding_w + b * dilation_w],
//                          bias[k], residual[n, k, i, j])
//
// NCHW, sums in fp32, rounded once.  There is no im2col: a block copies the patch of x that its tile of outputs meets,
// with zeros where there is padding, a slab of input channels at a time, and each nonzero carries the place in that patch
// of what it meets ("stretched" index), so that the inner loop adds a number and loads.
//
//   grid     x: tiles of outputs, y: blocks of output channels (those of a group of the convolution together), z: kSplit
//   block    kWarps x kRows output channels, in packed order ("positions"), of one tile
//   warp     kRows of them
//   lane     one column of the tile: kPixels outputs below each other, of each output channel of its warp, in registers
//            from the first slab to the last.  The lanes are kImages x kStrips x kCols; strips are rows of a tile.
//
// How a warp computes is the mode:
//   taps     for each nonzero, a broadcast of weight and place (two at a time) and kPixels loads: one wavefront of shared
//            memory for each multiply-add.  The strips of a tile are neighbouring rows and a thread's pixels kStrips rows
//            apart.  For layers that must be spread thinly over the GPU.
//   windows  a load serves all kernel rows and all output channels of the warp; see windows.cuh.  A thread's pixels are
//            neighbouring rows.  For kernels of three rows and layers large enough for 112 sums in a thread.
//
// The kSplit blocks of a cluster share a tile and its output channels: each takes a part of the slabs, and at the end
// finishes a part of the output channels, whose sums the others write into its shared memory.
//
// Shared memory: 16 bytes; the heads, 8 bytes a position; with kSplit > 1, kPositions x kPixels x 32 floats for what other
// blocks send; then `stages` x (tile, chunk).  A tile is `slab` channels of the patch as floats, in mode taps one more of
// zeros; a chunk is what the block needs of W for a slab (pack/stretched_chunks.py).  Tiles are cleared first, and what
// lies outside of x is never written: so it needs no test later.  No zero weight ever meets a pixel: in mode taps, the one
// that an odd nonzero is paired with meets the zeros of its own.
// Weights are copied and tiles are cleared before the kernel waits for the one before it.
// Bytes per output: patch / tile (1.1 to 1.5, times the strides) * C * sizeof(T) / kPositions of x, 8 bytes a nonzero
// over the tile's pixels of W, sizeof(T) of y.
//
// Assumes: columns of x, y and residual are contiguous; with kWide > 1 rows of x are multiples of kWide, and aligned so.
#pragma once

#include <shared.cuh>
#include <windows.cuh>
#include <zeroskip/cluster.cuh>
#include <zeroskip/copy.cuh>
#include <zeroskip/types.cuh>

namespace zeroskip::escort {

enum class Mode { taps, windows };

// Outputs of a warp: kImages x kStrips x kCols lanes, kPixels of each.  Tiles across and down an image.
template <int Images, int Strips, int Cols, int Pixels, int Across, int Down>
struct Tile {
    static constexpr int kImages = Images, kStrips = Strips, kCols = Cols, kPixels = Pixels;
    static constexpr int kAcross = Across, kDown = Down;
};

// What they meet of a channel, in floats; see cuda_geometry.Patch.
//   Rows, Vectors, Wide           of the part that is copied: Vectors x Wide columns, Wide of them at a time
//   Pitch, Image, Channel         from row to row, image to image, channel to channel
//   First, Lead                   what the first lane's first tap meets; where the first column is copied to
//   StepH, StepW, Phase           strides of the convolution; columns are sorted by their number modulo StepW, Phase apart
template <int Rows, int Vectors, int Wide, int Pitch, int Image, int Channel, int First, int Lead, int StepH, int StepW,
          int Phase>
struct Patch {
    static constexpr int kRows = Rows, kVectors = Vectors, kWide = Wide, kPitch = Pitch, kImage = Image;
    static constexpr int kChannel = Channel, kFirst = First, kLead = Lead;
    static constexpr int kStepH = StepH, kStepW = StepW, kPhase = Phase;
};

// Of one position: its output channel, -1 where there is none, and its bias.
struct alignas(8) Head {
    int row;
    float bias;
};

// As EscortCudaConfig.registers: as few as it can do with, for as many warps as possible.
__device__ constexpr int blocks_per_sm(Mode mode, int rows, int pixels, int threads) {
    const int live = rows * pixels + 2 * pixels;
    const int few = live <= 22 ? 64 : live <= 36 ? 80 : live <= 52 ? 96 : 128;
    return 65536 / ((mode == Mode::windows ? 168 : few) * threads);
}

// kBlocks: of a group of the convolution, 0 if there is one group only.
template <typename T, Mode kMode, class Tile, class Patch, int kRows, int kWarps, int kBlocks, int kSplit,
          Activation kActivation, Residual kPlace>
__global__ void __launch_bounds__(kWarps * 32, blocks_per_sm(kMode, kRows, Tile::kPixels, kWarps * 32))
    conv(const uint4* __restrict__ heads, const uint4* __restrict__ chunks, const T* x, T* y, const T* residual,
         int channels, int slab, int slabs, int stages, int tile_units, int chunk_units, int n, int h, int w, int p, int q,
         int first_x_row, int first_x_col, int x_image, int x_channel, int x_row, int y_image, int y_channel, int y_row,
         int r_image, int r_channel, int r_row) {
    constexpr int kPixels = Tile::kPixels, kCols = Tile::kCols, kStrips = Tile::kStrips, kImages = Tile::kImages;
    constexpr int kThreads = kWarps * 32;
    constexpr int kPositions = kWarps * kRows;
    constexpr int kPiece = kPixels > 2 ? 4 : kPixels;         // floats that go to another block at once
    constexpr int kPieces = (kPixels + kPiece - 1) / kPiece;  // of an output channel
    constexpr int kHeads = (kPositions + 1) / 2;              // in units of 16 bytes
    constexpr int kInbox = kSplit == 1 ? 0 : kPositions * kPieces * kPiece * 8;
    constexpr bool kTaps = kMode == Mode::taps;
    constexpr int kStripRows = kTaps ? 1 : kPixels;  // rows of the tile from strip to strip
    constexpr int kPixelRows = kTaps ? kStrips : 1;  // and from pixel to pixel of a thread
    static_assert(kPositions % kSplit == 0, "blocks of a cluster finish equally many output channels");

    uint4* const memory = shared_memory();
    Arrival* const arrival = reinterpret_cast<Arrival*>(memory);
    const Head* const head = reinterpret_cast<const Head*>(memory + 1);
    float* const inbox = reinterpret_cast<float*>(memory + 1 + kHeads);
    uint4* const stage_memory = memory + 1 + kHeads + kInbox;
    const int stage_units = tile_units + chunk_units;
    const int rank = kSplit == 1 ? 0 : blockIdx.z;
    const int first_slab = rank * slabs / kSplit, last_slab = (rank + 1) * slabs / kSplit;

    // The tile, and the outputs of this lane.  Idle lanes do what the first one does, and write nothing.
    const int tile_col = blockIdx.x % Tile::kAcross, tile_row = blockIdx.x / Tile::kAcross % Tile::kDown;
    const int first_image = blockIdx.x / (Tile::kAcross * Tile::kDown) * kImages;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int used = lane < kImages * kStrips * kCols ? lane : 0;
    const int lane_col = used % kCols, strip = used / kCols % kStrips, lane_image = used / (kCols * kStrips);
    const int lane_word = lane_image * Patch::kImage + strip * (kStripRows * Patch::kStepH * Patch::kPitch) +
                          Patch::kFirst + lane_col;

    // ---- what comes to shared memory --------------------------------------------------------------------------------
    const uint4* const my_chunks = chunks + static_cast<long long>(blockIdx.y) * slabs * chunk_units;
    auto copy_chunk = [&](int s, uint4* stage) {
        const uint4* const from = my_chunks + static_cast<long long>(s) * chunk_units;
#pragma unroll 1
        for (int i = threadIdx.x; i < chunk_units; i += kThreads) copy_16(stage + tile_units + i, from + i);
    };
    // Each thread copies the same vectors of every kGroups-th channel.
    constexpr int kVectors = kImages * Patch::kRows * Patch::kVectors;
    constexpr int kGroups = kVectors < kThreads ? kThreads / kVectors : 1;
    auto copy_tile = [&](int s, uint4* stage) {
        const int depth = min(slab, channels - s * slab);
        const int first_channel = (kBlocks == 0 ? 0 : blockIdx.y / kBlocks * channels) + s * slab;
#pragma unroll 1
        for (int i = threadIdx.x; i < kGroups * kVectors; i += kThreads) {
            const int vector = i % kVectors, group = i / kVectors;
            const int col = vector % Patch::kVectors, row = vector / Patch::kVectors % Patch::kRows;
            const int image = vector / (Patch::kVectors * Patch::kRows);
            const int at_image = first_image + image;
            const int at_row = first_x_row + tile_row * (kStrips * kPixels * Patch::kStepH) + row;
            const int at_col = first_x_col + tile_col * (kCols * Patch::kStepW) + col * Patch::kWide;
            if (at_image >= n || at_row < 0 || at_row >= h || at_col < 0 || at_col >= w) continue;
            const int sorted = Patch::kStepW == 1 ? col * Patch::kWide
                                                  : col % Patch::kStepW * Patch::kPhase + col / Patch::kStepW;
            const int word = image * Patch::kImage + row * Patch::kPitch + Patch::kLead + sorted;
            const long long step = static_cast<long long>(kGroups) * x_channel;
            const T* from = x + static_cast<long long>(at_image) * x_image + static_cast<long long>(at_row) * x_row +
                            at_col + static_cast<long long>(first_channel + group) * x_channel;
            float* to = reinterpret_cast<float*>(stage) + group * Patch::kChannel + word;
#pragma unroll 4
            for (int c = group; c < depth; c += kGroups) {
                copy_pixels<Patch::kWide>(to, from);
                from += step;
                to += kGroups * Patch::kChannel;
            }
        }
    };

    const int ahead = max(1, stages - 1);  // slabs under way
    dependent_launch();
    if (kSplit > 1 && threadIdx.x == 0) arrival->init();
#pragma unroll 1
    for (int i = threadIdx.x; i < kHeads; i += kThreads) copy_16(memory + 1 + i, heads + blockIdx.y * kHeads + i);
#pragma unroll 1
    for (int i = 0; i < ahead && first_slab + i < last_slab; ++i) copy_chunk(first_slab + i, stage_memory + i * stage_units);
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
#pragma unroll 1
        for (int i = threadIdx.x; i < tile_units; i += kThreads) stage_memory[stage * stage_units + i] = uint4{0, 0, 0, 0};
    }
    if constexpr (kSplit > 1) {
        cluster_sync();  // before others write here
        if (threadIdx.x == 0) arrival->expect(kInbox * 16);
    } else {
        __syncthreads();
    }
    dependent_wait();

    // ---- the sums ---------------------------------------------------------------------------------------------------
    float sums[kRows][kPixels] = {};
    int stage = 0, next_stage = 0;
    // At s, slab s is computed with and slab s + ahead begins to come.
#pragma unroll 1
    for (int s = first_slab - ahead; s < last_slab; ++s) {
        if (s >= first_slab) {
            if (ahead == 1) {
                copy_wait<0>();
            } else {
                copy_wait<1>();
            }
            __syncthreads();  // slab s is there for all, and none still reads the one before it
        }
        if (s + ahead < last_slab) {
            uint4* const target = stage_memory + next_stage * stage_units;
            if (s >= first_slab) copy_chunk(s + ahead, target);
            copy_tile(s + ahead, target);
            next_stage = next_stage + 1 == stages ? 0 : next_stage + 1;
        }
        copy_commit();
        if (s < first_slab) continue;
        const uint4* const here = stage_memory + stage * stage_units;
        stage = stage + 1 == stages ? 0 : stage + 1;
        const float* const mine = reinterpret_cast<const float*>(here) + lane_word;
        const int* const index = reinterpret_cast<const int*>(here + tile_units);
        if constexpr (kTaps) {
            constexpr int kNext = kPixelRows * Patch::kStepH * Patch::kPitch;  // floats from pixel to pixel
            constexpr int kUnroll = kPixels <= 2 ? 4 : 2;
            const uint4* const pairs = here + tile_units + (kPositions + 1 + 3) / 4;
            auto add = [&](float (&sum)[kPixels], float weight, unsigned place) {
                const float* const pixel = reinterpret_cast<const float*>(reinterpret_cast<const char*>(mine) + place);
#pragma unroll
                for (int i = 0; i < kPixels; ++i) sum[i] = fmaf(weight, pixel[i * kNext], sum[i]);
            };
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int position = r * kWarps + warp;
                int left = index[position + 1] - index[position];
                unsigned pair = shared_address(pairs + index[position]);
                uint4 next = load_early(pair);  // there is something to read behind the last one
#pragma unroll kUnroll
                for (; left > 0; --left) {
                    const uint4 now = next;
                    next = load_early(pair += 16);
                    add(sums[r], __uint_as_float(now.x), now.y);
                    add(sums[r], __uint_as_float(now.z), now.w);
                }
            }
        } else {
            const uint2* const records = reinterpret_cast<const uint2*>(here + tile_units + (kWarps + 3) / 4);
            __syncwarp();
            run_program<kRows, kPixels, Patch::kStepH, Patch::kPitch>(sums, records + index[warp], mine);
        }
    }

    // ---- what they become -------------------------------------------------------------------------------------------
    const int image = first_image + lane_image, col = tile_col * kCols + lane_col;
    const int row = tile_row * (kStrips * kPixels) + strip * kStripRows;
    const int rows_left = lane == used && image < n && col < q ? p - row : 0;
    const long long y_step = static_cast<long long>(y_row) * kPixelRows;
    const long long r_step = static_cast<long long>(r_row) * kPixelRows;
    T* const out = y + static_cast<long long>(image) * y_image + static_cast<long long>(row) * y_row + col;
    const T* const more = residual + static_cast<long long>(image) * r_image + static_cast<long long>(row) * r_row + col;
    constexpr int kCount = kSplit == 1 ? kPixels : kPiece;
    // The kCount outputs of a position from `first` on, where there are so many.
    auto write = [&](int position, int first, const float* values) {
        const Head one = head[position];
        if (one.row < 0) return;
        float extra[kCount] = {};
        if constexpr (kPlace != Residual::no) {
            const T* from = more + static_cast<long long>(one.row) * r_channel + first * r_step;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                if (first + i < kPixels && (first + i) * kPixelRows < rows_left) extra[i] = to_float(*from);
                from += r_step;
            }
        }
        T* to = out + static_cast<long long>(one.row) * y_channel + first * y_step;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (first + i < kPixels && (first + i) * kPixelRows < rows_left) {
                *to = from_float<T>(finish(values[i], one.bias, extra[i], kActivation, kPlace));
            }
            to += y_step;
        }
    };
    if constexpr (kSplit == 1) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) write(r * kWarps + warp, 0, sums[r]);
    } else {
        // To the block that finishes a position: from each block, its positions, pieces of them, lanes.
        constexpr int kOwned = kPositions / kSplit;
        constexpr int kLine = 32 * kPiece;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int position = r * kWarps + warp, owner = position % kSplit;
            float* const line = inbox + (rank * kOwned + position / kSplit) * (kPieces * kLine) + lane * kPiece;
            const unsigned there = peer_address(line, owner), count = peer_address(arrival, owner);
#pragma unroll
            for (int piece = 0; piece < kPieces; ++piece) {
                float values[kPiece] = {};
#pragma unroll
                for (int i = 0; i < kPiece; ++i) {
                    if (piece * kPiece + i < kPixels) values[i] = sums[r][piece * kPiece + i];
                }
                const unsigned to = there + piece * kLine * sizeof(float);
                if constexpr (kPiece == 4) {
                    push(to, float4{values[0], values[1], values[2], values[3]}, count);
                } else if constexpr (kPiece == 2) {
                    push(to, float2{values[0], values[1]}, count);
                } else {
                    push(to, values[0], count);
                }
            }
        }
        arrival->wait<true>(0);
#pragma unroll 1
        for (int i = warp; i < kOwned * kPieces; i += kWarps) {
            float values[kPiece] = {};
#pragma unroll
            for (int part = 0; part < kSplit; ++part) {
                const float* const from = inbox + (part * kOwned * kPieces + i) * kLine + lane * kPiece;
                const auto sent = Vector<float, kPiece>::load(from);
#pragma unroll
                for (int j = 0; j < kPiece; ++j) values[j] += sent[j];
            }
            write(i / kPieces * kSplit + rank, i % kPieces * kPiece, values);
        }
    }
}

}  // namespace zeroskip::escort
