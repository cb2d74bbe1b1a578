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

// Byte `byte` of four words.
__device__ __forceinline__ std::uint32_t join_bytes(const std::uint32_t (&word)[4], std::uint32_t byte) {
  const std::uint32_t pair = byte | (byte + 4) << 4;
  return __byte_perm(__byte_perm(word[0], word[1], pair), __byte_perm(word[2], word[3], pair), 0x5410);
}

// 1.5 * 2^23 plus a number below 2^22 is rounded to an integer, ties to even, as rint would; its lowest bits are that integer.
// (An addition where a conversion runs at a quarter of the speed.)
__device__ __forceinline__ QuantizedQuad quantize_quad(const float* from, const TokenScale& scale, int num_planes) {
  std::uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = __float_as_uint(__fadd_rn(__fmul_rn(from[i], scale.inverse), 0x1.8p23f));
  QuantizedQuad words{0, 0};
  if (scale.zero) return words;
  words.high = join_bytes(a, 0);
  if (num_planes == 2) {  // e = 256 high + low
    words.low = words.high;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] += 128;
    words.high = join_bytes(a, 1);
  }
  return words;
}

}  // namespace pvq::cuda
