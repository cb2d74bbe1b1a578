// SPDX-License-Identifier: Apache-2.0
// Everything about a linear layer on a GPU but its tensors: sizes, offsets, rotation. Computed on the host, no GPU needed.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "linear.h"

namespace pvq::cuda {

struct Segment {  // consecutive output rows of one codebook; neighbours with the same codebook are one segment
  CodebookId codebook;
  std::int64_t rows;
  std::int64_t weight_offset = 0;  // bytes into the packed weight
  std::int64_t packed_row = 0;     // first row in row_scale, a multiple of kRowAlignment
  std::int64_t output_row = 0;
};

// Offsets, in bytes, of what one call needs besides its arguments.
struct Workspace {
  std::int64_t activations, sums, token_scale, partial, expanded, bytes;  // expanded: of prefill(), if there is one
  std::int64_t padded_columns, partial_elements;
};

struct CudaPlan {
  std::int64_t in_features = 0, out_features = 0, packed_rows = 0, weight_bytes = 0;
  std::vector<Segment> segments;
  int num_planes = 1;                    // a8 and pvq: 1, a16: 2
  float scale_constant = 0;              // c of format.md §6
  Rotation rotation;                     // its signs are an argument of the call
  std::vector<std::uint32_t> sign_bits;  // [in_features / 32 up], empty without rotation
  Projection projection;                 // of pvq activations

  // The arguments of cpu::LinearPlan. Throws std::invalid_argument for what the kernels cannot do.
  CudaPlan(std::int64_t in_features, const std::vector<std::pair<int, std::int64_t>>& segments, int num_planes,
           std::uint64_t seed, std::int64_t first_column, std::int64_t rotation_blocks, const std::vector<int>& factors,
           int group_size = 0, int num_pulses = 0);

  // for_prefill: with room for an expanded weight.
  Workspace workspace(std::int64_t num_tokens, bool for_prefill = false) const;
};

}  // namespace pvq::cuda
