// SPDX-License-Identifier: Apache-2.0
#include "layout.h"
#include "linear.h"

namespace pvq::cuda {

std::vector<std::uint32_t> device_table(CodebookId id) {
  if (id == CodebookId::kInt8) return {};
  if (id == CodebookId::kPvq2) return pvq2_code_magnitudes();
  std::vector<std::uint32_t> table = shape_table(*find_codebook(id));
  table.resize(kDigitTableWords, 0);
  return table;
}

}  // namespace pvq::cuda
