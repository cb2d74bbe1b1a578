// SPDX-License-Identifier: Apache-2.0
// What the plans of both devices refuse, and derive from the arguments alike. Errors: std::invalid_argument.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "projection.h"

namespace pvq {

// segments: (codebook, rows).
void check_layer(std::int64_t in_features, const std::vector<std::pair<int, std::int64_t>>& segments, int num_planes);

// Groups of `projection` must tile the columns of this rank, and their int8 is one plane. No projection: nothing to check.
void check_projection(std::int64_t in_features, int num_planes, const Projection& projection);

// The width of a block; checks that the orders of its Hadamard factors multiply to it.
std::int64_t rotation_block_width(std::int64_t in_features, std::int64_t rotation_blocks, const std::vector<int>& orders);

// c of docs/format.md §6.
float activation_constant(int num_planes, std::int64_t block_width);

}  // namespace pvq
