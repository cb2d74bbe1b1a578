// SPDX-License-Identifier: Apache-2.0
// What encode.cpp hands to the loops of encode_loops.h and feedback_loops.h, one table per instruction set.
#pragma once

#include <cmath>
#include <limits>

#include "../metric_search.h"
#include "encode.h"

namespace pvq::cpu {

struct Ladder {  // magnitudes of one gain: base + j step, j = 2^r m + f in [0, last]
  float base, step;
  int last;
};

struct Candidate {  // a gain of a pyramid
  int set, gain, pyramid;
};

// A codebook prepared for the search.
struct Search {
  const ServingCodebook* book;
  int refinement_bits, num_pyramids, num_gains, num_sets;
  int pyramids[kMaxPyramids];
  Ladder ladders[kMaxPyramids][kMaxGains];         // by set: pyramids that share their gains are searched together
  int first[kMaxPyramids], end[kMaxPyramids];      // pyramids of a set
  Candidate candidates[kMaxPyramids * kMaxGains];  // by set, gain and pyramid: the first of equal codewords is taken
  int num_candidates;
};

constexpr int kEncodeLanes = 16;

struct EncodeKernels {
  void (*encode)(const Search&, const EncodeArgs&, std::int64_t begin, std::int64_t end);
  // columns: scratch of args.columns * 64 bytes, aligned to 64
  void (*feedback)(const Search&, const EncodeArgs&, const float* factor, const float* metrics, float* error, std::int64_t begin,
                   std::int64_t end, void* columns);
  void (*descent)(const Search&, const EncodeArgs&, const float* gradient, const float* hessian, const float* metrics,
                  std::int64_t begin, std::int64_t end, void* columns);
  void (*error)(const Search&, const float* weight, const float* row_scale, std::int64_t columns, std::int64_t stride,
                std::int64_t begin, std::int64_t end, float* error);
};

const EncodeKernels* portable_encode_kernels();
const EncodeKernels* avx2_encode_kernels();    // null if not built for this machine's architecture
const EncodeKernels* avx512_encode_kernels();  // likewise

}  // namespace pvq::cpu
