// SPDX-License-Identifier: Apache-2.0
// Codebooks prepared for the kernels of the quantizer (encode.cu, feedback.cu).
#pragma once

#include <stdexcept>

#include "encode_search.cuh"
#include "launch.h"

namespace pvq::cuda::encoding {

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kRowThreads = 64;  // rows are few: small blocks spread them over the multiprocessors
static_assert(kLadders == kGroupSize, "thread i of a group holds weight i and tries ladder i");

constexpr bool shares_gains(const ServingCodebook& book) {
  for (int p = 1; p < book.num_pyramids; ++p)
    for (int g = 0; g < book.num_gains; ++g)
      if (book.gains[p][g].base != book.gains[0][g].base || book.gains[p][g].step != book.gains[0][g].step) return false;
  return true;
}

template <CodebookId kId>
struct Book {
  static constexpr ServingCodebook kBook = *find_codebook(kId);
  static constexpr int kBytes = kBook.bytes_per_group, kRefinement = kBook.refinement_bits;
  static constexpr int kPyramids = shares_gains(kBook) ? kBook.num_pyramids : 1;  // of one ladder
  static constexpr int kNumLadders = kBook.num_gains * kBook.num_pyramids / kPyramids;
  static_assert(kNumLadders <= kLadders, "a ladder for each thread of a group");
};

template <>
struct Book<CodebookId::kInt8> {
  static constexpr int kBytes = kGroupSize;
};

template <CodebookId kId>
Search prepare() {
  Search search{};
  if constexpr (kId != CodebookId::kInt8) {
    using B = Book<kId>;
    constexpr ServingCodebook kBook = B::kBook;
    search.num_ladders = B::kNumLadders;
    search.shape_bits = kBook.shape_bits;
    for (int i = 0; i < B::kNumLadders; ++i) {  // the CPU's order: sets of pyramids, then gains
      Ladder& ladder = search.ladders[i];
      ladder.pyramid = i / kBook.num_gains * B::kPyramids;
      ladder.gain = i % kBook.num_gains;
      const Rung rung = kBook.gains[ladder.pyramid][ladder.gain];
      ladder.base = static_cast<float>(rung.base) + 0.5f;
      ladder.step = static_cast<float>(rung.step);
      ladder.inverse_step = 1.0f / ladder.step;
      ladder.last = (kMaxMagnitude - rung.base) / rung.step;
      for (int k = 0; k < B::kPyramids; ++k) {
        ladder.pulses[k] = kBook.pyramids[ladder.pyramid + k];
        if (k > 0 && ladder.pulses[k] >= ladder.pulses[k - 1]) throw std::logic_error("pyramids of a codebook must fall");
      }
    }
    for (int p = 1; p < kBook.num_pyramids; ++p)
      search.first_shape[p] = search.first_shape[p - 1] + num_compositions(kGroupSize, kBook.pyramids[p - 1]);
    for (int parts = 1; parts <= kGroupSize; ++parts)
      for (int total = 0; total <= kMaxDigit; ++total)
        search.compositions[parts][total] = static_cast<std::uint16_t>(num_compositions(parts, total));
  }
  return search;
}

inline dim3 blocks_of(std::int64_t threads, int block) {
  const std::int64_t blocks = (threads + block - 1) / block;
  if (blocks > 0x7fffffff) throw std::invalid_argument("too many weights for one launch");
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace pvq::cuda::encoding
