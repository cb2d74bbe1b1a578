// SPDX-License-Identifier: Apache-2.0
// Quantization of a token (format.md §6), eight columns at a time, with no rotation or one inside of warps. Where a block goes
// over a token twice, for the largest magnitude and to quantize, a thread sees the same columns both times.
#pragma once

#include <cstdint>

#include "butterflies.cuh"
#include "element.cuh"
#include "linear.h"

namespace pvq::cuda {

struct RotatedColumns {  // in shared memory; none: nullptr
  const std::uint32_t* signs;
  float4* values;  // [in_features / 4], by eight_slot
  int width;       // of a block of the rotation

  __device__ __forceinline__ void load(int group, float (&v)[8]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 four = values[eight_slot(group, half)];
      v[4 * half] = four.x, v[4 * half + 1] = four.y, v[4 * half + 2] = four.z, v[4 * half + 3] = four.w;
    }
  }
  __device__ __forceinline__ void store(int group, const float (&v)[8]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      values[eight_slot(group, half)] = make_float4(v[4 * half], v[4 * half + 1], v[4 * half + 2], v[4 * half + 3]);
  }
};

// `largest` becomes the largest magnitude so far, NaN if there is one: its bits, and those of an infinity, are larger than any
// number's.
template <int kColumns>
__device__ __forceinline__ void raise(float& largest, const float (&v)[kColumns]) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(v[i])));
}

// store(plane, low, high) gets columns 0-3 and 4-7. Adds the activations of each plane to `sums`.
template <typename Store>
__device__ __forceinline__ void quantize_eight(const float (&v)[8], const TokenScale& scale, int num_planes,
                                               std::int32_t (&sums)[2], const Store& store) {
  const QuantizedQuad low = quantize_quad(v, scale, num_planes), high = quantize_quad(v + 4, scale, num_planes);
  store(0, low.high, high.high);
  sums[0] = __dp4a(static_cast<int>(low.high), 0x01010101, __dp4a(static_cast<int>(high.high), 0x01010101, sums[0]));
  if (num_planes == 2) {
    store(1, low.low, high.low);
    sums[1] = __dp4a(static_cast<int>(low.low), 0x01010101, __dp4a(static_cast<int>(high.low), 0x01010101, sums[1]));
  }
}

// Bits of the largest magnitude among this thread's columns, rotated if kRotated. read(group, v) reads eight columns of the
// token. Called by whole warps.
template <bool kRotated, int kThreads, typename Read>
__device__ __forceinline__ std::uint32_t largest_magnitude(int num_groups, const RotatedColumns& rotated, const Read& read) {
  float largest = 0;
#pragma unroll 1
  for (int group = threadIdx.x; group < (num_groups + 31) / 32 * 32; group += kThreads) {
    float v[8] = {};
    const bool exists = group < num_groups;
    if (exists) read(group, v);
    if constexpr (kRotated) {
      const std::uint32_t bits = exists ? rotated.signs[group / 4] >> (8 * (group & 3)) : 0;
      rotate_in_warp(v, bits, threadIdx.x & 31, rotated.width);
      if (exists) rotated.store(group, v);
    }
    raise(largest, v);
  }
  return __float_as_uint(largest);
}

// Quantize this thread's columns, and zeros up to `padded_groups`: store(plane, group, low, high).
template <bool kRotated, int kThreads, typename Read, typename Store>
__device__ __forceinline__ void quantize_columns(int num_groups, int padded_groups, const RotatedColumns& rotated,
                                                 const Read& read, const TokenScale& scale, int num_planes,
                                                 std::int32_t (&sums)[2], const Store& store) {
#pragma unroll 1
  for (int group = threadIdx.x; group < padded_groups; group += kThreads) {
    float v[8] = {};
    if (group < num_groups) {
      if constexpr (kRotated)
        rotated.load(group, v);
      else
        read(group, v);
    }
    quantize_eight(v, scale, num_planes, sums,
                   [&](int plane, std::uint32_t low, std::uint32_t high) { store(plane, group, low, high); });
  }
}

}  // namespace pvq::cuda
