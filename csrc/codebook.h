// SPDX-License-Identifier: Apache-2.0
// The serving codebooks pvq2, pvq3, pvq4: the ONE definition that C++, CUDA and the Python reference share.
//
// A group is D = 8 weights. Its magnitudes are a point m of one of a few integer pyramids,
//
//     P(D, K) = { m in Z^D : m_i >= 0, sum m_i = K },    |P(D, K)| = C(K + D - 1, D - 1),
//
// refined by r plain bits a coordinate. The gain is a rung of a ladder of (base, step), in int8 units, and no magnitude is zero,
// so the signs are D plain bits:
//
//     j_i = 2^r m_i + f_i,    b_i = base + step j_i,    q_i = sign_i ? ~b_i : b_i,    w_i = (q_i + 1/2) row_scale.
//
// With base = step / 2 this is the pyramid with odd coordinates. Four j_i in a word stay below 256, so one 32-bit multiplication
// and one addition make four magnitudes.
//
//   K           1    2    3     4     5     6     7     8
//   |P(8, K)|   8   36  120   330   792  1716  3432  6435
//
// Joining pyramids fills the index: 13 bits hold 8192 codewords, P(8,8) + P(8,6) + P(8,2) are 8187 of them. Against P(8,8) alone
// that is worth 0.5 dB at 4 bits and 0.25 dB at 3; a free base is worth 0.2 dB at 3 bits (docs/format.md §9, benchmarks/snr.py).
#pragma once

#include <cstdint>
#include <vector>

namespace pvq {

constexpr int kGroupSize = 8;  // D
constexpr int kMaxPyramids = 3;
constexpr int kMaxGains = 8;
constexpr int kMaxDigit = 8;        // largest K: a digit fits in four bits
constexpr int kMaxMagnitude = 127;  // b_i fits in seven bits, so ~b_i fits in int8

enum class CodebookId : int { kPvq2 = 0, kPvq3 = 1, kPvq4 = 2, kInt8 = 3 };

struct Rung {
  int base, step;
};

struct ServingCodebook {
  CodebookId id;
  const char* name;
  int bytes_per_group;  // B: bits per weight, and bytes per group of eight
  int num_pyramids;
  int pyramids[kMaxPyramids];  // K of each, in the order of the shape index
  int shape_bits;              // the shape is in the low bits of the code, the gain index above it
  int refinement_bits;         // r
  int num_gains;
  Rung gains[kMaxPyramids][kMaxGains];  // by pyramid and gain index
  float target_rms;                     // of a row in int8 units: where the ladder fits a Gaussian row best (benchmarks/snr.py)
};

constexpr ServingCodebook make_pvq2() {
  return {CodebookId::kPvq2, "pvq2", 2, 2, {3, 1, 0}, 7, 0, 2, {{{14, 24}, {20, 34}}, {{12, 18}, {12, 35}}, {}}, 33.0f};
}

constexpr ServingCodebook make_joined(CodebookId id, const char* name, int bytes, int refinement_bits, float target_rms,
                                      const Rung (&gains)[kMaxGains]) {
  ServingCodebook book{id, name, bytes, 3, {8, 6, 2}, 13, refinement_bits, kMaxGains, {}, target_rms};
  for (int p = 0; p < 3; ++p)
    for (int g = 0; g < kMaxGains; ++g) book.gains[p][g] = gains[g];  // the three pyramids share one ladder
  return book;
}

constexpr ServingCodebook kServingCodebooks[] = {
    make_pvq2(),
    make_joined(CodebookId::kPvq3, "pvq3", 3, 0, 29.0f,
                {{5, 10}, {6, 12}, {7, 14}, {15, 14}, {8, 16}, {7, 20}, {10, 22}, {17, 22}}),
    make_joined(CodebookId::kPvq4, "pvq4", 4, 1, 31.0f, {{2, 6}, {3, 7}, {4, 8}, {4, 9}, {5, 10}, {6, 11}, {8, 12}, {8, 14}}),
};

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

constexpr int bytes_per_group(CodebookId id) {  // of a checkpoint's codes
  return id == CodebookId::kInt8 ? kGroupSize : find_codebook(id)->bytes_per_group;
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

// Magnitudes of all 256 codes of pvq2 (shape in bits 0-6, gain in bit 7) as bytes, [256][2] words: weights 0-3, 4-7.
std::vector<std::uint32_t> pvq2_code_magnitudes();

// Index of a point m of pyramid number `pyramid` of the codebook; the inverse of shape_table.
int shape_index(const ServingCodebook& book, int pyramid, const int* m);

}  // namespace pvq
