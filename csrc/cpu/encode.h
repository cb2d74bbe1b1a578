// SPDX-License-Identifier: Apache-2.0
// The quantizer's inner loops: exact joint choice of shape and gain for groups of eight weights, alone or with error feedback.
#pragma once

#include <cstdint>

#include "../codebook.h"

namespace pvq::cpu {

struct EncodeArgs {
  CodebookId codebook;
  const float* weight;     // [rows, columns], rotated
  const float* row_scale;  // [rows]; a row with scale 0 gets the code of zeros
  std::int64_t rows, columns;
  std::uint8_t* codes;  // out [rows, columns / 8, B]
  std::int8_t* q;       // out [rows, columns]
};

// For every group the codeword that minimises ||w - (q + h/2) row_scale||: over all gains and pyramids, and within one of them
// the nearest point. The cost is separable and convex in the cells, so moving the pulses that cost least from the unconstrained
// optimum to the pyramid is exact. Ties: first pyramid, lowest gain, lowest coordinate.
void encode_rows(const EncodeArgs& args);

// The same group by group with error feedback (GPTQ / LDLQ; LLVQ, Algorithm 1): `factor` [columns, columns] is the diagonal block
// U_BB of the upper Cholesky factor of the inverse Hessian. After a group Q is coded, E = (w - what) U_QQ^-1 goes to `error`
// [rows, columns] and E U_QR is taken off the columns R of the block still to come.
void encode_rows_with_feedback(const EncodeArgs& args, const float* factor, float* error);

// Sum of squared errors of encode_rows over every `stride`-th group of each row, out [rows].
void encoding_error(CodebookId codebook, const float* weight, const float* row_scale, std::int64_t rows, std::int64_t columns,
                    std::int64_t stride, float* error);

}  // namespace pvq::cpu
