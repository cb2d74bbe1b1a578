// SPDX-License-Identifier: Apache-2.0
#include "layout.h"
#include "linear.h"

namespace pvq::cuda {
namespace {

// Magnitudes of all 256 codes of pvq2 (shape in bits 0-6, gain in bit 7) as bytes: two words a code.
std::vector<std::uint32_t> pvq2_magnitudes(const ServingCodebook& book, const std::vector<std::uint32_t>& digits) {
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

}  // namespace

std::vector<std::uint32_t> device_table(CodebookId id) {
  if (id == CodebookId::kInt8) return {};
  const ServingCodebook& book = *find_codebook(id);
  std::vector<std::uint32_t> table = shape_table(book);
  if (id == CodebookId::kPvq2) return pvq2_magnitudes(book, table);
  table.resize(kDigitTableWords, 0);
  return table;
}

}  // namespace pvq::cuda
