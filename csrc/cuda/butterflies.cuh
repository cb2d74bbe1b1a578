// SPDX-License-Identifier: Apache-2.0
// Butterflies of the rotation (format.md §5) in registers, and a rotation that needs nothing else: blocks of a power of two
// columns that a warp holds, eight or 32 columns a lane.
#pragma once

#include <cstdint>

#include "linear.h"

namespace pvq::cuda {

template <int kRadix>
__device__ __forceinline__ void butterflies(float (&v)[kRadix]) {
#pragma unroll
  for (int h = 1; h < kRadix; h *= 2)
#pragma unroll
    for (int i = 0; i < kRadix; ++i)
      if ((i & h) == 0) {
        const float a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
}

// The strides kColumns, 2 kColumns, ... of a power of two columns that `lanes` neighbours hold, kColumns each.
template <int kColumns>
__device__ __forceinline__ void lane_butterflies(float (&v)[kColumns], int lane, int lanes) {
#pragma unroll 1
  for (int mask = 1; mask < lanes; mask *= 2) {
    const float sign = (lane & mask) != 0 ? -1.0f : 1.0f;  // times +-1 is exact, so each step is rounded once
#pragma unroll
    for (int i = 0; i < kColumns; ++i) v[i] = __fmaf_rn(v[i], sign, __shfl_xor_sync(0xffffffffu, v[i], mask));
  }
}

__device__ __forceinline__ float flip_sign(float value, std::uint32_t bit_in_front) {  // by the top bit of the word
  return __uint_as_float(__float_as_uint(value) ^ (bit_in_front & 0x80000000u));
}

// H s x of the columns of the lanes of a warp, which follow each other; kColumns, at most `width`, in each. bits: their signs,
// set for -1.
template <int kColumns>
__device__ __forceinline__ void rotate_in_warp(float (&v)[kColumns], std::uint32_t bits, int lane, int width) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) v[i] = flip_sign(v[i], bits << (31 - i));
  butterflies(v);
  lane_butterflies(v, lane, width / kColumns);
}

// Rotated columns in shared memory: units of four, so that eights that lanes write and read one after another meet no bank twice.
__host__ __device__ constexpr int eight_slot(int group, int half) { return (2 * group + half) ^ (group >> 2 & 1); }

}  // namespace pvq::cuda
