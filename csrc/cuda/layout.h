// SPDX-License-Identifier: Apache-2.0
// How the GPU kernels see a packed weight and quantized activations. No CUDA types: the host side and the kernels share it.
//
// Weight: tiles of 16 rows by chunks of 128 columns, [tile][chunk][chunk_bytes]. In a chunk, lane 4 g + t of a warp owns what
// the fragment A of mma.m16n8k32 (and of wgmma m64nNk32, a warp's 16 rows of it) wants from it: for the steps s = 0 .. 3 of 32
// columns and h = 0, 1 the group of row g + 8 h and columns 32 s + 8 t .. + 7. Planes of a chunk, each [32 lanes]:
//
//   pvq4  1024 B  uint4 code[s] | uint4 bits[s]           code[s]: both groups (h = 0, 1), see below
//   pvq3   768 B  uint4 code[s] | uint2 bits[s / 2]       bits: signs, and refinement bits of pvq4 or signs of odd s of pvq3
//   pvq2   512 B  uint4 {code of s = 0, 1 | of s = 2, 3 | signs of s = 0, 1 | of s = 2, 3}
//   int8  2048 B  uint4 fragment[s = 0] | [1] | [2] | [3]  {row g low, row g + 8 low, row g high, row g + 8 high}; low: weights
//   0-3
//
//   code[s]  bits 2-14 shape of h = 0, 15-27 of h = 1: byte offsets into a table of words (h = 1: shifted right by 13). Gain of
//            h = 0 in bits 28-30, of h = 1 in bits 31, 0, 1 (low bit in 31): rotated left by 4 (h = 0: and shifted by 3 more)
//            byte offsets into one of pairs
//   bits     byte b, sign of weight b of leaf 0, 1, 2, 3: bits 7, 6, 3, 2; its refinement bit: 0, 4, 1, 5. leaf = 2 h + (0: low,
//            1: high)
//            pvq3: signs of leaf j in bit 7 - j, s even, or 3 - j, s odd.   pvq2: as pvq3; its code words hold bytes (s even:
//            h = 0, 1; s odd: h = 0, 1)
//
// Activations: [chunk][padded_columns][128 bytes] int8. A column is one plane of one token (a16: 2 token + plane, high plane
// first). Within each step of 32 the bytes are in the order of fragment B for that A: position 4 t + i holds column 8 t + i and
// 16 + 4 t + i holds column 8 t + 4 + i, i < 4. The 16-byte units u of a column's 128 bytes are stored at u ^ (column & 7), which
// is the 128-byte swizzle of wgmma and free of bank conflicts for mma. Columns of a weight past in_features meet zeros.
#pragma once

#include <cstdint>

#include "../codebook.h"

// A function that a kernel and a program of the host can both call.
#ifdef __CUDACC__
#define PVQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PVQ_HOST_DEVICE inline
#endif

namespace pvq::cuda {

constexpr int kTileRows = 16;
constexpr int kChunkColumns = 128;
constexpr int kSteps = 4;            // of 32 columns in a chunk
constexpr int kRowAlignment = 64;    // rows of a packed segment: four tiles, one warpgroup
constexpr int kColumnAlignment = 8;  // columns (planes of tokens) of the activation buffer
constexpr int kDigitTableWords = 8192;

constexpr int chunk_bytes(CodebookId id) {
  return id == CodebookId::kPvq2 ? 512 : id == CodebookId::kPvq3 ? 768 : id == CodebookId::kPvq4 ? 1024 : 2048;
}

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr std::int64_t num_chunks(std::int64_t in_features) { return (in_features + kChunkColumns - 1) / kChunkColumns; }
constexpr std::int64_t padded_rows(std::int64_t rows) { return round_up(rows, kRowAlignment); }
constexpr std::int64_t weight_bytes(CodebookId id, std::int64_t rows, std::int64_t in_features) {
  return padded_rows(rows) / kTileRows * num_chunks(in_features) * chunk_bytes(id);
}

// Byte offset of an activation in the buffer above; `column` of the buffer, `k` the weight's column, below 2^32. (Of unsigned
// numbers division by powers of two is a shift.) Four columns further, from a multiple of 8, the offset is
// offset ^ 16; one column of the buffer further, from an even one, (offset + 128) ^ 16. The buffer is aligned to 256 bytes.
constexpr std::int64_t activation_offset(std::int64_t k, std::int64_t column, std::int64_t padded_columns) {
  const std::uint32_t key = static_cast<std::uint32_t>(k), in_chunk = key % kChunkColumns;
  const std::uint32_t unit = (in_chunk / 32 * 2 + key % 8 / 4) ^ (static_cast<std::uint32_t>(column) & 7);
  return (key / kChunkColumns * padded_columns + column) * kChunkColumns + 16 * unit + key % 32 / 8 * 4 + key % 4;
}

}  // namespace pvq::cuda
