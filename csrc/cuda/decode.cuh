// SPDX-License-Identifier: Apache-2.0
// A lane's part of a packed chunk (layout.h) to the int8 fragments A of the tensor cores.
#pragma once

#include <cstdint>

#include "layout.h"
#include "shared_memory.cuh"

namespace pvq::cuda {

struct GainPair {  // of one gain: magnitudes are base4 + step * j, four bytes at once; pvq3: half the step, by 2 m instead of m
  std::uint32_t step, base4;
};

// What decoding reads from shared memory, as 32-bit shared addresses. The digits (for pvq2: magnitudes) are aligned to the power
// of two that holds them, kTableAlignment, and the gains to 64 bytes: an index is then put into an address by the same LOP3 that
// masks it.
struct Tables {
  std::uint32_t digits, gains;
};
constexpr int kGainTableBytes = kMaxGains * sizeof(GainPair);
constexpr int kTableAlignment = kDigitTableWords * 4;
constexpr int table_bytes(CodebookId id) {  // digits alone
  return id == CodebookId::kInt8 ? 0 : id == CodebookId::kPvq2 ? 256 * 8 : kDigitTableWords * 4;
}
constexpr int table_words(CodebookId id) {  // of the global table (device_table)
  return id == CodebookId::kInt8 ? 0 : id == CodebookId::kPvq2 ? 512 : kDigitTableWords;
}

constexpr bool has_even_steps(CodebookId id) {
  for (const Rung& rung : find_codebook(id)->gains[0])
    if (rung.step % 2 != 0) return false;
  return true;
}
static_assert(has_even_steps(CodebookId::kPvq3));

struct Ladder {
  GainPair pairs[kMaxGains];
};
constexpr Ladder make_ladder(CodebookId id) {  // pvq3 and pvq4: one ladder for all pyramids
  Ladder ladder{};
  for (int g = 0; g < kMaxGains; ++g) {
    const Rung rung = find_codebook(id)->gains[0][g];
    ladder.pairs[g] = {static_cast<std::uint32_t>(id == CodebookId::kPvq3 ? rung.step / 2 : rung.step),
                       static_cast<std::uint32_t>(rung.base) * 0x01010101u};
  }
  return ladder;
}

// The gains, kGainTableBytes at `gains`, by the first threads of a block; then synchronize.
template <CodebookId kId>
__device__ __forceinline__ void write_gains(void* gains, int thread) {
  if constexpr (kId == CodebookId::kPvq3 || kId == CodebookId::kPvq4) {
    constexpr Ladder ladder = make_ladder(kId);
#pragma unroll
    for (int g = 0; g < kMaxGains; ++g)
      if (thread == g) static_cast<GainPair*>(gains)[g] = ladder.pairs[g];
  }
}

// Four bytes of 0xff or 0 from the top bits of the bytes. (__byte_perm drops the selector's sign bit.)
__device__ __forceinline__ std::uint32_t sign_masks(std::uint32_t word) {
  std::uint32_t masks;
  asm("prmt.b32 %0, %1, %2, 0xba98;" : "=r"(masks) : "r"(word), "r"(0u));
  return masks;
}

constexpr std::uint32_t kDigitBits = 0x1e1e1e1eu;  // of the bytes of a leaf: twice the digit

// Read once and never again: past the first-level cache.
__device__ __forceinline__ uint4 load_stream(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}
__device__ __forceinline__ uint2 load_stream(const uint2* address) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
}

__device__ __forceinline__ std::uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
__device__ __forceinline__ std::uint32_t word_of(const uint2& v, int i) { return i == 0 ? v.x : v.y; }

// One chunk of one lane. load(): from global memory; read(): from a copy in shared memory. decode(): step s (a compile-time
// constant after unrolling) to a[0] = row g low, a[1] = row g + 8 low, a[2] = row g high, a[3] = row g + 8 high. Its two halves:
// find(), the look-ups, and expand(), the arithmetic, can be apart, so that other work hides the latency between them.
template <CodebookId kId>
struct LaneChunk;

