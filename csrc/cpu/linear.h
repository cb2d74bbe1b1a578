// SPDX-License-Identifier: Apache-2.0
// y = x W^T with a packed W: the host side of the CPU product (docs/format.md §5 to §7).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace pvq::cpu {

struct Segment {  // consecutive output rows with one codebook
  CodebookId codebook;
  std::int64_t rows;
  std::int64_t blocks = 0;         // ceil(rows / kLanes)
  std::int64_t weight_offset = 0;  // bytes into the packed weight
  std::int64_t packed_row = 0;     // first row in row_scale and row_sum, a multiple of kLanes
  std::int64_t output_row = 0;
};

// Everything about a linear layer but its tensors.
struct LinearPlan {
  std::int64_t in_features = 0, out_features = 0, packed_rows = 0, weight_bytes = 0;
  std::vector<Segment> segments;
  std::vector<float> signs;  // [in_features], empty without rotation
  std::int64_t block_width = 1;
  std::vector<RotationFactor> factors;
  std::vector<std::vector<float>> matrices;  // what factors point to
  int num_planes = 1;                        // a8 and pvq: 1, a16: 2
  float scale_constant = 0;                  // c of format.md §6
  Projection projection;                     // of pvq activations, which have one plane

  // rotation_blocks 0: no rotation. `first_column` is where this rank's columns start in the whole layer.
  LinearPlan(std::int64_t in_features, const std::vector<std::pair<int, std::int64_t>>& segments, int num_planes,
             std::uint64_t seed, std::int64_t first_column, std::int64_t rotation_blocks, const std::vector<int>& factors,
             int group_size = 0, int num_pulses = 0);
  LinearPlan(const LinearPlan&) = delete;
};

// Codes of one segment, [rows, in_features / 8, B] uint8 (docs/format.md §3), into the layout of kernels.h, and sum_k q per row
// into row_sum [blocks * kLanes]. Returns -1, or the first row that has an invalid code.
std::int64_t pack_segment(CodebookId codebook, const std::uint8_t* codes, std::int64_t rows, std::int64_t in_features,
                          std::uint8_t* weight, std::int32_t* row_sum);

// Codes to q, [rows, in_features] int8. Returns -1, or the first row that has an invalid code.
std::int64_t decode_codes(CodebookId codebook, const std::uint8_t* codes, std::int64_t rows, std::int64_t in_features,
                          std::int8_t* q);

struct LinearArgs {
  const void* x;  // [num_tokens, in_features]
  DType dtype;    // of x, bias and y
  std::int64_t num_tokens;
  const std::uint8_t* weight;   // [plan.weight_bytes]
  const float* row_scale;       // [plan.packed_rows], 0 in padding
  const std::int32_t* row_sum;  // [plan.packed_rows]
  const void* bias;             // [out_features] or null
  void* y;                      // [num_tokens, out_features]
};
void linear(const LinearPlan& plan, const LinearArgs& args);

// The first half of linear() alone, for tests: planes [num_planes, num_tokens, in_features] int8, token_scale [num_tokens].
void quantize_activations(const LinearPlan& plan, const void* x, DType dtype, std::int64_t num_tokens, std::int8_t* planes,
                          float* token_scale);

}  // namespace pvq::cpu
