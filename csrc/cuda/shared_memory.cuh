// SPDX-License-Identifier: Apache-2.0
// Shared memory by 32-bit addresses, which the compiler takes for what they are: not for pointers to any memory.
#pragma once

#include <cstdint>

namespace pvq::cuda {

__device__ __forceinline__ std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ std::uint32_t shared_word(std::uint32_t address) {
  std::uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}

__device__ __forceinline__ uint2 shared_pair(std::uint32_t address) {
  uint2 pair;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(pair.x), "=r"(pair.y) : "r"(address));
  return pair;
}

__device__ __forceinline__ int4 shared_quad(std::uint32_t address) {
  int4 quad;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(quad.x), "=r"(quad.y), "=r"(quad.z), "=r"(quad.w)
               : "r"(address)
               : "memory");
  return quad;
}

__device__ __forceinline__ void store_shared(std::uint32_t address, int4 quad) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(quad.x), "r"(quad.y), "r"(quad.z), "r"(quad.w)
               : "memory");
}

// An assignment of what shared_quad() returns became four stores (nvcc 13.0).
__device__ __forceinline__ void store_global(void* address, int4 quad) {
  asm volatile("st.global.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(quad.x), "r"(quad.y), "r"(quad.z), "r"(quad.w)
               : "memory");
}

}  // namespace pvq::cuda
