// SPDX-License-Identifier: Apache-2.0
// Rotation and quantization of few tokens of a large width, where latency is all (sm_90 and later): four blocks of a cluster
// share a token. With a dense factor f each computes f / 4 of the f outputs of every column of the factor, and from there on
// whole blocks of the power of two are its own. Of a power of two alone, each does the strides inside its quarter, then all
// exchange columns for the last two strides.
#include <cooperative_groups.h>

#include "cluster_exchange.cuh"
#include "launch.h"
#include "linear.h"
#include "rotate.cuh"

namespace pvq::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kClusterSize = 4, kThreads = 512;

struct Parameters {
  Tokens tokens;
  Activations out;
};

// kOrder: the dense order, or 1.
template <DType kType, int kOrder>
__global__ void PVQ_CLUSTER(kClusterSize) __launch_bounds__(kThreads, 2)
    rotate_cluster_kernel(const __grid_constant__ Parameters p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kRows = kOrder == 1 ? 1 : kOrder / kClusterSize;
  extern __shared__ __align__(16) char memory[];
  __shared__ GroupSums reduction;
  __shared__ ClusterExchange exchange;
  __shared__ alignas(16) float coefficients[kRows * kOrder];
  launch_dependents();
  const Group group{static_cast<int>(threadIdx.x), kThreads, 1};
  const int rank = blockIdx.x % kClusterSize, n = static_cast<int>(p.tokens.in_features), run = n / kOrder,
            quads = n / kClusterSize / 4;
  const std::int64_t token = blockIdx.x / kClusterSize;
  const int num_planes = p.tokens.num_planes;
  const Element<kType>* x = static_cast<const Element<kType>*>(p.tokens.x) + token * n;
  float* y = reinterpret_cast<float*>(memory);  // this block's quarter of the rotated token
  if (threadIdx.x < 2) reduction.sums[threadIdx.x] = 0;
  exchange.begin(kClusterSize, num_planes);
  if constexpr (kOrder == 1) {
    const int quarter = n / kClusterSize, part = quarter / kClusterSize;
    wait_for_dependencies();
    const SignedInput<kType> input{x + rank * quarter, p.tokens.rotation.signs + rank * quarter / 32};
    transform_power(group, input, y, quarter, quarter);
    synchronize_cluster();
    const cg::cluster_group cluster = cg::this_cluster();
    const float* quarters[kClusterSize];
#pragma unroll
    for (int c = 0; c < kClusterSize; ++c) quarters[c] = cluster.map_shared_rank(y, c) + float_slot(rank * part);
    y += float_slot(quarter);  // [4][part]: the others still read what was there
#pragma unroll 1
    for (int j = threadIdx.x; j < part; j += kThreads) {
      float v[kClusterSize];
#pragma unroll
      for (int c = 0; c < kClusterSize; ++c) v[c] = quarters[c][float_slot(j)];
      butterflies(v);
#pragma unroll
      for (int c = 0; c < kClusterSize; ++c) y[float_slot(c * part + j)] = v[c];
    }
    group.sync();
    arrive_cluster();  // no quarter is read any more
  } else {
    write_coefficients<kOrder>(group, rank * kRows, kRows, coefficients);
    group.sync();
    wait_for_dependencies();
    float* token_floats = y + float_slot(n / kClusterSize);
    load_token<kType>(group, x, n, p.tokens.rotation.signs, token_floats);
    group.sync();
#pragma unroll 1
    for (int j = threadIdx.x; j < run; j += kThreads) {
      const float* column = token_floats + float_slot(j);  // run is a multiple of 32
      const int stride = float_slot(run);
      float in[kOrder];
#pragma unroll
      for (int c = 0; c < kOrder; ++c) in[c] = column[c * stride];
      float* to = y + float_slot(j);
#pragma unroll 1
      for (int r = 0; r < kRows; ++r) to[r * stride] = dense_row<kOrder>(coefficients + r * kOrder, in);
    }
    group.sync();
    transform_power(group, Buffered{y}, y, n / kClusterSize, run);
  }
  std::uint32_t largest = 0;
#pragma unroll 1
  for (int q = threadIdx.x; q < quads; q += kThreads)
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(y[float_slot(4 * q) + i]) & 0x7fffffffu);
  largest = largest_of_threads(largest, group.thread, kThreads, reduction.largest, [&] { group.sync(); });
  largest = exchange.largest_of_cluster(largest, kClusterSize, rank);
  const TokenScale scale(largest, num_planes, p.tokens.scale_constant);
  std::int32_t sums[2] = {};
