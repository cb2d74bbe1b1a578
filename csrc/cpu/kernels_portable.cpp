// SPDX-License-Identifier: Apache-2.0
// Plain C++: the version to read first, and the one for machines without AVX2.
#include "../paley.h"
#include "kernels.h"

namespace pvq::cpu {
namespace {

#include "finish_loops.h"
#include "vector_loops.h"

template <CodebookId kId>
inline void decode_group(const std::uint8_t* group, std::int8_t* panel /* [2][kLanes][4] */) {
  constexpr ServingCodebook kBook = *find_codebook(kId);
  constexpr int kCodeBytes = kId == CodebookId::kPvq2 ? 1 : 2;
  const std::uint32_t* digits = digit_table(kId);
  const std::uint8_t* signs = group + kCodeBytes * kLanes;
  const std::uint8_t* refinement = signs + 16;
  for (int lane = 0; lane < kLanes; ++lane) {
    int m[kGroupSize];
    Rung gain{};
    if constexpr (kId == CodebookId::kPvq2) {
      const int code = group[lane], shape = code & 127;
      unpack_digits(digits[shape], m);
      gain = kBook.gains[shape < num_compositions(kGroupSize, kBook.pyramids[0]) ? 0 : 1][code >> 7];
    } else {
      const int code = group[2 * lane] | group[2 * lane + 1] << 8;
      unpack_digits(digits[code >> 3], m);
      gain = kBook.gains[0][code & 7];
    }
    for (int i = 0; i < kGroupSize; ++i) {
      const int bit = 4 * lane + (i & 3), byte = 8 * (i >> 2) + (bit >> 3);
      const int sign = signs[byte] >> (bit & 7) & 1;
      int j = m[i] << kBook.refinement_bits;
      if constexpr (kBook.refinement_bits == 1) j += refinement[byte] >> (bit & 7) & 1;
      const int b = gain.base + gain.step * j;
      panel[((i >> 2) * kLanes + lane) * 4 + (i & 3)] = static_cast<std::int8_t>(sign ? ~b : b);
    }
  }
}

template <>
inline void decode_group<CodebookId::kInt8>(const std::uint8_t* group, std::int8_t* panel) {
  __builtin_memcpy(panel, group, 2 * kLanes * 4);
}

template <CodebookId kId>
void decode(const std::uint8_t* block, int num_groups, std::int8_t* panel) {
  for (int g = 0; g < num_groups; ++g)
    decode_group<kId>(block + g * kBlockBytes[static_cast<int>(kId)], panel + g * 2 * kLanes * 4);
}

template <CodebookId kId>
void dot(const DotArgs& p) {
  for (int i = 0; i < p.num_rows * kLanes; ++i) p.sums[i] = 0;
  std::int8_t panel[2 * kLanes * 4];
  for (int g = 0; g < p.num_groups; ++g) {
    decode_group<kId>(p.block + g * kBlockBytes[static_cast<int>(kId)], panel);
    for (int row = 0; row < p.num_rows; ++row) {
      const std::int8_t* a = reinterpret_cast<const std::int8_t*>(p.activations + row * p.stride + g * kGroupSize);
      for (int lane = 0; lane < kLanes; ++lane) {
        std::int32_t sum = 0;
        for (int i = 0; i < 4; ++i) sum += panel[4 * lane + i] * a[i] + panel[4 * (kLanes + lane) + i] * a[4 + i];
        p.sums[row * kLanes + lane] += sum;
      }
    }
  }
}

#include "kernel_table.h"

constexpr CpuKernels kTable = make_table("portable", 0);

}  // namespace

const CpuKernels* portable_kernels() { return &kTable; }

}  // namespace pvq::cpu
