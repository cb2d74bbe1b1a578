// SPDX-License-Identifier: Apache-2.0
// The instructions of sm_90a that have no intrinsic: warpgroup multiplication, and what goes with it.
#pragma once

#include <cstdint>

#include "cluster.cuh"

namespace pvq::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Threads `count` (a multiple of 32) of a CTA, barrier `id` from 1 to 15.
__device__ __forceinline__ void synchronize_threads(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Registers of a thread from here on, for all warps of a warpgroup: given back to, or taken from, those of the CTA.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Warpgroup multiplication, m64nNk32 of int8. B is in shared memory, [column][128 bytes of k] with the 128-byte swizzle; A of
// multiply() too, without a swizzle.

// A: eight rows of 16 bytes lie together, 128 bytes before those of the next 16 bytes of k and 1024 before the next eight rows'.
__device__ __forceinline__ std::uint64_t plain_operand(std::uint32_t address) {
  constexpr std::uint32_t kLeading = 128 >> 4, kStride = 1024 >> 4;
  return static_cast<std::uint64_t>(kStride) << 32 | (address >> 4 & 0x3fffu) | kLeading << 16;
}

// B: at an address that is aligned to 1024 bytes but for the place in k, a multiple of 32 bytes.
__device__ __forceinline__ std::uint64_t swizzled_operand(std::uint32_t address) {
  constexpr std::uint32_t kLeading = 1;         // not used with a swizzle
  constexpr std::uint32_t kStride = 1024 >> 4;  // eight columns of 128 bytes
  constexpr std::uint32_t kSwizzle128 = 1;
  const std::uint32_t low = (address >> 4 & 0x3fffu) | kLeading << 16, high = kStride | (kSwizzle128 << 30);
  return static_cast<std::uint64_t>(high) << 32 | low;
}

// Orders register writes before the multiplications that follow.
__device__ __forceinline__ void fence_operands() { asm volatile("wgmma.fence.sync.aligned;"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;"); }

// Values of which the compiler knows no more than that they are in registers, from here on.
template <typename Value, int kCount>
__device__ __forceinline__ void pin(Value (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i]));
}

// Until at most kPending groups are in flight.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending));
}

// d += A B, [64, kN]: lane 4 g + t of warp w has rows 16 w + g, + 8 of columns 8 j + 2 t, + 1: d[4 j + 2 (+ 8) + (+ 1)].
template <int kN>
__device__ __forceinline__ void multiply(std::int32_t (&d)[kN / 2], std::uint64_t a, std::uint64_t b);

#define PVQ_D(i) "+r"(d[i])
#define PVQ_D8(i) PVQ_D(i), PVQ_D(i + 1), PVQ_D(i + 2), PVQ_D(i + 3), PVQ_D(i + 4), PVQ_D(i + 5), PVQ_D(i + 6), PVQ_D(i + 7)
#define PVQ_D32(i) PVQ_D8(i), PVQ_D8(i + 8), PVQ_D8(i + 16), PVQ_D8(i + 24)
template <>
__device__ __forceinline__ void multiply<256>(std::int32_t (&d)[128], std::uint64_t a, std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, 1;"
      : PVQ_D32(0), PVQ_D32(32), PVQ_D32(64), PVQ_D32(96)
      : "l"(a), "l"(b));
}

// With A in registers, as for mma.m16n8k32, a warp's 16 rows each.
template <int kN>
__device__ __forceinline__ void multiply_registers(std::int32_t (&d)[kN / 2], const std::uint32_t (&a)[4], std::uint64_t b);
template <>
__device__ __forceinline__ void multiply_registers<128>(std::int32_t (&d)[64], const std::uint32_t (&a)[4], std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
      "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1;"
      : PVQ_D32(0), PVQ_D32(32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
__device__ __forceinline__ void multiply_registers<256>(std::int32_t (&d)[128], const std::uint32_t (&a)[4], std::uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
      "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, "
      "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "
      "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, "
      "%118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "{%128, %129, %130, %131}, %132, 1;"
      : PVQ_D32(0), PVQ_D32(32), PVQ_D32(64), PVQ_D32(96)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef PVQ_D32
#undef PVQ_D8
#undef PVQ_D

// Matrices of 8 x 8 16-bit values, transposed on the way: lane 4 g + t holds row g, columns 2 t, 2 t + 1 of each; lanes
// 8 m .. + 7 give the addresses of the columns of matrix m (16 bytes each).
__device__ __forceinline__ void store_transposed(std::uint32_t address, std::uint32_t m0, std::uint32_t m1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(m0), "r"(m1) : "memory");
}
__device__ __forceinline__ void store_transposed(std::uint32_t address, std::uint32_t m0, std::uint32_t m1, std::uint32_t m2,
                                                 std::uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0), "r"(m1), "r"(m2),
               "r"(m3)
               : "memory");
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace pvq::cuda