// Of pvq3 and pvq4: both groups of a step.
struct FoundStep {
  std::uint32_t digits[2];
  uint2 gains[2];  // GainPair
};
// Gains before digits: in this order the compiler makes faster code of many_columns_wgmma.cuh.
__device__ __forceinline__ void find_joined(std::uint32_t code, const Tables& tables, FoundStep& found) {
  const std::uint32_t gains = __funnelshift_l(code, code, 4);
  found.gains[0] = shared_pair((gains << 3 & 0x38u) | tables.gains);
  found.gains[1] = shared_pair((gains & 0x38u) | tables.gains);
  found.digits[0] = shared_word((code & 0x7ffcu) | tables.digits);
  found.digits[1] = shared_word(((code >> 13) & 0x7ffcu) | tables.digits);
}

// kDigitBits of `digits`, the other bits of `other`: one instruction (of masks and an or, nvcc 13.0 makes two).
__device__ __forceinline__ std::uint32_t select_digits(std::uint32_t digits, std::uint32_t other) {
  std::uint32_t selected;
  asm("lop3.b32 %0, %1, %2, %3, 0xe2;" : "=r"(selected) : "r"(digits), "n"(kDigitBits), "r"(other));
  return selected;
}

// Both groups of a step, pvq3 and pvq4. kRefined: `bits` are those of pvq4; else they have the sign of leaf l in bit 7 - l of
// each byte. What counts is the number of logical instructions and right shifts: they share a pipe that takes two cycles for
// each, while left shifts are multiplications (docs/kernels_gpu.md).
template <bool kRefined>
__device__ __forceinline__ void expand_joined(const FoundStep& found, std::uint32_t bits, std::uint32_t (&a)[4]) {
  const std::uint32_t low0 = found.digits[0], high0 = __funnelshift_r(low0, low0, 4);
  const std::uint32_t low1 = found.digits[1], high1 = __funnelshift_r(low1, low1, 4);
  const uint2 gain0 = found.gains[0], gain1 = found.gains[1];
  std::uint32_t j0, j1, j2, j3;  // by leaf
  if constexpr (kRefined) {
    // Bits of two leaves, 0 and 4 of each byte. Shifted by 4, one of the next byte comes to bit 4: a digit takes its place.
    const std::uint32_t refine0 = bits & 0x11111111u, refine1 = bits >> 1 & 0x11111111u;
    j0 = select_digits(low0, refine0);
    j1 = select_digits(high0, refine0 >> 4);
    j2 = select_digits(low1, refine1);
    j3 = select_digits(high1, refine1 >> 4);
  } else {
    j0 = low0 & kDigitBits;
    j1 = high0 & kDigitBits;
    j2 = low1 & kDigitBits;
    j3 = high1 & kDigitBits;
  }
  a[0] = (j0 * gain0.x + gain0.y) ^ sign_masks(bits);
  a[2] = (j1 * gain0.x + gain0.y) ^ sign_masks(bits << 1);
  a[1] = (j2 * gain1.x + gain1.y) ^ sign_masks(bits << (kRefined ? 4 : 2));
  a[3] = (j3 * gain1.x + gain1.y) ^ sign_masks(bits << (kRefined ? 5 : 3));
}

template <>
struct LaneChunk<CodebookId::kPvq4> {
  using Found = FoundStep;

  uint4 code, bits;
  __device__ __forceinline__ void load(const std::uint8_t* chunk, int lane) {
    code = load_stream(reinterpret_cast<const uint4*>(chunk) + lane);
    bits = load_stream(reinterpret_cast<const uint4*>(chunk) + 32 + lane);
  }
  __device__ __forceinline__ void read(const char* chunk, int lane) {
    code = *(reinterpret_cast<const uint4*>(chunk) + lane);
    bits = *(reinterpret_cast<const uint4*>(chunk) + 32 + lane);
  }
  __device__ __forceinline__ void find(int s, const Tables& tables, Found& found) const {
    find_joined(word_of(code, s), tables, found);
  }
  __device__ __forceinline__ void expand(int s, const Found& found, std::uint32_t (&a)[4]) const {
    expand_joined<true>(found, word_of(bits, s), a);
  }
};

