// SPDX-License-Identifier: Apache-2.0
// The last step of format.md §7: exact integer sums to the output type. No fused multiply-add: the intrinsics round each step.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "linear.h"

namespace pvq::cuda {

template <typename T>
struct OutputType;
template <>
struct OutputType<float> {
  __device__ static float widen(float v) { return v; }
  __device__ static float narrow(float v) { return v; }
};
template <>
struct OutputType<__half> {
  __device__ static float widen(__half v) { return __half2float(v); }
  __device__ static __half narrow(float v) { return __float2half_rn(v); }
};
template <>
struct OutputType<__nv_bfloat16> {
  __device__ static float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  __device__ static __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
};

// 2 sum q a + h sum a, as a float. half_offset: h.
__device__ __forceinline__ float plane_value(std::int32_t sum, std::int32_t column_sum, int half_offset) {
  return __int2float_rn(2 * sum + half_offset * column_sum);
}

// a16: the value of the high plane and of the low one.
__device__ __forceinline__ float join_planes(float high, float low) { return __fadd_rn(__fmul_rn(high, 256.0f), low); }

// The output of one row and token before the bias.
__device__ __forceinline__ float scale_value(float value, float row_scale, float token_scale) {
  return __fmul_rn(__fmul_rn(value, __fmul_rn(row_scale, 0.5f)), token_scale);
}

template <typename T>
__device__ __forceinline__ T finish_value(float value, float row_scale, float token_scale, const T* bias, std::int64_t row) {
  float scaled = scale_value(value, row_scale, token_scale);
  if (bias != nullptr) scaled = __fadd_rn(scaled, OutputType<T>::widen(bias[row]));
  return OutputType<T>::narrow(scaled);
}

}  // namespace pvq::cuda
