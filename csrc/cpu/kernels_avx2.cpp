// SPDX-License-Identifier: Apache-2.0
// AVX2: the decoder of kernels_avx512.cpp on half as many lanes. Its multiplier (vpmaddubsw) saturates, so products are taken
// from 16-bit words (vpmaddwd), which cannot overflow.
#include "../paley.h"
#include "kernels.h"

#ifdef __AVX2__
#include <immintrin.h>

namespace pvq::cpu {
namespace {

#include "finish_loops.h"
#include "vector_loops.h"

// Bytes of 0xFF where the bit of a 32-bit mask is set.
inline __m256i expand_mask(const std::uint8_t* bytes) {
  int mask;
  __builtin_memcpy(&mask, bytes, sizeof mask);
  const __m256i byte_of_bit = _mm256_setr_epi64x(0x0000000000000000, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(mask), byte_of_bit), bit), bit);
}

struct Decoded {
  __m256i low, high;  // weights 0-3 and 4-7 of eight lanes, int8
};

template <CodebookId kId>
struct Decoder {
  static constexpr ServingCodebook kBook = *find_codebook(kId);
  static_assert(kBook.shape_bits == 13 && kBook.num_gains == 8);
  const int* digits = reinterpret_cast<const int*>(digit_table(kId));
  __m256i steps, bases;

  Decoder() {
    alignas(32) std::uint32_t step[8], base[8];
    for (int i = 0; i < 8; ++i) {
      step[i] = static_cast<std::uint32_t>(kBook.gains[0][i].step) * 0x00010001u;
      base[i] = static_cast<std::uint32_t>(kBook.gains[0][i].base) * 0x01010101u;
    }
    steps = _mm256_load_si256(reinterpret_cast<const __m256i*>(step));
    bases = _mm256_load_si256(reinterpret_cast<const __m256i*>(base));
  }

  inline Decoded operator()(const std::uint8_t* group, int half) const {
    const __m256i code = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group + 16 * half)));
    const __m256i word = _mm256_i32gather_epi32(digits, _mm256_srli_epi32(code, 3), 4);
    const __m256i step = _mm256_permutevar8x32_epi32(steps, code), base = _mm256_permutevar8x32_epi32(bases, code);
    constexpr int r = kBook.refinement_bits;
    const __m256i digit_mask = _mm256_set1_epi8(15 << r);
    __m256i low = _mm256_and_si256(_mm256_slli_epi32(word, r), digit_mask);
    __m256i high = _mm256_and_si256(_mm256_srli_epi32(word, 4 - r), digit_mask);
    if constexpr (r == 1) {
      const __m256i one = _mm256_set1_epi8(1);
      low = _mm256_or_si256(low, _mm256_and_si256(expand_mask(group + 48 + 4 * half), one));
      high = _mm256_or_si256(high, _mm256_and_si256(expand_mask(group + 56 + 4 * half), one));
    }
    low = _mm256_add_epi8(_mm256_mullo_epi16(low, step), base);
    high = _mm256_add_epi8(_mm256_mullo_epi16(high, step), base);
    return {_mm256_xor_si256(low, expand_mask(group + 32 + 4 * half)),
            _mm256_xor_si256(high, expand_mask(group + 40 + 4 * half))};
  }
};

template <>
struct Decoder<CodebookId::kPvq2> {
  const int* magnitudes = reinterpret_cast<const int*>(pvq2_magnitudes());

  inline Decoded operator()(const std::uint8_t* group, int half) const {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(group + 8 * half)));
    return {_mm256_xor_si256(_mm256_i32gather_epi32(magnitudes, code, 4), expand_mask(group + 16 + 4 * half)),
            _mm256_xor_si256(_mm256_i32gather_epi32(magnitudes + 256, code, 4), expand_mask(group + 24 + 4 * half))};
  }
};

template <>
struct Decoder<CodebookId::kInt8> {
  inline Decoded operator()(const std::uint8_t* group, int half) const {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 32 * half)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 64 + 32 * half))};
  }
};

template <CodebookId kId>
void decode(const std::uint8_t* block, int num_groups, std::int8_t* panel) {
  const Decoder<kId> decoder;
  for (int g = 0; g < num_groups; ++g, block += kBlockBytes[static_cast<int>(kId)], panel += 128)
    for (int half = 0; half < 2; ++half) {
      const Decoded q = decoder(block, half);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel + 32 * half), q.low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel + 64 + 32 * half), q.high);
    }
}

// Four int8 activations as four 16-bit words in every 64 bits.
inline __m256i broadcast4(const std::uint8_t* a) {
  int word;
  __builtin_memcpy(&word, a, sizeof word);
  return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(word)));
}

inline __m256i widen(__m256i q, int quarter) {
  return _mm256_cvtepi8_epi16(quarter == 0 ? _mm256_castsi256_si128(q) : _mm256_extracti128_si256(q, 1));
}

template <CodebookId kId, int kRows>
void dot_rows(const DotArgs& p) {
  const Decoder<kId> decoder;
  for (int half = 0; half < 2; ++half) {  // eight lanes at a time, so that the sums stay in registers
    __m256i sum[kRows][2];                // [quarter]: two partial sums for each of four lanes
    for (int row = 0; row < kRows; ++row) sum[row][0] = sum[row][1] = _mm256_setzero_si256();
    const std::uint8_t* group = p.block;
    const std::uint8_t* a = p.activations;
    for (int g = 0; g < p.num_groups; ++g, group += kBlockBytes[static_cast<int>(kId)], a += kGroupSize) {
      const Decoded q = decoder(group, half);
      for (int quarter = 0; quarter < 2; ++quarter) {
        const __m256i low = widen(q.low, quarter), high = widen(q.high, quarter);
        for (int row = 0; row < kRows; ++row) {
          const std::uint8_t* row_a = a + row * p.stride;
          sum[row][quarter] = _mm256_add_epi32(sum[row][quarter], _mm256_madd_epi16(low, broadcast4(row_a)));
          sum[row][quarter] = _mm256_add_epi32(sum[row][quarter], _mm256_madd_epi16(high, broadcast4(row_a + 4)));
        }
      }
    }
    for (int row = 0; row < kRows; ++row) {
      // hadd works within 128-bit halves: lanes come out as 0 1 4 5 | 2 3 6 7.
      const __m256i pairs = _mm256_hadd_epi32(sum[row][0], sum[row][1]);
      const __m256i lanes = _mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p.sums + row * kLanes + 8 * half), lanes);
    }
  }
}

#include "dot_by_rows.h"
#include "kernel_table.h"

constexpr CpuKernels kTable = make_table("avx2", 0);

}  // namespace

const CpuKernels* avx2_kernels() { return &kTable; }

}  // namespace pvq::cpu
#else
namespace pvq::cpu {
const CpuKernels* avx2_kernels() { return nullptr; }
}  // namespace pvq::cpu
#endif
