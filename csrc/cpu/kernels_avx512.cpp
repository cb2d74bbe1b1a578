// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI. One zmm holds four columns of the 16 rows of a block; vpdpbusd multiplies it by four activations broadcast
// to all lanes. A group (128 weights) decodes in about 22 instructions and one gather.
#include "../paley.h"
#include "kernels.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

namespace pvq::cpu {
namespace {

#include "finish_loops.h"
#include "vector_loops.h"

struct Decoded {
  __m512i low, high;  // weights 0-3 and 4-7 of each lane, int8
};

inline __mmask64 load_mask(const std::uint8_t* bytes) {
  std::uint64_t mask;
  __builtin_memcpy(&mask, bytes, sizeof mask);
  return _cvtu64_mask64(mask);
}

// The rungs by gain index: the step twice in a dword, so that one 16-bit multiplication serves two bytes (j * step stays below
// 256), and the base four times.
struct Ladder {
  __m512i step, base;
};

inline Ladder load_ladder(const ServingCodebook& book) {
  alignas(64) std::uint32_t step[16], base[16];
  for (int i = 0; i < 16; ++i) {
    step[i] = static_cast<std::uint32_t>(book.gains[0][i & 7].step) * 0x00010001u;
    base[i] = static_cast<std::uint32_t>(book.gains[0][i & 7].base) * 0x01010101u;
  }
  return {_mm512_load_si512(step), _mm512_load_si512(base)};
}

template <CodebookId kId>
struct Decoder {
  static constexpr ServingCodebook kBook = *find_codebook(kId);
  static_assert(kBook.shape_bits == 13 && kBook.num_gains == 8);
  const int* digits = reinterpret_cast<const int*>(digit_table(kId));
  const Ladder ladder = load_ladder(kBook);

  inline Decoded operator()(const std::uint8_t* group) const {
    const __m512i ones = _mm512_set1_epi8(-1);
    const __m512i code = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(group)));
    const __m512i word = _mm512_i32gather_epi32(_mm512_srli_epi32(code, 3), digits, 4);
    // vpermd looks at the low four bits: the gain, and one bit of the shape that the doubled ladder ignores.
    const __m512i step = _mm512_permutexvar_epi32(code, ladder.step), base = _mm512_permutexvar_epi32(code, ladder.base);
    constexpr int r = kBook.refinement_bits;
    const __m512i digit_mask = _mm512_set1_epi8(15 << r);
    __m512i low = _mm512_and_si512(_mm512_slli_epi32(word, r), digit_mask);
    __m512i high = _mm512_and_si512(_mm512_srli_epi32(word, 4 - r), digit_mask);
    if constexpr (r == 1) {
      const __m512i one = _mm512_set1_epi8(1);
      low = _mm512_mask_add_epi8(low, load_mask(group + 48), low, one);
      high = _mm512_mask_add_epi8(high, load_mask(group + 56), high, one);
    }
    low = _mm512_add_epi8(_mm512_mullo_epi16(low, step), base);
    high = _mm512_add_epi8(_mm512_mullo_epi16(high, step), base);
    low = _mm512_mask_sub_epi8(low, load_mask(group + 32), ones, low);  // -1 - b = ~b
    high = _mm512_mask_sub_epi8(high, load_mask(group + 40), ones, high);
    return {low, high};
  }
};

template <>
struct Decoder<CodebookId::kPvq2> {
  const int* magnitudes = reinterpret_cast<const int*>(pvq2_magnitudes());

  inline Decoded operator()(const std::uint8_t* group) const {
    const __m512i ones = _mm512_set1_epi8(-1);
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group)));
    __m512i low = _mm512_i32gather_epi32(code, magnitudes, 4);
    __m512i high = _mm512_i32gather_epi32(code, magnitudes + 256, 4);
    low = _mm512_mask_sub_epi8(low, load_mask(group + 16), ones, low);
    high = _mm512_mask_sub_epi8(high, load_mask(group + 24), ones, high);
    return {low, high};
  }
};

template <>
struct Decoder<CodebookId::kInt8> {
  inline Decoded operator()(const std::uint8_t* group) const {
    return {_mm512_loadu_si512(group), _mm512_loadu_si512(group + 64)};
  }
};

template <CodebookId kId>
void decode(const std::uint8_t* block, int num_groups, std::int8_t* panel) {
  const Decoder<kId> decoder;
  for (int g = 0; g < num_groups; ++g, block += kBlockBytes[static_cast<int>(kId)], panel += 128) {
    const Decoded q = decoder(block);
    _mm512_storeu_si512(panel, q.low);
    _mm512_storeu_si512(panel + 64, q.high);
  }
}

inline __m512i broadcast4(const std::uint8_t* a) {
  int word;
  __builtin_memcpy(&word, a, sizeof word);
  return _mm512_set1_epi32(word);
}

template <CodebookId kId, int kRows>
void dot_rows(const DotArgs& p) {
  const Decoder<kId> decoder;
  __m512i sum[kRows], sum_high[kRows];  // two chains a row hide the latency of vpdpbusd
  for (int row = 0; row < kRows; ++row) sum[row] = sum_high[row] = _mm512_setzero_si512();
  const std::uint8_t* group = p.block;
  const std::uint8_t* a = p.activations;
  for (int g = 0; g < p.num_groups; ++g, group += kBlockBytes[static_cast<int>(kId)], a += kGroupSize) {
    const Decoded q = decoder(group);
    for (int row = 0; row < kRows; ++row) {
      sum[row] = _mm512_dpbusd_epi32(sum[row], broadcast4(a + row * p.stride), q.low);
      sum_high[row] = _mm512_dpbusd_epi32(sum_high[row], broadcast4(a + row * p.stride + 4), q.high);
    }
  }
  for (int row = 0; row < kRows; ++row) _mm512_storeu_si512(p.sums + row * kLanes, _mm512_add_epi32(sum[row], sum_high[row]));
}

#include "dot_by_rows.h"
#include "kernel_table.h"

constexpr CpuKernels kTable = make_table("avx512", 128);

}  // namespace

const CpuKernels* avx512_vnni_kernels() { return &kTable; }

}  // namespace pvq::cpu
#else
namespace pvq::cpu {
const CpuKernels* avx512_vnni_kernels() { return nullptr; }
}  // namespace pvq::cpu
#endif
