// SPDX-License-Identifier: Apache-2.0
// The quantizer's inner loops on a GPU: the functions of cpu/encode.h with the same bytes as results. Every pointer is a device
// address, every launch goes to `stream`, nothing is allocated and nothing waits. Errors of CUDA throw std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../codebook.h"

namespace pvq::cuda {

struct EncodeArgs {
  CodebookId codebook;
  const float* weight;     // [rows, columns], rotated; columns a multiple of 8
  const float* row_scale;  // [rows]; a row with scale 0 gets the code of zeros
  std::int64_t rows, columns;
  std::uint8_t* codes;  // out [rows, columns / 8, B]
  std::int8_t* q;       // out [rows, columns]
};

// The nearest codeword of every group.
void encode_rows(const EncodeArgs& args, cudaStream_t stream);

// cpu::encode_rows_with_feedback. factor [columns, columns]: U_BB. error, out [rows, columns], holds the weights still to come
// until their turn, so that any number of columns fits.
void encode_rows_with_feedback(const EncodeArgs& args, const float* factor, const float* metrics, float* error,
                               cudaStream_t stream);

// cpu::descend_rows. gradient is used up: it follows the changes.
void descend_rows(const EncodeArgs& args, float* gradient, const float* hessian, const float* metrics, cudaStream_t stream);

// Sum of squared errors of encode_rows over every `stride`-th group of each row, out [rows]. Not for int8.
void encoding_error(CodebookId codebook, const float* weight, const float* row_scale, std::int64_t rows, std::int64_t columns,
                    std::int64_t stride, float* error, cudaStream_t stream);

}  // namespace pvq::cuda
