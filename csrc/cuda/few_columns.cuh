// SPDX-License-Identifier: Apache-2.0
// What a block of few_columns.cu does but for multiplying: columns or a token come to shared memory, a token is quantized there,
// sums of several blocks are joined.
#pragma once

#include "column_sums.cuh"
#include "decode.cuh"
#include "launch.h"
#include "linear.h"
#include "mma.cuh"
#include "quantize.cuh"
#include "reduction.cuh"

namespace pvq::cuda {

struct FewColumns {
  Tokens tokens;  // fused: what to quantize
  Activations a;  // else: quantized columns
  Weight weight;
  Output output;
  Scratch scratch;
  int num_tiles, tiles_per_block, chunks_per_split;
  int num_columns, stored_columns;  // stored: of a chunk in shared memory, 1, 2, 4 or a multiple of 8
  int sum_stride;                   // words from one column's sums to the next one's
  int token_offset;                 // fused: of the token in shared memory, in bytes from its quantized columns
};

using FewColumnsFacts = ColumnFacts<kMaxFewColumns>;

// Columns of the split's chunks to shared memory, as they lie in global memory (layout.h): [chunk][stored_columns][128].
__device__ __forceinline__ void copy_columns(const FewColumns& p, int first_chunk, int num_chunks, char* to, int num_threads) {
  const int padded = static_cast<int>(p.a.padded_columns), units = p.stored_columns * 8;
  const std::int8_t* from = p.a.data + static_cast<std::int64_t>(first_chunk) * padded * kChunkColumns;
  const int skipped = (padded - p.stored_columns) * 8, shift = __ffs(units) - 1;  // units: a power of two where some are skipped
#pragma unroll 1
  for (int i = threadIdx.x; i < num_chunks * units; i += num_threads)
    copy_async_16(to + 16 * i, from + 16 * static_cast<std::int64_t>(i + (skipped == 0 ? 0 : (i >> shift) * skipped)));
}

// The token to shared memory, as it is in global memory.
__device__ __forceinline__ void copy_token(const FewColumns& p, char* to, int num_threads) {
  const int units = static_cast<int>(p.tokens.in_features) / (p.tokens.dtype == DType::kFloat32 ? 4 : 8);
#pragma unroll 1
  for (int i = threadIdx.x; i < units; i += num_threads)
    copy_async_16(to + 16 * i, static_cast<const char*>(p.tokens.x) + 16 * static_cast<std::int64_t>(i));
}

// Quantize the token; the split's chunks go to shared memory as copy_columns would put them.
template <int kThreads>
__device__ __forceinline__ void quantize_token(const FewColumns& p, int first_chunk, int num_chunks, char* activations,
                                               FewColumnsFacts& facts, std::uint32_t* warp_largest) {
  const int num_planes = p.tokens.num_planes;
  const int groups = static_cast<int>(p.tokens.in_features) / 8, padded_groups = static_cast<int>(p.weight.num_chunks) * 16;
  const DType dtype = p.tokens.dtype;
  const char* token = activations + p.token_offset;
  const auto read = [token, dtype](int group, float (&v)[8]) {
    if (dtype == DType::kBFloat16)
      widen_eight<DType::kBFloat16>(reinterpret_cast<const std::uint16_t*>(token) + 8 * group, v);
    else if (dtype == DType::kFloat16)
      widen_eight<DType::kFloat16>(reinterpret_cast<const std::uint16_t*>(token) + 8 * group, v);
    else
      widen_eight<DType::kFloat32>(reinterpret_cast<const float*>(token) + 8 * group, v);
  };
  if (threadIdx.x < 2) facts.sums[threadIdx.x] = 0;
  const std::uint32_t largest = largest_of_threads(largest_magnitude<false, kThreads>(groups, RotatedColumns{}, read),
                                                   threadIdx.x, kThreads, warp_largest, [] { __syncthreads(); });
  const TokenScale scale(largest, num_planes, p.tokens.scale_constant);
  std::int32_t sums[2] = {};
  quantize_columns<false, kThreads>(groups, padded_groups, RotatedColumns{}, read, scale, num_planes, sums,
                                    [&](int plane, int group, std::uint32_t low, std::uint32_t high) {
                                      const int chunk = (group >> 4) - first_chunk;
                                      if (chunk < 0 || chunk >= num_chunks) return;
                                      const int unit = (group >> 1 & 6) ^ plane;
                                      char* to =
                                          activations + (chunk * p.stored_columns + plane) * kChunkColumns + 4 * (group & 3);
                                      *reinterpret_cast<std::uint32_t*>(to + 16 * unit) = low;
                                      *reinterpret_cast<std::uint32_t*>(to + 16 * (unit ^ 1)) = high;
                                    });
  add_sums(sums, num_planes, facts.sums);
  if (threadIdx.x == 0) facts.scales[0] = scale.token_scale;
}

// Blocks that share rows leave their sums in `partial`; the last of them adds all up. True in the last one.
template <int kThreads>
__device__ __forceinline__ bool join_splits(const FewColumns& p, std::int32_t* sums, int count) {
  __shared__ bool last;
  const int splits = gridDim.y;
  std::int32_t* slot = p.scratch.partial + static_cast<std::int64_t>(blockIdx.x) * splits * count;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) __stcg(slot + blockIdx.y * count + i, sums[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(p.scratch.counters + blockIdx.x, 1) == splits - 1;
    if (last) p.scratch.counters[blockIdx.x] = 0;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    std::int32_t sum = 0;
    for (int s = 0; s < splits; ++s) sum += __ldcg(slot + s * count + i);
    sums[i] = sum;
  }
  __syncthreads();
  return true;
}

}  // namespace pvq::cuda