#pragma unroll 1
  for (int q = threadIdx.x; q < quads; q += kThreads) {
    const QuantizedQuad words = quantize_quad(y + float_slot(4 * q), scale, num_planes);
    // Where the quad stands in the token: among this block's rows, or in a part of each quarter.
    const int quad = kOrder > 1 ? rank * quads + q : q / (quads / 4) * quads + rank * (quads / 4) + q % (quads / 4);
    std::int8_t* data = p.out.data;
    *reinterpret_cast<std::uint32_t*>(data + activation_offset(4 * quad, token * num_planes, p.out.padded_columns)) = words.high;
    if (num_planes == 2)
      *reinterpret_cast<std::uint32_t*>(data + activation_offset(4 * quad, 2 * token + 1, p.out.padded_columns)) = words.low;
    sums[0] = __dp4a(static_cast<int>(words.high), 0x01010101, sums[0]);
    sums[1] = __dp4a(static_cast<int>(words.low), 0x01010101, sums[1]);
  }
  add_sums(sums, num_planes, reduction.sums);
  group.sync();
  exchange.add_sums(reduction.sums, kClusterSize, num_planes, rank);
  if constexpr (kOrder == 1) {  // long over, as the exchange shows; but compute-sanitizer does not see that
    __syncwarp();
    wait_cluster();
  }
  if (rank != 0) return;
  if (threadIdx.x < num_planes) p.out.sums[token * num_planes + threadIdx.x] = reduction.sums[threadIdx.x];
  if (threadIdx.x == 0) p.out.token_scale[token] = scale.token_scale;
#endif
}

std::int64_t shared_bytes(std::int64_t n, bool dense) {
  return float_buffer_bytes(dense ? n / kClusterSize + n : 2 * (n / kClusterSize) + 32);
}

template <DType kType, int kOrder>
bool run(const Parameters& p, cudaStream_t stream) {
  launch(rotate_cluster_kernel<kType, kOrder>, dim3(static_cast<unsigned>(kClusterSize * p.tokens.num_tokens)), dim3(kThreads),
         static_cast<std::size_t>(shared_bytes(p.tokens.in_features, kOrder > 1)), stream, p);
  return true;
}

template <DType kType>
bool run_order(const Parameters& p, cudaStream_t stream) {
  if (p.tokens.rotation.num_factors == 1) return run<kType, 1>(p, stream);
  switch (p.tokens.rotation.factors[0]) {
    case 12:
      return run<kType, 12>(p, stream);
    case 20:
      return run<kType, 20>(p, stream);
    case 28:
      return run<kType, 28>(p, stream);
    default:
      return false;
  }
}

}  // namespace

bool rotate_in_clusters(const Tokens& tokens, const Activations& out, cudaStream_t stream) {
  const Rotation& rotation = tokens.rotation;
  const DeviceProperties& device = device_properties();
  const std::int64_t n = tokens.in_features;
  if (device.capability < 90 || rotation.num_factors < 1 || rotation.num_factors > 2 || rotation.block_width != n) return false;
  // Where the tokens alone fill the device, or a block has little to do, the exchange does not pay.
  if (tokens.num_tokens * kClusterSize > 2 * device.num_sms || n < 8192 || n % kChunkColumns != 0) return false;
  const int last = rotation.factors[rotation.num_factors - 1];
  const bool dense = rotation.num_factors == 2;
  if ((last & (last - 1)) != 0 || last < 32 || shared_bytes(n, dense) + 8192 > device.max_shared_bytes) return false;
  const Parameters p{tokens, out};
  if (tokens.dtype == DType::kBFloat16) return run_order<DType::kBFloat16>(p, stream);
  if (tokens.dtype == DType::kFloat16) return run_order<DType::kFloat16>(p, stream);
  return run_order<DType::kFloat32>(p, stream);
}

}  // namespace pvq::cuda
