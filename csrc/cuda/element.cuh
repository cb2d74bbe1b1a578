// SPDX-License-Identifier: Apache-2.0
// Activations before and after quantization: elements of the three input types, the scale of a token, four bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "linear.h"

namespace pvq::cuda {

template <DType kType>
using Element = std::conditional_t<kType == DType::kFloat32, float, std::uint16_t>;

template <DType kType>
__device__ __forceinline__ float widen(Element<kType> bits) {
  if constexpr (kType == DType::kFloat32)
    return bits;
  else if constexpr (kType == DType::kBFloat16)
    return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
  else
    return __half2float(__ushort_as_half(bits));
}

// Eight columns from an address aligned to 16 bytes.
template <DType kType>
__device__ __forceinline__ void widen_eight(const Element<kType>* from, float (&v)[8]) {
  constexpr int kWords = sizeof(Element<kType>) * 8 / 16;
  alignas(16) Element<kType> elements[8];
#pragma unroll
  for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(elements)[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = widen<kType>(elements[i]);
}

// Scale of a token from the largest bit pattern of its magnitudes.
struct TokenScale {
  bool zero;  // all activations are 0
  float token_scale, inverse;
  __device__ __forceinline__ TokenScale(std::uint32_t largest, int num_planes, float scale_constant) {
    const float magnitude = __uint_as_float(largest);
    const bool finite = largest < 0x7f800000u;
    zero = !finite || magnitude < 0x1p-60f;
    inverse = zero ? 0.0f : __fdiv_rn(num_planes == 1 ? 127.0f : 32512.0f, magnitude);
    token_scale = !finite ? __int_as_float(0x7fc00000) : zero ? 0.0f : __fmul_rn(magnitude, scale_constant);
  }
};

struct QuantizedQuad {  // four activations of the high (or only) and of the low plane
  std::uint32_t high, low;
};

// The lowest bytes of four words.
__device__ __forceinline__ std::uint32_t low_bytes(std::int32_t a, std::int32_t b, std::int32_t c, std::int32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

__device__ __forceinline__ QuantizedQuad quantize_quad(const float* from, const TokenScale& scale, int num_planes) {
  std::int32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = scale.zero ? 0 : __float2int_rn(__fmul_rn(from[i], scale.inverse));
  QuantizedQuad words{0, 0};
  if (num_planes == 2) {
    std::int32_t high[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) high[i] = (a[i] + 128) >> 8;
    words.low = low_bytes(a[0], a[1], a[2], a[3]);  // a - 256 high, mod 256
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = high[i];
  }
  words.high = low_bytes(a[0], a[1], a[2], a[3]);
  return words;
}

}  // namespace pvq::cuda
