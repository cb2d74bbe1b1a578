// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <cstring>

#include "linear.h"
#include "parallel.h"

namespace pvq::cpu {
namespace {

// q of one group from its bytes (docs/format.md §4.1); false if the code is out of range.
bool decode_group(CodebookId id, const std::uint32_t* digits, const std::uint8_t* bytes, std::int8_t* q) {
  if (id == CodebookId::kInt8) {
    std::memcpy(q, bytes, kGroupSize);
    bool valid = true;
    for (int i = 0; i < kGroupSize; ++i) valid &= q[i] != -128;
    return valid;
  }
  const ServingCodebook& book = *find_codebook(id);
  const bool wide = book.shape_bits > 8;
  const int code = wide ? bytes[0] | bytes[1] << 8 : bytes[0];
  const int shape = code & ((1 << book.shape_bits) - 1), gain_index = code >> book.shape_bits;
  if (shape >= num_shapes(book)) return false;
  int pyramid = 0;
  for (int first = num_compositions(kGroupSize, book.pyramids[0]); shape >= first;
       first += num_compositions(kGroupSize, book.pyramids[pyramid]))
    ++pyramid;
  const Rung gain = book.gains[pyramid][gain_index];
  const int signs = bytes[wide ? 2 : 1], refinement = book.refinement_bits == 1 ? bytes[3] : 0;
  int m[kGroupSize];
  unpack_digits(digits[shape], m);
  for (int i = 0; i < kGroupSize; ++i) {
    const int b = gain.base + gain.step * ((m[i] << book.refinement_bits) + (refinement >> i & 1));
    if (b > kMaxMagnitude) return false;
    q[i] = static_cast<std::int8_t>((signs >> i & 1) != 0 ? ~b : b);
  }
  return true;
}

void set_bits(std::uint8_t* masks, int lane, int bits) {  // eight bits of a lane into the low and the high mask
  for (int half = 0; half < 2; ++half) {
    const int nibble = bits >> (4 * half) & 15;
    masks[8 * half + lane / 2] |= static_cast<std::uint8_t>(nibble << (4 * (lane & 1)));
  }
}

void pack_group(CodebookId id, const std::uint8_t* bytes, int lane, std::uint8_t* out) {
  switch (id) {
    case CodebookId::kPvq2:
      out[lane] = bytes[0];
      set_bits(out + 16, lane, bytes[1]);
      break;
    case CodebookId::kPvq3:
    case CodebookId::kPvq4: {
      const unsigned code = bytes[0] | static_cast<unsigned>(bytes[1]) << 8;
      const std::uint16_t turned = static_cast<std::uint16_t>(code << 3 | code >> 13);  // the gain first: see kernels.h
      std::memcpy(out + 2 * lane, &turned, 2);
      set_bits(out + 32, lane, bytes[2]);
      if (id == CodebookId::kPvq4) set_bits(out + 48, lane, bytes[3]);
      break;
    }
    case CodebookId::kInt8:
      std::memcpy(out + 4 * lane, bytes, 4);
      std::memcpy(out + 64 + 4 * lane, bytes + 4, 4);
      break;
  }
}

void keep_smallest(std::atomic<std::int64_t>& smallest, std::int64_t row) {
  std::int64_t seen = smallest.load();
  while ((seen < 0 || row < seen) && !smallest.compare_exchange_weak(seen, row)) {
  }
}

}  // namespace

std::int64_t pack_segment(CodebookId codebook, const std::uint8_t* codes, std::int64_t rows, std::int64_t in_features,
                          std::uint8_t* weight, std::int32_t* row_sum) {
  const std::int64_t groups = in_features / kGroupSize, blocks = (rows + kLanes - 1) / kLanes;
  const std::int64_t group_bytes = kBlockBytes[static_cast<int>(codebook)];
  const int code_bytes = bytes_per_group(codebook);
  const std::uint32_t* digits = digit_table(codebook);
  std::atomic<std::int64_t> invalid{-1};
  parallel_for(blocks, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t block = begin; block < end; ++block) {
      std::uint8_t* out = weight + block * groups * group_bytes;
      std::memset(out, 0, static_cast<std::size_t>(groups * group_bytes));
      for (int lane = 0; lane < kLanes; ++lane) {
        const std::int64_t row = block * kLanes + lane;
        std::int32_t sum = 0;
        for (std::int64_t g = 0; row < rows && g < groups; ++g) {
          const std::uint8_t* bytes = codes + (row * groups + g) * code_bytes;
          std::int8_t q[kGroupSize];
          if (!decode_group(codebook, digits, bytes, q)) {
            keep_smallest(invalid, row);
            break;
          }
          pack_group(codebook, bytes, lane, out + g * group_bytes);
          for (int i = 0; i < kGroupSize; ++i) sum += q[i];
        }
        row_sum[row] = sum;
      }
    }
  });
  return invalid.load();
}

std::int64_t decode_codes(CodebookId codebook, const std::uint8_t* codes, std::int64_t rows, std::int64_t in_features,
                          std::int8_t* q) {
  const std::int64_t groups = in_features / kGroupSize;
  const int code_bytes = bytes_per_group(codebook);
  const std::uint32_t* digits = digit_table(codebook);
  std::atomic<std::int64_t> invalid{-1};
  parallel_for(rows, 16, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t row = begin; row < end; ++row)
      for (std::int64_t g = 0; g < groups; ++g)
        if (!decode_group(codebook, digits, codes + (row * groups + g) * code_bytes, q + row * in_features + g * kGroupSize)) {
          keep_smallest(invalid, row);
          break;
        }
  });
  return invalid.load();
}

}  // namespace pvq::cpu
