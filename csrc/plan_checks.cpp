// SPDX-License-Identifier: Apache-2.0
#include "plan_checks.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "codebook.h"
#include "hadamard.h"

namespace pvq {

void check_layer(std::int64_t in_features, const std::vector<std::pair<int, std::int64_t>>& segments, int num_planes) {
  if (in_features <= 0 || in_features % kGroupSize != 0 || in_features > 65536)
    throw std::invalid_argument("in_features is " + std::to_string(in_features) + "; it must be a multiple of 8 up to 65536.");
  if (num_planes != 1 && num_planes != 2) throw std::invalid_argument("num_planes must be 1 (a8) or 2 (a16).");
  for (const auto& [codebook, rows] : segments)
    if (codebook < 0 || codebook > static_cast<int>(CodebookId::kInt8) || rows <= 0)
      throw std::invalid_argument("a segment has codebook " + std::to_string(codebook) + " and " + std::to_string(rows) +
                                  " rows.");
}

void check_projection(std::int64_t in_features, int num_planes, const Projection& projection) {
  const int d = projection.group_size, k = projection.num_pulses;
  if (d == 0 && k == 0) return;
  if (num_planes != 1) throw std::invalid_argument("num_planes must be 1 for activations that are projected onto a pyramid.");
  if (d < kMinProjectedGroup || d > kMaxProjectedGroup || !is_power_of_two(d) || k < 1 || k > kMaxProjectedPulses)
    throw std::invalid_argument("activations are projected onto S(" + std::to_string(d) + ", " + std::to_string(k) +
                                "); the group must be a power of two from 8 to 256, the pulses 1 to 4096.");
  if (in_features % d != 0)
    throw std::invalid_argument("in_features is " + std::to_string(in_features) + "; with `pvq` activations in groups of " +
                                std::to_string(d) + " it must be a multiple of that on every rank.");
}

std::int64_t rotation_block_width(std::int64_t in_features, std::int64_t rotation_blocks, const std::vector<int>& orders) {
  if (in_features % rotation_blocks != 0) throw std::invalid_argument("rotation_blocks does not divide in_features.");
  const std::int64_t width = in_features / rotation_blocks;
  std::int64_t product = 1;
  for (const int order : orders) product *= order;
  if (orders.empty() || product != width)
    throw std::invalid_argument("the rotation factors do not multiply to the block width " + std::to_string(width) + ".");
  for (std::size_t i = 0; i + 1 < orders.size(); ++i)
    if (is_power_of_two(orders[i])) throw std::invalid_argument("only the last rotation factor may be a power of two.");
  return width;
}

float activation_constant(int num_planes, std::int64_t block_width) {
  const double levels = num_planes == 1 ? 127.0 : 32512.0;
  return static_cast<float>(1.0 / (levels * std::sqrt(static_cast<double>(block_width))));
}

}  // namespace pvq
