// SPDX-License-Identifier: Apache-2.0
// Codes of a checkpoint (docs/format.md §3, §4) to the layout of the GPU kernels (layout.h) and on to int8. Every pointer is a
// device address, every launch goes to `stream`, nothing is allocated and nothing waits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../codebook.h"

namespace pvq::cuda {

// Codes uint8 [rows, in_features / 8, B] of one tensor into rows first_row up of a segment. A segment may come from several
// tensors of one codebook: any first_row, calls on one stream, all into the same `weight` [weight_bytes], which starts as zeros.
// Every row is packed once. `table`: device_table of the codebook on the device, null for int8.
//
// *invalid_row becomes the smallest row of the segment (first_row + row of `codes`) that has an invalid code; the caller sets it
// to INT64_MAX before, and it stays that if there is none. What is packed then is not to be used.
void pack_rows(CodebookId codebook, const std::uint8_t* codes, std::int64_t rows, std::int64_t in_features,
               std::int64_t first_row, std::uint8_t* weight, const std::uint32_t* table, std::int64_t* invalid_row,
               cudaStream_t stream);

// Rows first_row up of a packed segment to q [rows, in_features], aligned to 8 bytes.
void unpack_rows(CodebookId codebook, const std::uint8_t* weight, std::int64_t first_row, std::int64_t rows,
                 std::int64_t in_features, const std::uint32_t* table, std::int8_t* q, cudaStream_t stream);

}  // namespace pvq::cuda
