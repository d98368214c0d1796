// A program of windows and weights (pack/stretched_chunks.py), run by one warp.
//
// A window is a column of neighbouring input pixels in registers: what one kernel column meets in one input channel, for
// all output pixels of a thread and all kernel rows.  A weight then costs one multiply-add for each output pixel and no
// load, and the output channels of the warp share the window.  Which output channel and kernel row a weight is for
// decides which registers it takes, so there is a piece of code for each, and each step of the program jumps to the next
// one's.  Where to, the record before said, so that the address is known when the multiply-adds begin.
//
// All lanes take every jump together.  A step of 14 multiply-adds is 20 instructions.  In PTX, because CUDA C++ has no
// computed goto: it makes a tree of branches of a switch.
#pragma once

#include <zeroskip/copy.cuh>

namespace zeroskip::escort {

// A step: fetch the record after the next one, work, go to the next one.
#define ESCORT_FETCH "ld.shared.v2.b32 {fetched, after}, [record];\n add.u32 record, record, 8;\n"
#define ESCORT_GO "mov.b32 payload, fetched;\n mov.u32 code, next;\n mov.u32 next, after;\n brx.idx.uni code, steps;\n"
#define ESCORT_ADD(label, ...) #label ":\n" ESCORT_FETCH "mov.b32 weight, payload;\n" __VA_ARGS__ ESCORT_GO
#define ESCORT_FMA(sum, pixel) "fma.rn.f32 %" #sum ", weight, x" #pixel ", %" #sum ";\n"
#define ESCORT_FMA_7(s0, s1, s2, s3, s4, s5, s6, x0, x1, x2, x3, x4, x5, x6)                               \
    ESCORT_FMA(s0, x0) ESCORT_FMA(s1, x1) ESCORT_FMA(s2, x2) ESCORT_FMA(s3, x3)                             \
    ESCORT_FMA(s4, x4) ESCORT_FMA(s5, x5) ESCORT_FMA(s6, x6)
#define ESCORT_FMAS(...) ESCORT_FMA_7(__VA_ARGS__)  // once its arguments are numbers

// The 112 sums of a thread in sevens, and the pixels of a window that seven outputs meet: from one on, or every other.
#define ESCORT_S0 0, 1, 2, 3, 4, 5, 6
#define ESCORT_S1 7, 8, 9, 10, 11, 12, 13
#define ESCORT_S2 14, 15, 16, 17, 18, 19, 20
#define ESCORT_S3 21, 22, 23, 24, 25, 26, 27
#define ESCORT_S4 28, 29, 30, 31, 32, 33, 34
#define ESCORT_S5 35, 36, 37, 38, 39, 40, 41
#define ESCORT_S6 42, 43, 44, 45, 46, 47, 48
#define ESCORT_S7 49, 50, 51, 52, 53, 54, 55
#define ESCORT_S8 56, 57, 58, 59, 60, 61, 62
#define ESCORT_S9 63, 64, 65, 66, 67, 68, 69
#define ESCORT_S10 70, 71, 72, 73, 74, 75, 76
#define ESCORT_S11 77, 78, 79, 80, 81, 82, 83
#define ESCORT_S12 84, 85, 86, 87, 88, 89, 90
#define ESCORT_S13 91, 92, 93, 94, 95, 96, 97
#define ESCORT_S14 98, 99, 100, 101, 102, 103, 104
#define ESCORT_S15 105, 106, 107, 108, 109, 110, 111
#define ESCORT_X0 0, 1, 2, 3, 4, 5, 6
#define ESCORT_X1 1, 2, 3, 4, 5, 6, 7
#define ESCORT_X2 2, 3, 4, 5, 6, 7, 8
#define ESCORT_X7 7, 8, 9, 10, 11, 12, 13
#define ESCORT_X8 8, 9, 10, 11, 12, 13, 14
#define ESCORT_X9 9, 10, 11, 12, 13, 14, 15
#define ESCORT_Y0 0, 2, 4, 6, 8, 10, 12
#define ESCORT_Y1 1, 3, 5, 7, 9, 11, 13
#define ESCORT_Y2 2, 4, 6, 8, 10, 12, 14

// The code of one output channel, a piece for each kernel row: of 14 pixels, of 7, of 7 with vertical stride 2.
#define ESCORT_TALL(g, low, high)                                                  \
    ESCORT_ADD(A##g##_0, ESCORT_FMAS(low, ESCORT_X0) ESCORT_FMAS(high, ESCORT_X7)) \
    ESCORT_ADD(A##g##_1, ESCORT_FMAS(low, ESCORT_X1) ESCORT_FMAS(high, ESCORT_X8)) \
    ESCORT_ADD(A##g##_2, ESCORT_FMAS(low, ESCORT_X2) ESCORT_FMAS(high, ESCORT_X9))
#define ESCORT_FLAT(g, sums)                           \
    ESCORT_ADD(A##g##_0, ESCORT_FMAS(sums, ESCORT_X0)) \
    ESCORT_ADD(A##g##_1, ESCORT_FMAS(sums, ESCORT_X1)) \
    ESCORT_ADD(A##g##_2, ESCORT_FMAS(sums, ESCORT_X2))
#define ESCORT_SKIP(g, sums)                           \
    ESCORT_ADD(A##g##_0, ESCORT_FMAS(sums, ESCORT_Y0)) \
    ESCORT_ADD(A##g##_1, ESCORT_FMAS(sums, ESCORT_Y1)) \
    ESCORT_ADD(A##g##_2, ESCORT_FMAS(sums, ESCORT_Y2))
#define ESCORT_EIGHT(code)                                                                                    \
    code(0, ESCORT_S0, ESCORT_S1) code(1, ESCORT_S2, ESCORT_S3) code(2, ESCORT_S4, ESCORT_S5)                 \
    code(3, ESCORT_S6, ESCORT_S7) code(4, ESCORT_S8, ESCORT_S9) code(5, ESCORT_S10, ESCORT_S11)               \
    code(6, ESCORT_S12, ESCORT_S13) code(7, ESCORT_S14, ESCORT_S15)
#define ESCORT_SIXTEEN(code)                                                                                  \
    code(0, ESCORT_S0) code(1, ESCORT_S1) code(2, ESCORT_S2) code(3, ESCORT_S3) code(4, ESCORT_S4)            \
    code(5, ESCORT_S5) code(6, ESCORT_S6) code(7, ESCORT_S7) code(8, ESCORT_S8) code(9, ESCORT_S9)            \
    code(10, ESCORT_S10) code(11, ESCORT_S11) code(12, ESCORT_S12) code(13, ESCORT_S13) code(14, ESCORT_S14)  \
    code(15, ESCORT_S15)
#define ESCORT_LABELS(g) "A" #g "_0, A" #g "_1, A" #g "_2, "
#define ESCORT_LABELS_8                                                                                       \
    ESCORT_LABELS(0) ESCORT_LABELS(1) ESCORT_LABELS(2) ESCORT_LABELS(3)                                       \
    ESCORT_LABELS(4) ESCORT_LABELS(5) ESCORT_LABELS(6) ESCORT_LABELS(7)
#define ESCORT_LABELS_16                                                                                      \
    ESCORT_LABELS_8 ESCORT_LABELS(8) ESCORT_LABELS(9) ESCORT_LABELS(10) ESCORT_LABELS(11)                     \
    ESCORT_LABELS(12) ESCORT_LABELS(13) ESCORT_LABELS(14) ESCORT_LABELS(15)

// The pixels of a window, operand 114 bytes apart.
#define ESCORT_LOAD(pixel) "ld.shared.f32 x" #pixel ", [window+" #pixel "*%114];\n"
#define ESCORT_LOAD_9                                                                                         \
    ESCORT_LOAD(0) ESCORT_LOAD(1) ESCORT_LOAD(2) ESCORT_LOAD(3) ESCORT_LOAD(4) ESCORT_LOAD(5)                 \
    ESCORT_LOAD(6) ESCORT_LOAD(7) ESCORT_LOAD(8)
#define ESCORT_LOAD_15                                                                                        \
    ESCORT_LOAD_9 ESCORT_LOAD(9) ESCORT_LOAD(10) ESCORT_LOAD(11) ESCORT_LOAD(12) ESCORT_LOAD(13) ESCORT_LOAD(14)
#define ESCORT_LOAD_16 ESCORT_LOAD_15 ESCORT_LOAD(15)

// Operands: the sums, the first record, what the lane meets at place 0, the pitch.
#define ESCORT_PROGRAM(labels, code, loads)                                                                   \
    "{\n .reg .f32 weight, x<16>;\n .reg .b32 payload, fetched;\n .reg .u32 record, window, code, next, after;\n"  \
    "steps: .branchtargets " labels "W, E;\n"                                                                 \
    "mov.u32 record, %112;\n ld.shared.v2.b32 {payload, code}, [record];\n"                                   \
    "ld.shared.v2.b32 {payload, next}, [record+8];\n add.u32 record, record, 16;\n brx.idx.uni code, steps;\n" \
    code "W:\n" ESCORT_FETCH "add.u32 window, payload, %113;\n" loads ESCORT_GO "E:\n}\n"
#define ESCORT_SUM(i) "+f"(sums[i / kPixels][i % kPixels])
#define ESCORT_SUM_7(a, b, c, d, e, f, g)                                                                     \
    ESCORT_SUM(a), ESCORT_SUM(b), ESCORT_SUM(c), ESCORT_SUM(d), ESCORT_SUM(e), ESCORT_SUM(f), ESCORT_SUM(g)
#define ESCORT_SUMS(...) ESCORT_SUM_7(__VA_ARGS__)
#define ESCORT_ALL_SUMS                                                                                       \
    ESCORT_SUMS(ESCORT_S0), ESCORT_SUMS(ESCORT_S1), ESCORT_SUMS(ESCORT_S2), ESCORT_SUMS(ESCORT_S3),           \
    ESCORT_SUMS(ESCORT_S4), ESCORT_SUMS(ESCORT_S5), ESCORT_SUMS(ESCORT_S6), ESCORT_SUMS(ESCORT_S7),           \
    ESCORT_SUMS(ESCORT_S8), ESCORT_SUMS(ESCORT_S9), ESCORT_SUMS(ESCORT_S10), ESCORT_SUMS(ESCORT_S11),         \
    ESCORT_SUMS(ESCORT_S12), ESCORT_SUMS(ESCORT_S13), ESCORT_SUMS(ESCORT_S14), ESCORT_SUMS(ESCORT_S15)
#define ESCORT_RUN(labels, code, loads)                                                                       \
    asm volatile(ESCORT_PROGRAM(labels, code, loads) : ESCORT_ALL_SUMS                                        \
                 : "r"(shared_address(program)), "r"(shared_address(lane)), "n"(4 * kPitch)                   \
                 : "memory")

// Adds to `sums` what a program gives: of kRows output channels and kPixels outputs of each below each other, for kernels
// of three rows and a vertical stride of kStep.
//   program   its first record, in shared memory
//   lane      what the lane meets at place 0 of the tile, whose rows are kPitch floats apart
template <int kRows, int kPixels, int kStep, int kPitch>
__device__ __forceinline__ void run_program(float (&sums)[kRows][kPixels], const uint2* program, const float* lane) {
    static_assert((kRows == 8 && kPixels == 14 && kStep == 1) || (kRows == 16 && kPixels == 7 && kStep <= 2));
    if constexpr (kPixels == 14) {
        ESCORT_RUN(ESCORT_LABELS_8, ESCORT_EIGHT(ESCORT_TALL), ESCORT_LOAD_16);
    } else if constexpr (kStep == 1) {
        ESCORT_RUN(ESCORT_LABELS_16, ESCORT_SIXTEEN(ESCORT_FLAT), ESCORT_LOAD_9);
    } else {
        ESCORT_RUN(ESCORT_LABELS_16, ESCORT_SIXTEEN(ESCORT_SKIP), ESCORT_LOAD_15);
    }
}

}  // namespace zeroskip::escort