template <>
struct LaneChunk<CodebookId::kPvq3> {
  using Found = FoundStep;

  uint4 code;
  uint2 bits;
  __device__ __forceinline__ void load(const std::uint8_t* chunk, int lane) {
    code = load_stream(reinterpret_cast<const uint4*>(chunk) + lane);
    bits = load_stream(reinterpret_cast<const uint2*>(chunk + 512) + lane);
  }
  __device__ __forceinline__ void read(const char* chunk, int lane) {
    code = *(reinterpret_cast<const uint4*>(chunk) + lane);
    bits = *(reinterpret_cast<const uint2*>(chunk + 512) + lane);
  }
  __device__ __forceinline__ void find(int s, const Tables& tables, Found& found) const {
    find_joined(word_of(code, s), tables, found);
  }
  __device__ __forceinline__ void expand(int s, const Found& found, std::uint32_t (&a)[4]) const {
    expand_joined<false>(found, word_of(bits, s / 2) << (4 * (s & 1)), a);
  }
};

template <>
struct LaneChunk<CodebookId::kPvq2> {
  using Found = uint2[2];  // by group

  uint4 words;
  __device__ __forceinline__ void load(const std::uint8_t* chunk, int lane) {
    words = load_stream(reinterpret_cast<const uint4*>(chunk) + lane);
  }
  __device__ __forceinline__ void read(const char* chunk, int lane) { words = *(reinterpret_cast<const uint4*>(chunk) + lane); }
  __device__ __forceinline__ void find(int s, const Tables& tables, Found& groups) const {
    const std::uint32_t code = word_of(words, s / 2) >> (16 * (s & 1));
    groups[0] = shared_pair(((code << 3) & 0x7f8u) | tables.digits);
    groups[1] = shared_pair(((code >> 5) & 0x7f8u) | tables.digits);
  }
  __device__ __forceinline__ void expand(int s, const Found& groups, std::uint32_t (&a)[4]) const {
    const std::uint32_t signs = word_of(words, 2 + s / 2) << (4 * (s & 1));
    a[0] = groups[0].x ^ sign_masks(signs);
    a[2] = groups[0].y ^ sign_masks(signs << 1);
    a[1] = groups[1].x ^ sign_masks(signs << 2);
    a[3] = groups[1].y ^ sign_masks(signs << 3);
  }
};

template <>
struct LaneChunk<CodebookId::kInt8> {
  struct Found {};

  uint4 fragment[kSteps];
  __device__ __forceinline__ void load(const std::uint8_t* chunk, int lane) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) fragment[s] = load_stream(reinterpret_cast<const uint4*>(chunk) + 32 * s + lane);
  }
  __device__ __forceinline__ void read(const char* chunk, int lane) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) fragment[s] = *(reinterpret_cast<const uint4*>(chunk) + 32 * s + lane);
  }
  __device__ __forceinline__ void find(int, const Tables&, Found&) const {}
  __device__ __forceinline__ void expand(int s, const Found&, std::uint32_t (&a)[4]) const {
    a[0] = fragment[s].x;
    a[1] = fragment[s].y;
    a[2] = fragment[s].z;
    a[3] = fragment[s].w;
  }
};

template <CodebookId kId>
__device__ __forceinline__ void decode(const LaneChunk<kId>& chunk, int s, const Tables& tables, std::uint32_t (&a)[4]) {
  typename LaneChunk<kId>::Found found;
  chunk.find(s, tables, found);
  chunk.expand(s, found, a);
}

}  // namespace pvq::cuda
