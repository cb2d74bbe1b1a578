// SPDX-License-Identifier: Apache-2.0
// Packed weights as int8 for one call with many tokens: decoded once, and not again for every tile of columns.
//
// Expanded: [row block][chunk][128 rows][128 bytes] int8, each row in the order of an activation column (layout.h): swizzled, and
// with the same permutation in each step of 32. Blocks have 128 rows; the last one may hold rows that nobody wrote.
#pragma once

#include "linear.h"

namespace pvq::cuda {

constexpr int kExpandedRows = 128;  // of a block
constexpr std::int64_t kMaxExpandedBytes = std::int64_t{1} << 28;

// Rows that are expanded at once.
constexpr std::int64_t expanded_rows(std::int64_t rows, std::int64_t chunks) {
  constexpr std::int64_t kUnit = 2 * kExpandedRows;
  const std::int64_t most = kMaxExpandedBytes / (chunks * kChunkColumns) / kUnit * kUnit;
  return rows <= most ? round_up(rows, kExpandedRows) : most > 0 ? most : kUnit;
}
constexpr std::int64_t expanded_bytes(std::int64_t rows, std::int64_t chunks) {
  return expanded_rows(rows, chunks) * chunks * kChunkColumns;
}

// All rows of `weight`. `expanded` is aligned to 16 bytes. leaves_room: for blocks of the next kernel on every multiprocessor.
void expand(const Weight& weight, std::uint8_t* expanded, bool leaves_room, cudaStream_t stream);

}  // namespace pvq::cuda
