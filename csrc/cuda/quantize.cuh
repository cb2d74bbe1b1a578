// SPDX-License-Identifier: Apache-2.0
// Quantization of a token that needs no rotation (format.md §6), eight columns at a time and straight from global memory: once
// for the largest magnitude, once more, from a cache, to quantize.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "element.cuh"
#include "linear.h"

namespace pvq::cuda {

// Bits of the largest magnitude among the groups first, first + stride, ... of eight columns: as a float, and so that an infinity
// or NaN among them is largest.
template <DType kType>
__device__ __forceinline__ std::uint32_t largest_magnitude(const Element<kType>* x, int num_groups, int first, int stride) {
  constexpr int kWords = sizeof(Element<kType>) * 8 / 16;
  std::uint32_t largest = 0;  // magnitudes are ordered as their bits are, in every type
#pragma unroll 1
  for (int j = first; j < num_groups; j += stride) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(x + 8 * j) + w);
      const std::uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kType == DType::kFloat32) {
          largest = max(largest, word[i] & 0x7fffffffu);
        } else {
          largest = max(largest, max(word[i] & 0x7fffu, word[i] >> 16 & 0x7fffu));
        }
      }
    }
  }
  if constexpr (kType == DType::kFloat32) return largest;
  return __float_as_uint(widen<kType>(static_cast<Element<kType>>(largest)));
}

// Quantize the groups first, first + stride, ... below `padded_groups`, zeros from num_groups on; store(plane, group, low, high)
// gets columns 0-3 and 4-7 of a group. Adds the activations of each plane to `sums`.
template <DType kType, typename Store>
__device__ __forceinline__ void quantize_groups(const Element<kType>* x, int num_groups, int padded_groups, int first, int stride,
                                                const TokenScale& scale, int num_planes, std::int32_t (&sums)[2], Store store) {
#pragma unroll 1
  for (int j = first; j < padded_groups; j += stride) {
    QuantizedQuad low{0, 0}, high{0, 0};
    if (j < num_groups) {
      float v[8];
      widen_eight<kType>(x + 8 * j, v);
      low = quantize_quad(v, scale, num_planes);
      high = quantize_quad(v + 4, scale, num_planes);
    }
    store(0, j, low.high, high.high);
    sums[0] = __dp4a(static_cast<int>(low.high), 0x01010101, __dp4a(static_cast<int>(high.high), 0x01010101, sums[0]));
    if (num_planes == 2) {
      store(1, j, low.low, high.low);
      sums[1] = __dp4a(static_cast<int>(low.low), 0x01010101, __dp4a(static_cast<int>(high.low), 0x01010101, sums[1]));
    }
  }
}

}  // namespace pvq::cuda
