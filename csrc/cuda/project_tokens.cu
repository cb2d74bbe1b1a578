// SPDX-License-Identifier: Apache-2.0
// `pvq` activations: rotate a token, project its groups onto a pyramid, quantize what that gives to int8 (docs/format.md §5, §6).
// One block a token, as in rotate_quantize.cu. A group of up to 32 belongs to as many lanes of a warp, which may hold several; of
// a larger one every lane holds several coordinates.
#include "launch.h"
#include "linear.h"
#include "rotate.cuh"

namespace pvq::cuda {
namespace {

__device__ __forceinline__ std::int32_t to_integer(float x) { return static_cast<std::int32_t>(x); }

#define PVQ_STEP __device__ __forceinline__
#include "../project_steps.h"
#undef PVQ_STEP

constexpr std::uint32_t kAllLanes = 0xffffffffu;
constexpr std::uint32_t kInfinity = 0x7f800000u;

struct Parameters {
  Tokens tokens;
  Activations out;
};

// v_i + v_(i+h) for h = D/2, D/4, ..., 1, coordinate i in lane i % lanes; every lane of the group gets the sum.
template <int kHeld>
__device__ __forceinline__ float tree_sum(float (&v)[kHeld], int lanes) {
#pragma unroll
  for (int h = kHeld / 2; h > 0; h /= 2)
#pragma unroll
    for (int j = 0; j < h; ++j) v[j] += v[j + h];
  for (int h = lanes / 2; h > 0; h /= 2) v[0] += __shfl_xor_sync(kAllLanes, v[0], h);
  return v[0];
}

__device__ __forceinline__ std::int32_t largest_of(std::int32_t value, int lanes) {
  for (int h = lanes / 2; h > 0; h /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, h));
  return value;
}

// Moves single pulses until the group has as many as it should. The groups of a warp go on together.
template <int kHeld>
__device__ __forceinline__ void fix_total(const float (&target)[kHeld], float (&pulses)[kHeld], std::int32_t excess, int place,
                                          int lanes) {
  std::int32_t order[kHeld], left = abs(excess);
#pragma unroll
  for (int j = 0; j < kHeld; ++j) order[j] = move_order(target[j], pulses[j], excess, place + 32 * j);
  while (__any_sync(kAllLanes, left > 0)) {
    std::int32_t first = order[0];
#pragma unroll
    for (int j = 1; j < kHeld; ++j) first = max(first, order[j]);
    first = largest_of(first, lanes);
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      if (order[j] == first && left > 0) {
        pulses[j] += excess > 0 ? -1.0f : 1.0f;
        order[j] = kNeverMoves;
      }
    --left;
  }
}

// The projected token takes the place of the rotated one. A coordinate's word: its pulses in the low half; in the high half, of
// even coordinates the upper and of odd ones the lower half of its group's scale s. Returns the bits of the largest s |p_i| that
// this thread has met, of infinity for a broken group.
template <int kHeld>
__device__ __forceinline__ std::uint32_t project_groups(const Group& group, float* y, int n, const Projection& projection) {
  const int d = projection.group_size, num_groups = n / d, lanes = kHeld == 1 ? d : 32;
  const int place = group.thread & (lanes - 1), step = group.size / lanes;
  std::uint32_t largest = 0;
#pragma unroll 1
  for (int g = group.thread / lanes; __any_sync(kAllLanes, g < num_groups); g += step) {
    const bool mine = g < num_groups;
    float value[kHeld], target[kHeld], pulses[kHeld], terms[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      value[j] = mine ? y[float_slot(g * d + place + 32 * j)] : 0.0f;
      terms[j] = fabsf(value[j]);
    }
    const float sum = tree_sum(terms, lanes), factor = target_factor(sum, static_cast<float>(projection.num_pulses));
    const bool zero = sum < kLeastGroupSum, broken = !(sum < kMostGroupSum);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      target[j] = fabsf(value[j]) * factor;
      pulses[j] = nearest_integer(target[j]);
      terms[j] = pulses[j];
    }
    const std::int32_t excess = to_integer(tree_sum(terms, lanes)) - projection.num_pulses;
    fix_total(target, pulses, zero || broken ? 0 : excess, place, lanes);
    float norm[kHeld], peak = 0.0f;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      terms[j] = pulses[j] * target[j];
      norm[j] = pulses[j] * pulses[j];
      peak = fmaxf(peak, pulses[j]);
    }
    const float dot = tree_sum(terms, lanes), scale = amplitude(dot, tree_sum(norm, lanes), factor);
    largest = max(largest, broken ? kInfinity : __float_as_uint(scale * peak));
    const std::uint32_t bits = __float_as_uint(scale), half = (place & 1) == 0 ? bits & 0xffff0000u : bits << 16;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const std::int32_t p = to_integer(value[j] < 0.0f ? -pulses[j] : pulses[j]);
      if (mine) y[float_slot(g * d + place + 32 * j)] = __uint_as_float(half | (static_cast<std::uint32_t>(p) & 0xffffu));
    }
  }
  return largest;
}

