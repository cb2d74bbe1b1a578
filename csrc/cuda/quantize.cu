// SPDX-License-Identifier: Apache-2.0
// Quantization of tokens that need no rotation, or one inside of warps. All columns of a token are in registers: eight a thread
// and as many blocks of a cluster as that takes where tokens are few, 16 or 32 a thread where they are many. Where that does not
// reach, a block goes over its token twice.
#include <algorithm>

#include "cluster_exchange.cuh"
#include "launch.h"
#include "linear.h"
#include "quantize.cuh"
#include "reduction.cuh"

namespace pvq::cuda {
namespace {

constexpr int kThreads = 512;             // of 32 registers: fits beside a block of few_columns.cu
constexpr int kManyTokens = 1024;         // from which on the number of instructions counts
constexpr int kStepGroups = 4;            // eights of a step
constexpr int kSpareMultiprocessors = 4;  // that the products of usual layers leave free

struct Parameters {
  Tokens tokens;
  Activations out;
  bool waits_last;

  // Where a plane of a token is stored from `column`, a multiple of 8, on; four columns further: ^ 16 (layout.h).
  __device__ __forceinline__ std::uintptr_t place(std::int64_t token, int plane, int column) const {
    const std::int64_t first = activation_offset(column, token * tokens.num_planes, out.padded_columns);
    return reinterpret_cast<std::uintptr_t>(out.data + first + plane * kChunkColumns) ^ (16 * plane);
  }
  // Eight columns.
  __device__ __forceinline__ void store(std::int64_t token, int plane, int group, std::uint32_t low, std::uint32_t high) const {
    const std::uintptr_t to = place(token, plane, 8 * group);
    *reinterpret_cast<std::uint32_t*>(to) = low;
    *reinterpret_cast<std::uint32_t*>(to ^ 16) = high;
  }
  __device__ __forceinline__ void finish(std::int64_t token, const std::int32_t* sums, const TokenScale& scale) const {
    const int num_planes = tokens.num_planes;
    if (threadIdx.x < num_planes) out.sums[token * num_planes + threadIdx.x] = sums[threadIdx.x];
    if (threadIdx.x == 0) out.token_scale[token] = scale.token_scale;
  }
};

// `warps`: shared memory, as many words as the block has warps.
__device__ __forceinline__ std::uint32_t largest_of_block(std::uint32_t largest, std::uint32_t* warps, int num_threads) {
  return largest_of_threads(largest, threadIdx.x, num_threads, warps, [] { __syncthreads(); });
}

// Blocks of a multiprocessor, at least: that is, registers of a thread.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMostBlocks = 1536 / kThreads;  // threads of a multiprocessor there
#else
constexpr int kMostBlocks = 2048 / kThreads;
#endif
constexpr int min_blocks(int eights) { return eights == 1 ? kMostBlocks : eights == 2 ? 3 : 2; }

// kEights: of columns that a thread holds. kShared: the token is that of `cluster_size` blocks of a cluster.
template <DType kType, bool kRotated, int kEights, bool kShared>
__global__ void __launch_bounds__(kThreads, min_blocks(kEights))
    quantize_once_kernel(const __grid_constant__ Parameters p, int cluster_size) {
  __shared__ std::uint32_t warp_largest[kThreads / 32];
  [[maybe_unused]] __shared__ ClusterExchange exchange;
  __shared__ std::int32_t totals[2];
  launch_dependents();
  const int num_planes = p.tokens.num_planes, lane = threadIdx.x & 31;
  const int num_groups = static_cast<int>(p.tokens.in_features) / 8, padded_groups = static_cast<int>(p.out.num_chunks) * 16;
  const int rank = kShared ? blockIdx.x & (cluster_size - 1) : 0, first = rank * kEights * kThreads + threadIdx.x;
  const std::int64_t token = kShared ? blockIdx.x / cluster_size : blockIdx.x;
  std::uint32_t bits[kEights] = {};
  if constexpr (kRotated) {
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int group = first + e * kThreads;
      if (group < num_groups) bits[e] = __ldg(p.tokens.rotation.signs + group / 4) >> (8 * (group & 3));
    }
  }
  if (threadIdx.x < 2) totals[threadIdx.x] = 0;
  if constexpr (kShared) exchange.begin(cluster_size, num_planes);
  if (!p.waits_last) wait_for_dependencies();
  const Element<kType>* x = static_cast<const Element<kType>*>(p.tokens.x) + token * p.tokens.in_features;
  float v[kEights][8] = {}, magnitude = 0;
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int group = first + e * kThreads;
    if (group < num_groups) widen_eight<kType>(x + 8 * group, v[e]);
  }
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    if constexpr (kRotated) rotate_in_warp(v[e], bits[e], lane, p.tokens.rotation.factors[0]);
    raise(magnitude, v[e]);
  }
  std::uint32_t largest = largest_of_block(__float_as_uint(magnitude), warp_largest, kThreads);
  if constexpr (kShared) largest = exchange.largest_of_cluster(largest, cluster_size, rank);
  const TokenScale scale(largest, num_planes, p.tokens.scale_constant);
  std::int32_t sums[2] = {};
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int group = first + e * kThreads;
    if (group < padded_groups)  // zeros from num_groups on
      quantize_eight(v[e], scale, num_planes, sums,
                     [&](int plane, std::uint32_t low, std::uint32_t high) { p.store(token, plane, group, low, high); });
  }
  add_sums(sums, num_planes, totals);
  __syncthreads();
  if constexpr (kShared) exchange.add_sums(totals, cluster_size, num_planes, rank);
  if (rank == 0) p.finish(token, totals, scale);
  if (p.waits_last) wait_for_dependencies();
}

