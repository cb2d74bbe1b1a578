// SPDX-License-Identifier: Apache-2.0
#include "launch.h"
#include "linear.h"
#include "rotate.cuh"

namespace pvq::cuda {
namespace {

struct Parameters {
  Tokens tokens;
  Activations out;
};

// One block a token. A thread holds a column of a dense factor in registers, so large orders have a
// kernel of their own.
template <DType kType, int kThreads, int kMaxDense, int kMinBlocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks) rotate_quantize_kernel(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(16) char shared[];
  __shared__ GroupSums reduction;
  __shared__ alignas(16) float coefficients[kMaxDense * kMaxDense];
  launch_dependents();
  const Group group{static_cast<int>(threadIdx.x), kThreads, 1};
  const std::int64_t token = blockIdx.x;
  const int n = static_cast<int>(p.tokens.in_features), padded = static_cast<int>(p.out.num_chunks) * kChunkColumns;
  const int num_planes = p.tokens.num_planes;
  float* y = reinterpret_cast<float*>(shared);
  const void* x = static_cast<const Element<kType>*>(p.tokens.x) + token * n;
  wait_for_dependencies();
  rotate_token<kType, kMaxDense>(group, x, p.tokens, y, coefficients);
  const float token_scale = quantize_token(group, y, p.tokens, padded, reduction, [&](int plane, int quad, std::uint32_t word) {
    const std::int64_t column = token * num_planes + plane;
    *reinterpret_cast<std::uint32_t*>(p.out.data + activation_offset(4 * quad, column, p.out.padded_columns)) = word;
  });
  group.sync();
  if (group.thread < num_planes) p.out.sums[token * num_planes + group.thread] = reduction.sums[group.thread];
  if (group.thread == 0) p.out.token_scale[token] = token_scale;
}

template <DType kType, int kThreads, int kMaxDense, int kMinBlocks>
void run(const Parameters& p, cudaStream_t stream) {
  launch(rotate_quantize_kernel<kType, kThreads, kMaxDense, kMinBlocks>, dim3(static_cast<unsigned>(p.tokens.num_tokens)),
         dim3(kThreads), static_cast<std::size_t>(float_buffer_bytes(p.tokens.in_features)), stream, p);
}

template <DType kType>
void run_type(const Parameters& p, cudaStream_t stream) {
  const int largest_dense = largest_dense_order(p.tokens.rotation);
  if (largest_dense > 28)
    run<kType, 256, 76, 1>(p, stream);
  else if (p.tokens.num_tokens <= 8 || p.tokens.in_features > 8192)
    run<kType, 512, 28, 2>(p, stream);
  else
    run<kType, 256, 28, 4>(p, stream);
}

}  // namespace

bool starts_early(const Activations& a, std::int64_t blocks) {
  const bool wide = a.num_chunks * kChunkColumns >= 8192;  // quantizing takes long, in clusters of four blocks
  return a.made_quickly || a.num_columns() <= 16 || !wide || blocks + 4 * a.num_tokens <= device_properties().num_sms;
}

void rotate_quantize(const Tokens& tokens, const Activations& out, bool waits_last, cudaStream_t stream) {
  if (tokens.num_tokens == 0) return;
  if (tokens.rotation.num_factors == 0 || rotates_in_warps(tokens.rotation)) return quantize(tokens, out, waits_last, stream);
  if (rotate_in_clusters(tokens, out, stream)) return;
  const Parameters p{tokens, out};
  if (tokens.dtype == DType::kBFloat16)
    run_type<DType::kBFloat16>(p, stream);
  else if (tokens.dtype == DType::kFloat16)
    run_type<DType::kFloat16>(p, stream);
  else
    run_type<DType::kFloat32>(p, stream);
}

}  // namespace pvq::cuda