// Four coordinates to four bytes.
__device__ __forceinline__ std::uint32_t quantize_pulses(const float* from, const TokenScale& token) {
  std::uint32_t words[4], bytes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(from[i]);
  const float scale = __uint_as_float((words[0] & 0xffff0000u) | words[1] >> 16) * token.inverse;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float pulses = static_cast<float>(static_cast<std::int16_t>(words[i] & 0xffffu));
    bytes |= (static_cast<std::uint32_t>(__float2int_rn(pulses * scale)) & 0xffu) << (8 * i);
  }
  return bytes;
}

template <DType kType, int kThreads, int kMaxDense>
__global__ void __launch_bounds__(kThreads, 1) project_tokens_kernel(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(16) char shared[];
  __shared__ GroupSums reduction;
  __shared__ alignas(16) float coefficients[kMaxDense * kMaxDense];
  launch_dependents();
  const Group group{static_cast<int>(threadIdx.x), kThreads, 1};
  const std::int64_t token = blockIdx.x;
  const int n = static_cast<int>(p.tokens.in_features), padded = static_cast<int>(p.out.num_chunks) * kChunkColumns;
  const Projection projection = p.tokens.projection;
  float* y = reinterpret_cast<float*>(shared);
  wait_for_dependencies();
  rotate_token<kType, kMaxDense>(group, static_cast<const Element<kType>*>(p.tokens.x) + token * n, p.tokens, y, coefficients);

  std::uint32_t largest = 0;
  switch (projection.group_size) {
    case 256:
      largest = project_groups<8>(group, y, n, projection);
      break;
    case 128:
      largest = project_groups<4>(group, y, n, projection);
      break;
    case 64:
      largest = project_groups<2>(group, y, n, projection);
      break;
    default:
      largest = project_groups<1>(group, y, n, projection);
  }
  if (group.thread == 0) reduction.sums[0] = 0;
  largest = largest_of_threads(largest, group.thread, kThreads, reduction.largest, [&] { group.sync(); });
  const TokenScale scale(largest, 1, p.tokens.scale_constant);
  std::int32_t sums[2] = {};
#pragma unroll 1
  for (int quad = group.thread; quad < padded / 4; quad += kThreads) {
    const bool zero = scale.zero || 4 * quad >= n;
    const std::uint32_t bytes = zero ? 0u : quantize_pulses(y + float_slot(4 * quad), scale);
    *reinterpret_cast<std::uint32_t*>(p.out.data + activation_offset(4 * quad, token, p.out.padded_columns)) = bytes;
    sums[0] = __dp4a(static_cast<int>(bytes), 0x01010101, sums[0]);
  }
  add_sums(sums, 1, reduction.sums);
  group.sync();
  if (group.thread != 0) return;
  p.out.sums[token] = reduction.sums[0];
  p.out.token_scale[token] = scale.token_scale;
}

template <DType kType, int kThreads, int kMaxDense>
void run(const Parameters& p, cudaStream_t stream) {
  launch(project_tokens_kernel<kType, kThreads, kMaxDense>, dim3(static_cast<unsigned>(p.tokens.num_tokens)), dim3(kThreads),
         static_cast<std::size_t>(float_buffer_bytes(p.tokens.in_features)), stream, p);
}

template <DType kType>
void run_type(const Parameters& p, cudaStream_t stream) {
  const int largest_dense = largest_dense_order(p.tokens.rotation);
  if (largest_dense > 28)
    run<kType, 256, 76>(p, stream);
  else
    run<kType, 512, 28>(p, stream);
}

}  // namespace

void project_tokens(const Tokens& tokens, const Activations& out, cudaStream_t stream) {
  if (tokens.num_tokens == 0) return;
  const Parameters p{tokens, out};
  if (tokens.dtype == DType::kBFloat16)
    run_type<DType::kBFloat16>(p, stream);
  else if (tokens.dtype == DType::kFloat16)
    run_type<DType::kFloat16>(p, stream);
  else
    run_type<DType::kFloat32>(p, stream);
}

}  // namespace pvq::cuda
