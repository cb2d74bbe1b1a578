// SPDX-License-Identifier: Apache-2.0
// The serving codebooks pvq2, pvq3, pvq4: the ONE definition that C++, CUDA and the Python reference share.
//
// A group is D = 8 weights. Its magnitudes are a point m of one of a few integer pyramids,
//
//     P(D, K) = { m in Z^D : m_i >= 0, sum m_i = K },    |P(D, K)| = C(K + D - 1, D - 1),
//
// refined by r plain bits and made odd, so that no coordinate is zero and the signs are D plain bits:
//
//     v_i = 2^(r+1) m_i + 2 f_i + 1,    b_i = (v_i G) >> t,    q_i = sign_i ? ~b_i : b_i,    w_i = (q_i + 1/2) row_scale.
//
//   K           1    2    3     4     5     6     7     8
//   |P(8, K)|   8   36  120   330   792  1716  3432  6435
//
// Joining pyramids fills the index: 13 bits hold 8192 codewords, P(8,8) + P(8,6) + P(8,2) are 8187 of them. Against
// P(8,8) alone that is worth 0.5 dB at 4 bits and 0.25 dB at 3 (docs/format.md, benchmarks/snr.py).
#pragma once

#include <cstdint>
#include <vector>

namespace pvq {

constexpr int kGroupSize = 8;  // D
constexpr int kMaxPyramids = 3;
constexpr int kMaxGains = 8;
constexpr int kMaxDigit = 8;  // largest K: a digit fits in four bits
constexpr int kMaxMagnitude = 127;  // b_i fits in seven bits, so ~b_i fits in int8

enum class CodebookId : int { kPvq2 = 0, kPvq3 = 1, kPvq4 = 2, kInt8 = 3 };

struct ServingCodebook {
  CodebookId id;
  const char* name;
  int bytes_per_group;  // B: bits per weight, and bytes per group of eight
  int num_pyramids;
  int pyramids[kMaxPyramids];  // K of each, in the order of the shape index
  int shape_bits;              // the shape is in the low bits of the code, the gain index above it
  int refinement_bits;         // r
  int shift;                   // t
  int num_gains;
  int gains[kMaxPyramids][kMaxGains];  // G by pyramid and gain index
  float target_rms;  // of a row in int8 units: where the ladder of gains fits a Gaussian row best (benchmarks/snr.py)
};

// clang-format off
constexpr ServingCodebook kServingCodebooks[] = {
    {CodebookId::kPvq2, "pvq2", 2, 2, {3, 1, 0}, 7, 0, 0, 2,
     {{13, 19}, {12, 25}, {}}, 33.0f},
    {CodebookId::kPvq3, "pvq3", 3, 3, {8, 6, 2}, 13, 0, 0, 8,
     {{5, 6, 7, 8, 9, 11, 13, 15}, {5, 6, 7, 8, 9, 11, 13, 15}, {5, 6, 7, 8, 9, 11, 13, 15}}, 29.0f},
    {CodebookId::kPvq4, "pvq4", 4, 3, {8, 6, 2}, 13, 1, 1, 8,
     {{6, 7, 8, 9, 10, 11, 12, 14}, {6, 7, 8, 9, 10, 11, 12, 14}, {6, 7, 8, 9, 10, 11, 12, 14}}, 31.0f},
};
// clang-format on

constexpr int num_compositions(int parts, int total) {  // C(total + parts - 1, parts - 1)
  std::uint64_t count = 1;
  for (int i = 1; i < parts; ++i) count = count * static_cast<std::uint64_t>(total + i) / static_cast<std::uint64_t>(i);
  return static_cast<int>(count);
}

constexpr int num_shapes(const ServingCodebook& book) {
  int count = 0;
  for (int p = 0; p < book.num_pyramids; ++p) count += num_compositions(kGroupSize, book.pyramids[p]);
  return count;
}

constexpr const ServingCodebook* find_codebook(CodebookId id) {
  for (const ServingCodebook& book : kServingCodebooks)
    if (book.id == id) return &book;
  return nullptr;
}

// A shape as eight 4-bit digits: byte i holds m_i in its low and m_(4+i) in its high nibble, so that one mask and one shift
// expand a word into two words of four bytes.
inline std::uint32_t pack_digits(const int* m) {
  std::uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= static_cast<std::uint32_t>(m[i] | (m[4 + i] << 4)) << (8 * i);
  return word;
}

inline void unpack_digits(std::uint32_t word, int* m) {
  for (int i = 0; i < 4; ++i) {
    m[i] = static_cast<int>(word >> (8 * i)) & 15;
    m[4 + i] = static_cast<int>(word >> (8 * i + 4)) & 15;
  }
}

// All shapes of a codebook as digit words, by index: pyramids in their order, each in ascending lexicographic order.
std::vector<std::uint32_t> shape_table(const ServingCodebook& book);

// Index of a point m of pyramid number `pyramid` of the codebook; the inverse of shape_table.
int shape_index(const ServingCodebook& book, int pyramid, const int* m);

}  // namespace pvq
