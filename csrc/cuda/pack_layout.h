// SPDX-License-Identifier: Apache-2.0
// One group of eight weights to its bits of a lane's words (layout.h), on the host and on the device.
#pragma once

#include <cstdint>

#include "layout.h"

namespace pvq::cuda {

constexpr int lane_words(CodebookId id) { return chunk_bytes(id) / 128; }  // 32-bit words of a chunk that one lane owns

// Bits of eight weights, weight i in bit i, to byte i % 4: to its bit `low` or `high`, of the leaves low and high of a group.
PVQ_HOST_DEVICE std::uint32_t spread_bits(std::uint32_t bits, int low, int high) {
  std::uint32_t word = 0;
  for (int i = 0; i < kGroupSize; ++i) word |= (bits >> i & 1u) << (8 * (i % 4) + (i < 4 ? low : high));
  return word;
}

// pvq2 and pvq3: the signs of both row halves of two steps share a word.
PVQ_HOST_DEVICE std::uint32_t spread_signs(std::uint32_t signs, int s, int h) {
  const int low = 7 - 4 * (s & 1) - 2 * h;
  return spread_bits(signs, low, low - 1);
}

PVQ_HOST_DEVICE std::uint32_t word_at(const std::uint8_t* bytes) {
  return bytes[0] | static_cast<std::uint32_t>(bytes[1]) << 8 | static_cast<std::uint32_t>(bytes[2]) << 16 |
         static_cast<std::uint32_t>(bytes[3]) << 24;
}

// The group of step s and row half h (0: row g, 1: row g + 8) of a lane. Words are in the order of the planes: pvq4 code[4]
// bits[4], pvq3 code[4] bits[2], pvq2 code[2] bits[2], int8 fragment[4][4].
template <CodebookId kId>
PVQ_HOST_DEVICE void add_group(const std::uint8_t* bytes, int s, int h, std::uint32_t (&words)[lane_words(kId)]) {
  if constexpr (kId == CodebookId::kInt8) {
    words[4 * s + h] = word_at(bytes);
    words[4 * s + 2 + h] = word_at(bytes + 4);
  } else if constexpr (kId == CodebookId::kPvq2) {
    words[s / 2] |= static_cast<std::uint32_t>(bytes[0]) << (16 * (s & 1) + 8 * h);
    words[2 + s / 2] |= spread_signs(bytes[1], s, h);
  } else {
    const std::uint32_t code = bytes[0] | static_cast<std::uint32_t>(bytes[1]) << 8, shape = code & 0x1fffu, gain = code >> 13;
    words[s] |= h == 0 ? shape << 2 | gain << 28 : shape << 15 | gain << 31 | gain >> 1;
    if constexpr (kId == CodebookId::kPvq4)
      words[4 + s] |= spread_bits(bytes[2], 7 - 4 * h, 6 - 4 * h) | spread_bits(bytes[3], h, h + 4);
    else
      words[4 + s / 2] |= spread_signs(bytes[2], s, h);
  }
}

// Byte offset in a chunk of word `word` of a lane: planes of uint4, then for pvq3 a plane of uint2.
template <CodebookId kId>
constexpr PVQ_HOST_DEVICE int lane_word_offset(int word, int lane) {
  return kId == CodebookId::kPvq3 && word >= 4 ? 512 + 8 * lane + 4 * (word - 4) : 512 * (word / 4) + 16 * lane + 4 * (word % 4);
}

}  // namespace pvq::cuda