// A block a token, a step of 32 columns a thread: half of a rotation's strides between lanes stay in a lane, and a plane's
// columns are two units of 16 bytes (layout.h).
template <DType kType, bool kRotated>
__global__ void __launch_bounds__(kThreads) quantize_steps_kernel(const __grid_constant__ Parameters p) {
  __shared__ std::uint32_t warp_largest[kThreads / 32];
  __shared__ std::int32_t totals[2];
  launch_dependents();
  const int num_planes = p.tokens.num_planes, step = threadIdx.x, lane = threadIdx.x & 31;
  const int num_groups = static_cast<int>(p.tokens.in_features) / 8;
  const std::int64_t token = blockIdx.x;
  std::uint32_t bits = 0;
  if constexpr (kRotated) {
    if (kStepGroups * step < num_groups) bits = __ldg(p.tokens.rotation.signs + step);
  }
  if (threadIdx.x < 2) totals[threadIdx.x] = 0;
  if (!p.waits_last) wait_for_dependencies();
  const Element<kType>* x = static_cast<const Element<kType>*>(p.tokens.x) + token * p.tokens.in_features;
  float v[8 * kStepGroups] = {}, magnitude = 0;
#pragma unroll
  for (int g = 0; g < kStepGroups; ++g)
    if (kStepGroups * step + g < num_groups)
      widen_eight<kType>(x + 8 * (kStepGroups * step + g), *reinterpret_cast<float (*)[8]>(v + 8 * g));
  if constexpr (kRotated) rotate_in_warp(v, bits, lane, p.tokens.rotation.factors[0]);
  raise(magnitude, v);
  const std::uint32_t largest = largest_of_block(__float_as_uint(magnitude), warp_largest, static_cast<int>(blockDim.x));
  const TokenScale scale(largest, num_planes, p.tokens.scale_constant);
  std::int32_t sums[2] = {};
  if (step < kSteps * p.out.num_chunks) {    // zeros from num_groups on
    std::uint32_t words[2][2][kStepGroups];  // [plane][half]
#pragma unroll
    for (int g = 0; g < kStepGroups; ++g)
      quantize_eight(*reinterpret_cast<const float (*)[8]>(v + 8 * g), scale, num_planes, sums,
                     [&](int plane, std::uint32_t low, std::uint32_t high) {
                       words[plane][0][g] = low;
                       words[plane][1][g] = high;
                     });
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      if (plane == num_planes) break;
      const std::uintptr_t to = p.place(token, plane, 8 * kStepGroups * step);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto& unit = words[plane][half];
        *reinterpret_cast<uint4*>(to ^ (16 * half)) = make_uint4(unit[0], unit[1], unit[2], unit[3]);
      }
    }
  }
  add_sums(sums, num_planes, totals);
  __syncthreads();
  p.finish(token, totals, scale);
  if (p.waits_last) wait_for_dependencies();
}

template <DType kType, bool kRotated>
__global__ void __launch_bounds__(kThreads, kMostBlocks) quantize_twice_kernel(const __grid_constant__ Parameters p) {
  extern __shared__ float4 rotated_values[];
  __shared__ std::uint32_t warp_largest[kThreads / 32];
  __shared__ std::int32_t totals[2];
  launch_dependents();
  const int num_planes = p.tokens.num_planes;
  const std::int64_t token = blockIdx.x;
  const int num_groups = static_cast<int>(p.tokens.in_features) / 8, padded_groups = static_cast<int>(p.out.num_chunks) * 16;
  const Element<kType>* x = static_cast<const Element<kType>*>(p.tokens.x) + token * p.tokens.in_features;
  const auto read = [x](int group, float (&v)[8]) { widen_eight<kType>(x + 8 * group, v); };
  const RotatedColumns rotated{p.tokens.rotation.signs, rotated_values, p.tokens.rotation.factors[0]};
  if (threadIdx.x < 2) totals[threadIdx.x] = 0;
  if (!p.waits_last) wait_for_dependencies();
  const std::uint32_t largest =
      largest_of_block(largest_magnitude<kRotated, kThreads>(num_groups, rotated, read), warp_largest, kThreads);
  const TokenScale scale(largest, num_planes, p.tokens.scale_constant);
  std::int32_t sums[2] = {};
  quantize_columns<kRotated, kThreads>(
      num_groups, padded_groups, rotated, read, scale, num_planes, sums,
      [&](int plane, int group, std::uint32_t low, std::uint32_t high) { p.store(token, plane, group, low, high); });
  add_sums(sums, num_planes, totals);
  __syncthreads();
  p.finish(token, totals, scale);
  if (p.waits_last) wait_for_dependencies();
}

