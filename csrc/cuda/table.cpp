// SPDX-License-Identifier: Apache-2.0
#include "layout.h"
#include "linear.h"

namespace pvq::cuda {

std::vector<std::uint32_t> device_table(CodebookId id) {
  if (id == CodebookId::kInt8) return {};
  if (id == CodebookId::kPvq2) return pvq2_code_magnitudes();
  std::vector<std::uint32_t> table = shape_table(*find_codebook(id));
  // Each doubled: of byte b, leaf low in bits 1-4, leaf high in bits 5-7 and bit 0 of the next byte (of the first one, for the
  // last: only a point with a single coordinate has a digit of 8).
  for (std::uint32_t& digits : table) digits = digits << 1 | digits >> 31;
  table.resize(kDigitTableWords, 0);
  return table;
}

}  // namespace pvq::cuda
