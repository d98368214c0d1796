// Loads that happen under a condition, as one predicated instruction each.
//
// Around an ordinary load the compiler may branch, and then computes its address anew behind every branch.  In order with
// dependent_wait() (both are volatile).
#pragma once

namespace zeroskip::depthwise {

// `to` becomes what lies `Offset` bytes after `from` in global memory if `there`, else it stays.
template <int Offset>
__device__ __forceinline__ void load_if(bool there, const void* from, unsigned short& to) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %1, 0; @p ld.global.u16 %0, [%2 + %3]; }"
                 : "+h"(to)
                 : "r"(static_cast<int>(there)), "l"(__cvta_generic_to_global(from)), "n"(Offset));
}
template <int Offset>
__device__ __forceinline__ void load_if(bool there, const void* from, unsigned int& to) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %1, 0; @p ld.global.u32 %0, [%2 + %3]; }"
                 : "+r"(to)
                 : "r"(static_cast<int>(there)), "l"(__cvta_generic_to_global(from)), "n"(Offset));
}
template <int Offset>
__device__ __forceinline__ void load_if(bool there, const void* from, uint2& to) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.v2.u32 {%0, %1}, [%3 + %4]; }"
                 : "+r"(to.x), "+r"(to.y)
                 : "r"(static_cast<int>(there)), "l"(__cvta_generic_to_global(from)), "n"(Offset));
}
template <int Offset>
__device__ __forceinline__ void load_if(bool there, const void* from, uint4& to) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %4, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%5 + %6]; }"
                 : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
                 : "r"(static_cast<int>(there)), "l"(__cvta_generic_to_global(from)), "n"(Offset));
}

}  // namespace zeroskip::depthwise
