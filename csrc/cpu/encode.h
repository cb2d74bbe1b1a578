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

// Error feedback (GPTQ / LDLQ; LLVQ, Algorithm 1): `factor` [columns, columns] is the diagonal block U_BB of the upper Cholesky
// factor of the inverse Hessian. Every group Q gets the codeword that the search of metric_search.h finds in its own metric
// M = U_QQ^-1 U_QQ^-T (int8: its weights are rounded one after the other). Then E = (w - what) U_QQ^-1 goes to `error`
// [rows, columns] and E U_QR is taken off the columns R of the block still to come. metrics: [columns / 8][kMetricFloats].
void encode_rows_with_feedback(const EncodeArgs& args, const float* factor, const float* metrics, float* error);

// One pass of coordinate descent on tr(dW H dW^T): each group of the block in turn is searched again given the errors of all
// others, and changed where that lowers the sum. codes and q: in and out. gradient [rows, columns]: (W - What) H of the block's
// columns, W and What being whole rows; hessian [columns, columns]: H_BB; metrics: of its diagonal blocks H_QQ.
void descend_rows(const EncodeArgs& args, const float* gradient, const float* hessian, const float* metrics);

// Sum of squared errors of encode_rows over every `stride`-th group of each row, out [rows].
void encoding_error(CodebookId codebook, const float* weight, const float* row_scale, std::int64_t rows, std::int64_t columns,
                    std::int64_t stride, float* error);

}  // namespace pvq::cpu
