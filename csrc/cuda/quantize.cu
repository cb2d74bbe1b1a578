// SPDX-License-Identifier: Apache-2.0
// Quantization of tokens that need no rotation: one block a token.
#include "launch.h"
#include "linear.h"
#include "quantize.cuh"

namespace pvq::cuda {
namespace {

constexpr int kThreads = 512;  // of 32 registers: fits beside a block of few_columns.cu

struct Parameters {
  Tokens tokens;
  Activations out;
};

template <DType kType>
__global__ void __launch_bounds__(kThreads, 4) quantize_kernel(const __grid_constant__ Parameters p) {
  __shared__ std::uint32_t warp_largest[kThreads / 32];
  __shared__ std::int32_t totals[2];
  launch_dependents();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, num_planes = p.tokens.num_planes;
  const std::int64_t token = blockIdx.x;
  const int groups = static_cast<int>(p.tokens.in_features) / 8, padded_groups = static_cast<int>(p.out.num_chunks) * 16;
  const Element<kType>* x = static_cast<const Element<kType>*>(p.tokens.x) + token * p.tokens.in_features;
  if (threadIdx.x < 2) totals[threadIdx.x] = 0;
  wait_for_dependencies();
  std::uint32_t largest = largest_magnitude<kType>(x, groups, threadIdx.x, kThreads);
  largest = __reduce_max_sync(0xffffffffu, largest);
  if (lane == 0) warp_largest[warp] = largest;
  __syncthreads();
  largest = __reduce_max_sync(0xffffffffu, lane < kThreads / 32 ? warp_largest[lane] : 0u);
  const TokenScale scale(largest, num_planes, p.tokens.scale_constant);
  std::int32_t sums[2] = {};
  quantize_groups<kType>(x, groups, padded_groups, threadIdx.x, kThreads, scale, num_planes, sums,
                         [&](int plane, int group, std::uint32_t low, std::uint32_t high) {
                           const std::int64_t column = token * num_planes + plane;
                           std::int8_t* to = p.out.data + activation_offset(8 * group, column, p.out.padded_columns);
                           *reinterpret_cast<std::uint32_t*>(to) = low;
                           to = p.out.data + activation_offset(8 * group + 4, column, p.out.padded_columns);
                           *reinterpret_cast<std::uint32_t*>(to) = high;
                         });
  for (int plane = 0; plane < num_planes; ++plane) {
    const std::int32_t sum = __reduce_add_sync(0xffffffffu, sums[plane]);
    if (lane == 0) atomicAdd(&totals[plane], sum);
  }
  __syncthreads();
  if (threadIdx.x < num_planes) p.out.sums[token * num_planes + threadIdx.x] = totals[threadIdx.x];
  if (threadIdx.x == 0) p.out.token_scale[token] = scale.token_scale;
}

}  // namespace

void quantize(const Tokens& tokens, const Activations& out, cudaStream_t stream) {
  const Parameters p{tokens, out};
  const dim3 grid(static_cast<unsigned>(tokens.num_tokens));
  if (tokens.dtype == DType::kBFloat16)
    launch(quantize_kernel<DType::kBFloat16>, grid, dim3(kThreads), 0, stream, p);
  else if (tokens.dtype == DType::kFloat16)
    launch(quantize_kernel<DType::kFloat16>, grid, dim3(kThreads), 0, stream, p);
  else
    launch(quantize_kernel<DType::kFloat32>, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace pvq::cuda
