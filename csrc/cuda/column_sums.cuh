// SPDX-License-Identifier: Apache-2.0
// Sums of a block in shared memory, [column][stride] with the rows next to each other, to outputs. A stride of 4 more than a
// multiple of 16 meets no bank conflict, neither by rows nor by the fragments of mma.m16n8k32.
#pragma once

#include "finish.cuh"

namespace pvq::cuda {

template <int kColumns>
struct ColumnFacts {  // what finishing needs of the activations, in shared memory
  std::int32_t sums[kColumns];
  float scales[kColumns];  // of tokens
};

constexpr std::int64_t column_stride(std::int64_t rows) { return (rows + 15) / 16 * 16 + 4; }

// Adds a lane's fragment of 16 rows and eight columns, of which those from `num_columns` on are left out.
__device__ __forceinline__ void add_fragment(std::int32_t* sums, int stride, int first_row, int first_column, int num_columns,
                                             int lane, const std::int32_t (&fragment)[4]) {
  const int column = first_column + 2 * (lane & 3);
  std::int32_t* to = sums + column * stride + first_row + (lane >> 2);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (column + (i & 1) < num_columns) atomicAdd(to + (i & 1) * stride + (i >> 1) * 8, fragment[i]);
}

// The first of several fragments of the same place; all its columns exist in `sums`.
__device__ __forceinline__ void store_fragment(std::int32_t* sums, int stride, int first_row, int first_column, int lane,
                                               const std::int32_t (&fragment)[4]) {
  std::int32_t* to = sums + (first_column + 2 * (lane & 3)) * stride + first_row + (lane >> 2);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[(i & 1) * stride + (i >> 1) * 8] = fragment[i];
}

template <typename T, typename Facts>
__device__ __forceinline__ void store_typed(const Output& output, CodebookId codebook, const std::int32_t* sums, int stride,
                                            int first_row, int num_rows, int num_tokens, int num_planes, const Facts& facts,
                                            const float* row_scale, int num_threads) {
  const int half_offset = codebook == CodebookId::kInt8 ? 0 : 1;
  // As many tokens at once as there are threads for.
  const int lanes = min(num_threads, (num_rows + 31) / 32 * 32), at_once = num_threads / lanes;
  const int first_token = threadIdx.x / lanes;
  if (first_token >= at_once) return;
  const T* bias = output.bias == nullptr ? nullptr : static_cast<const T*>(output.bias) + first_row;
#pragma unroll 1
  for (int row = threadIdx.x - first_token * lanes; row < num_rows; row += lanes) {
    const float scale = row_scale[row];
#pragma unroll 1
    for (int token = first_token; token < num_tokens; token += at_once) {
      const int column = token * num_planes;
      const std::int32_t* sum = sums + column * stride + row;
      float value = plane_value(sum[0], facts.sums[column], half_offset);
      if (num_planes == 2) value = join_planes(value, plane_value(sum[stride], facts.sums[column + 1], half_offset));
      T* y = static_cast<T*>(output.y) + token * output.stride + first_row;
      y[row] = finish_value<T>(value, scale, facts.scales[token], bias, row);
    }
  }
}

// All tokens of rows first_row .. + num_rows, by the first `num_threads` threads of the block. row_scale: of these rows.
template <typename Facts>
__device__ __forceinline__ void store_outputs(const Output& output, CodebookId codebook, const std::int32_t* sums, int stride,
                                              int first_row, int num_rows, int num_tokens, int num_planes, const Facts& facts,
                                              const float* row_scale, int num_threads) {
  if (output.dtype == DType::kBFloat16)
    store_typed<__nv_bfloat16>(output, codebook, sums, stride, first_row, num_rows, num_tokens, num_planes, facts, row_scale,
                               num_threads);
  else if (output.dtype == DType::kFloat16)
    store_typed<__half>(output, codebook, sums, stride, first_row, num_rows, num_tokens, num_planes, facts, row_scale,
                        num_threads);
  else
    store_typed<float>(output, codebook, sums, stride, first_row, num_rows, num_tokens, num_planes, facts, row_scale,
                       num_threads);
}

}  // namespace pvq::cuda
