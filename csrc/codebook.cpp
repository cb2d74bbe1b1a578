// SPDX-License-Identifier: Apache-2.0
#include "codebook.h"

namespace pvq {
namespace {

void append_compositions(int position, int left, int* m, std::vector<std::uint32_t>& table) {
  if (position == kGroupSize - 1) {
    m[position] = left;
    table.push_back(pack_digits(m));
    return;
  }
  for (int value = 0; value <= left; ++value) {
    m[position] = value;
    append_compositions(position + 1, left - value, m, table);
  }
}

// num_compositions by table: shape_index is in the quantizer's inner loop.
struct CompositionTable {
  int count[kGroupSize + 1][kMaxDigit + 1] = {};
  constexpr CompositionTable() {
    for (int parts = 1; parts <= kGroupSize; ++parts)
      for (int total = 0; total <= kMaxDigit; ++total) count[parts][total] = num_compositions(parts, total);
  }
};
constexpr CompositionTable kCompositions;

}  // namespace

std::vector<std::uint32_t> shape_table(const ServingCodebook& book) {
  std::vector<std::uint32_t> table;
  table.reserve(static_cast<std::size_t>(num_shapes(book)));
  int m[kGroupSize];
  for (int p = 0; p < book.num_pyramids; ++p) append_compositions(0, book.pyramids[p], m, table);
  return table;
}

std::vector<std::uint32_t> pvq2_code_magnitudes() {
  const ServingCodebook& book = *find_codebook(CodebookId::kPvq2);
  const std::vector<std::uint32_t> digits = shape_table(book);
  std::vector<std::uint32_t> words(512, 0);
  for (unsigned code = 0; code < 256; ++code) {
    const int shape = static_cast<int>(code & 127);
    const Rung gain = book.gains[shape < num_compositions(kGroupSize, book.pyramids[0]) ? 0 : 1][code >> 7];
    int m[kGroupSize];
    unpack_digits(digits[static_cast<std::size_t>(shape)], m);
    for (int i = 0; i < kGroupSize; ++i)
      words[2 * code + static_cast<unsigned>(i / 4)] |= static_cast<std::uint32_t>(gain.base + gain.step * m[i]) << (8 * (i % 4));
  }
  return words;
}

int shape_index(const ServingCodebook& book, int pyramid, const int* m) {
  int index = 0;
  for (int p = 0; p < pyramid; ++p) index += kCompositions.count[kGroupSize][book.pyramids[p]];
  int left = book.pyramids[pyramid];
  for (int i = 0; i < kGroupSize - 1; ++i) {
    // Skip the compositions with a smaller value at position i: the sum of count[parts - 1][left - v] over v < m_i telescopes.
    const int parts = kGroupSize - i;
    index += kCompositions.count[parts][left] - kCompositions.count[parts][left - m[i]];
    left -= m[i];
  }
  return index;
}

}  // namespace pvq
