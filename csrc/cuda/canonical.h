// SPDX-License-Identifier: Apache-2.0
// Rows of the canonical codebook (docs/format.md §4.3) to int8 on a GPU, the same bits as canonical_decode_rows on the CPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../canonical.h"

namespace pvq::cuda {

// Bytes of device memory to decode `rows` rows at once: part of the table of U(l, j), and for every group its index, its pulses
// and the pulses that are left, 2 to 3 bytes a weight.
std::int64_t canonical_workspace_bytes(const CanonicalFormat& format, std::int64_t rows);

// packed [rows, row_bytes], levels [2^b] -> q [rows, groups * D]; all device addresses, the workspace aligned to 16 bytes. It
// takes as many rows at once as `workspace_bytes` has room for; canonical_workspace_bytes(format, 1) is the least. For loading,
// not for serving: the rows of the table are computed here on the host, and the call waits for their copies.
//
// *fault, a word of device memory that the caller sets to INT64_MAX, becomes the first fault, see canonical_fault. The first
// faulty row is the one that a decoder which goes row by row finds, except that an unused bit counts after the groups of its row.
void canonical_decode_rows(const std::uint8_t* packed, const float* levels, std::int64_t rows, const CanonicalFormat& format,
                           std::int8_t* q, std::int64_t* fault, void* workspace, std::int64_t workspace_bytes,
                           cudaStream_t stream);

// What is in that word, read back to the host.
DecodeStatus canonical_fault(std::int64_t word);

}  // namespace pvq::cuda