// Shared memory that a block asks for and does not use, so that a multiprocessor has no more of them than evenly spread: one that
// the product before left free would take all that it can hold, and these would be the last to end.
int spreading_bytes(const Parameters& p, int cluster_size, int most_blocks) {
  const int beside = p.out.shared_beside;
  if (beside == Activations::kUnknown || cluster_size > 2) return 0;  // larger clusters have to find room
  const DeviceProperties& device = device_properties();
  int blocks = ceil_div(p.tokens.num_tokens * cluster_size, device.num_sms);
  if (beside > 0) blocks = std::max(blocks, device.max_shared_bytes / beside);
  return blocks < most_blocks ? device.max_shared_bytes / (blocks + 1) + 512 : 0;
}

template <DType kType, bool kRotated, int kEights, bool kShared>
void run_once(const Parameters& p, int cluster_size, cudaStream_t stream) {
  const std::size_t bytes = static_cast<std::size_t>(spreading_bytes(p, cluster_size, min_blocks(kEights)));
  launch_clusters(cluster_size, true, quantize_once_kernel<kType, kRotated, kEights, kShared>,
                  dim3(static_cast<unsigned>(p.tokens.num_tokens * cluster_size)), dim3(kThreads), bytes, stream, p,
                  cluster_size);
}

template <DType kType, bool kRotated>
void run(const Parameters& p, cudaStream_t stream) {
  const std::int64_t tokens = p.tokens.num_tokens, groups = p.out.num_chunks * 16;
  const DeviceProperties& device = device_properties();
  const auto blocks = [groups](int eights) {  // that share a token
    int size = 1;
    while (size * eights * kThreads < groups) size *= 2;
    return size;
  };
  const int most = device.capability >= 90 ? kMaxClusterSize : 1;
  // Where tokens alone fill the device, an exchange between blocks costs more than it hides.
  const bool few = tokens * blocks(1) <= 2 * device.num_sms;
  const std::int64_t steps = p.out.num_chunks * kSteps;
  const bool in_steps = steps <= kThreads && (!kRotated || p.tokens.rotation.factors[0] >= 8 * kStepGroups);
  if (in_steps && !few && (tokens >= kManyTokens || blocks(2) > 1))
    return launch(quantize_steps_kernel<kType, kRotated>, dim3(static_cast<unsigned>(tokens)),
                  dim3(static_cast<unsigned>(round_up(steps, 32))), 0, stream, p);
  if (blocks(1) == 1) return run_once<kType, kRotated, 1, false>(p, 1, stream);
  // One block with 16 columns a thread is quicker than two that exchange, but its registers do not fit beside a product's block.
  const bool alone = blocks(2) == 1 && tokens <= kSpareMultiprocessors;
  if (few && !alone && blocks(1) <= most) return run_once<kType, kRotated, 1, true>(p, blocks(1), stream);
  if (blocks(2) == 1) return run_once<kType, kRotated, 2, false>(p, 1, stream);
  if (blocks(4) == 1) return run_once<kType, kRotated, 4, false>(p, 1, stream);
  if (blocks(4) <= most) return run_once<kType, kRotated, 4, true>(p, blocks(4), stream);
  launch(quantize_twice_kernel<kType, kRotated>, dim3(static_cast<unsigned>(tokens)), dim3(kThreads),
         static_cast<std::size_t>(kRotated ? 4 * p.tokens.in_features : 0), stream, p);
}

template <DType kType>
void run_type(const Parameters& p, cudaStream_t stream) {
  p.tokens.rotation.num_factors == 0 ? run<kType, false>(p, stream) : run<kType, true>(p, stream);
}

}  // namespace

void quantize(const Tokens& tokens, const Activations& out, bool waits_last, cudaStream_t stream) {
  const Parameters p{tokens, out, waits_last};
  if (tokens.dtype == DType::kBFloat16)
    run_type<DType::kBFloat16>(p, stream);
  else if (tokens.dtype == DType::kFloat16)
    run_type<DType::kFloat16>(p, stream);
  else
    run_type<DType::kFloat32>(p, stream);
}

}  // namespace pvq::cuda
