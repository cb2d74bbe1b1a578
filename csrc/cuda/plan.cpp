// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../hadamard.h"
#include "../plan_checks.h"
#include "expand.h"

namespace pvq::cuda {
namespace {

// Dense orders that rotate.cuh has code for: four times an odd number. It passes over all others.
constexpr int kLargestDense = 76;
bool has_dense_pass(int order) { return is_hadamard_order(order) && order % 8 == 4 && order <= kLargestDense; }
constexpr char kOtherRotation[] =
    ": quantize the model again with --rotation residual:128 (or block:128), or serve it on the CPU.";
constexpr std::int64_t kMaxSplits = 16;
constexpr std::int64_t kMaxPartialElements = std::int64_t{1} << 23;  // 32 MiB

}  // namespace

CudaPlan::CudaPlan(std::int64_t in, const std::vector<std::pair<int, std::int64_t>>& parts, int planes, std::uint64_t seed,
                   std::int64_t first_column, std::int64_t rotation_blocks, const std::vector<int>& orders, int group_size,
                   int num_pulses)
    : in_features(in), num_planes(planes), projection{group_size, num_pulses} {
  check_layer(in, parts, planes);
  check_projection(in, planes, projection);
  for (const auto& [codebook, rows] : parts) {
    const CodebookId id = static_cast<CodebookId>(codebook);
    if (!segments.empty() && segments.back().codebook == id) {
      segments.back().rows += rows;
    } else {
      segments.push_back({id, rows});
    }
  }
  for (Segment& segment : segments) {
    segment.weight_offset = weight_bytes;
    segment.packed_row = packed_rows;
    segment.output_row = out_features;
    weight_bytes += cuda::weight_bytes(segment.codebook, segment.rows, in);
    packed_rows += padded_rows(segment.rows);
    out_features += segment.rows;
  }
  if (rotation_blocks > 0) {
    rotation.block_width = rotation_block_width(in, rotation_blocks, orders);
    if (orders.size() > kMaxFactors)
      throw std::invalid_argument("a rotation of " + std::to_string(orders.size()) + " factors has no kernel for GPUs; at most " +
                                  std::to_string(kMaxFactors) + " have" + kOtherRotation);
    for (std::size_t i = 0; i < orders.size(); ++i) {
      if (!is_power_of_two(orders[i]) && !has_dense_pass(orders[i]))
        throw std::invalid_argument("a rotation with a factor of order " + std::to_string(orders[i]) + " has no kernel for GPUs" +
                                    kOtherRotation);
      rotation.factors[i] = orders[i];
    }
    rotation.num_factors = static_cast<int>(orders.size());
    const std::vector<float> signs = rotation_signs(seed, first_column, in);
    sign_bits.resize(static_cast<std::size_t>((in + 31) / 32));
    for (std::size_t i = 0; i < signs.size(); ++i)
      if (signs[i] < 0) sign_bits[i / 32] |= std::uint32_t{1} << (i % 32);
  }
  scale_constant = activation_constant(planes, rotation.block_width);
}

Workspace CudaPlan::workspace(std::int64_t num_tokens, bool for_prefill) const {
  constexpr std::int64_t kAlignment = 256;
  const std::int64_t columns = num_tokens * num_planes;
  Workspace w{};
  w.padded_columns = round_up(columns, kColumnAlignment);
  std::int64_t widest = 0;
  for (const Segment& segment : segments) widest = std::max(widest, padded_rows(segment.rows));
  // Many columns fill a GPU without splitting the reduction; the kernels make as many splits as there is room for.
  w.partial_elements = std::min(kMaxSplits * widest * w.padded_columns, kMaxPartialElements);
  w.sums = w.activations + round_up(num_chunks(in_features) * w.padded_columns * kChunkColumns, kAlignment);
  w.token_scale = w.sums + round_up(columns * 4, kAlignment);
  w.partial = w.token_scale + round_up(num_tokens * 4, kAlignment);
  w.expanded = w.partial + round_up(w.partial_elements * 4, kAlignment);
  w.bytes = w.expanded + (for_prefill ? expanded_bytes(widest, num_chunks(in_features)) : 0);
  return w;
}

}  // namespace pvq::cuda
