// SPDX-License-Identifier: Apache-2.0
// Rotation and activation quantization, written once in plain loops; each kernels_*.cpp includes this file and so compiles it for
// its own instruction set. Every float operation is one that format.md §5 to §7 order, so the width of a vector cannot
// change a bit. Included inside an anonymous namespace, after finish_loops.h; needs kernels.h and paley.h.

// Rounds a float below 2^22 to the nearest integer, ties to even, as rint() does: after adding 1.5 * 2^23 the integer is what the
// low bits have grown by.
inline std::int32_t round_to_integer(float x) {
  constexpr float kMagic = 12582912.0f;
  const float shifted = x + kMagic;
  std::int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4b400000;
}

template <int kChunk>
struct ChunkOf {
  typedef float Type __attribute__((vector_size(kChunk * sizeof(float)), aligned(4)));
};

#if defined(__AVX512F__)
constexpr int kWide = 16;  // floats of a register
#elif defined(__AVX__)
constexpr int kWide = 8;
#else
constexpr int kWide = 4;
#endif

// sum + x * h with h = +-1: the product is exact, so a fused multiply-add rounds as the addition alone does.
template <int kChunk>
inline typename ChunkOf<kChunk>::Type add_signed(typename ChunkOf<kChunk>::Type sum, typename ChunkOf<kChunk>::Type x, float h) {
#ifdef __AVX512F__
  if constexpr (kChunk == 16) return (typename ChunkOf<kChunk>::Type)_mm512_fmadd_ps((__m512)x, _mm512_set1_ps(h), (__m512)sum);
#endif
  return sum + x * h;
}

// One dense factor along its index: out[r][j] = sum over c of H[r][c] in[c][j], j in [0, kChunk), in order of c. Four rows at a
// time hide the latency of the additions.
template <int kChunk>
inline void dense_chunk(const float* in, float* out, std::int64_t run, int order, const float* matrix) {
  using Chunk = typename ChunkOf<kChunk>::Type;
  for (int r = 0; r < order; r += 4) {  // every dense order is a multiple of four
    const float* row = matrix + r * order;
    Chunk x = *reinterpret_cast<const Chunk*>(in);
    Chunk sum0 = x * row[0], sum1 = x * row[order], sum2 = x * row[2 * order], sum3 = x * row[3 * order];
    for (int c = 1; c < order; ++c) {
      x = *reinterpret_cast<const Chunk*>(in + c * run);
      sum0 = add_signed<kChunk>(sum0, x, row[c]);
      sum1 = add_signed<kChunk>(sum1, x, row[order + c]);
      sum2 = add_signed<kChunk>(sum2, x, row[2 * order + c]);
      sum3 = add_signed<kChunk>(sum3, x, row[3 * order + c]);
    }
    *reinterpret_cast<Chunk*>(out + r * run) = sum0;
    *reinterpret_cast<Chunk*>(out + (r + 1) * run) = sum1;
    *reinterpret_cast<Chunk*>(out + (r + 2) * run) = sum2;
    *reinterpret_cast<Chunk*>(out + (r + 3) * run) = sum3;
  }
}

// The same for an order known at compile time, x[c] in registers, x[r] replaced by the result. Every row starts with +x[0], so
// that rows whose first signs agree share their first sums; a row that should start with -x[0] turns all its signs, which changes
// no rounding, and is turned back by its last subtraction. Only the sign of a zero may differ, and no integer sees that.
template <int kOrder, typename Chunk>
inline __attribute__((always_inline)) void dense_registers(Chunk* x) {
  static constexpr PaleyMatrix<kOrder> kMatrix;
  constexpr int kLast = kOrder - 1;
  Chunk out[kOrder];
  const Chunk minus_last = -x[kLast];
#pragma GCC unroll 64
  for (int r = 0; r < kOrder; ++r) {
    const bool* positive = kMatrix.positive[r];
    Chunk sum = x[0];
#pragma GCC unroll 64
    for (int c = 1; c < kLast; ++c) sum = positive[c] == positive[0] ? sum + x[c] : sum - x[c];
    if (positive[0]) {
      out[r] = positive[kLast] ? sum + x[kLast] : sum - x[kLast];
    } else {
      out[r] = (positive[kLast] ? x[kLast] : minus_last) - sum;
    }
  }
#pragma GCC unroll 64
  for (int r = 0; r < kOrder; ++r) x[r] = out[r];
}

template <int kOrder>
inline void dense_fixed(const float* in, float* out, std::int64_t width, std::int64_t run) {  // run % kWide == 0
  using Chunk = ChunkOf<kWide>::Type;
  for (std::int64_t base = 0; base < width; base += run * kOrder)
    for (std::int64_t j = base; j < base + run; j += kWide) {
      Chunk x[kOrder];
#pragma GCC unroll 64
      for (int c = 0; c < kOrder; ++c) x[c] = *reinterpret_cast<const Chunk*>(in + j + c * run);
      dense_registers<kOrder>(x);
#pragma GCC unroll 64
      for (int r = 0; r < kOrder; ++r) *reinterpret_cast<Chunk*>(out + j + r * run) = x[r];
    }
}

inline void dense_factor(const float* in, float* out, std::int64_t width, std::int64_t run, int order, const float* matrix) {
  if (order == 12 && run % kWide == 0) return dense_fixed<12>(in, out, width, run);
  for (std::int64_t base = 0; base < width; base += run * order) {
    std::int64_t j = 0;
    for (; j + 16 <= run; j += 16) dense_chunk<16>(in + base + j, out + base + j, run, order, matrix);
    for (; j + 4 <= run; j += 4) dense_chunk<4>(in + base + j, out + base + j, run, order, matrix);
    for (; j < run; ++j) dense_chunk<1>(in + base + j, out + base + j, run, order, matrix);
  }
}

#ifdef __AVX512F__
// Four vectors of four quarters each, transposed.
inline void transpose_quarters(__m512* v) {
  const __m512 low01 = _mm512_shuffle_f32x4(v[0], v[1], 0x44), high01 = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
  const __m512 low23 = _mm512_shuffle_f32x4(v[2], v[3], 0x44), high23 = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_f32x4(low01, low23, 0x88);
  v[1] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
  v[2] = _mm512_shuffle_f32x4(high01, high23, 0x88);
  v[3] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
}

// Order 12 and then, on the run of four, order 4: the end of 576 = 12 * 12 * 4. Four blocks of 48 at a time, each quarter of a
// vector a block of its own.
inline void dense_12_and_4(float* y, std::int64_t width) {
  const __m512 sign1 = _mm512_setr4_ps(1, -1, 1, -1), sign2 = _mm512_setr4_ps(1, 1, -1, -1);
  for (std::int64_t base = 0; base < width; base += 4 * 48) {
    __m512 x[12];
#pragma GCC unroll 3
    for (int third = 0; third < 3; ++third) {
#pragma GCC unroll 4
      for (int block = 0; block < 4; ++block) x[4 * third + block] = _mm512_loadu_ps(y + base + 48 * block + 16 * third);
      transpose_quarters(x + 4 * third);
    }
    dense_registers<12>(x);
#pragma GCC unroll 12
    for (int c = 0; c < 12; ++c) {  // as butterflies_in_vector
      x[c] = _mm512_fmadd_ps(x[c], sign1, _mm512_permute_ps(x[c], 0xb1));
      x[c] = _mm512_fmadd_ps(x[c], sign2, _mm512_permute_ps(x[c], 0x4e));
    }
#pragma GCC unroll 3
    for (int third = 0; third < 3; ++third) {
      transpose_quarters(x + 4 * third);
#pragma GCC unroll 4
      for (int block = 0; block < 4; ++block) _mm512_storeu_ps(y + base + 48 * block + 16 * third, x[4 * third + block]);
    }
  }
}
#endif

// [outer][order][run] -> [order][outer][run]
inline void swap_axes(const float* in, float* out, std::int64_t outer, std::int64_t order, std::int64_t run) {
  for (std::int64_t o = 0; o < outer; ++o)
    for (std::int64_t c = 0; c < order; ++c) {
      const float* from = in + (o * order + c) * run;
      float* to = out + (c * outer + o) * run;
      if (run == 4) {
        __builtin_memcpy(to, from, 4 * sizeof(float));
      } else {
        for (std::int64_t j = 0; j < run; ++j) to[j] = from[j];
      }
    }
}

typedef ChunkOf<16>::Type Vector16;

// The stages h < 16 inside a vector: with a, b the lanes whose bit h is clear and set, lane a becomes b + a and lane b becomes
// a - b, both partner + (+-1) * self.
inline Vector16 butterflies_in_vector(Vector16 v, std::int64_t order) {
  typedef std::int32_t Lanes __attribute__((vector_size(64)));
  const Lanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
  for (int h = 1; h < 16; h *= 2) {
    if (h >= order) break;
    const Vector16 partner = __builtin_shuffle(v, lane ^ h), one = Vector16{} + 1.0f, sign = (lane & h) == 0 ? one : -one;
#ifdef __AVX512F__
    v = (Vector16)_mm512_fmadd_ps((__m512)v, (__m512)sign, (__m512)partner);
#else
    v = partner + v * sign;
#endif
  }
  return v;
}

// All stages h < 16 kVectors with kVectors vectors in registers, so that memory is read and written once.
template <int kVectors>
inline void butterflies_in_registers(float* y, std::int64_t width, std::int64_t order) {
  for (std::int64_t base = 0; base < width; base += 16 * kVectors) {
    Vector16 v[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i)
      v[i] = butterflies_in_vector(*reinterpret_cast<const Vector16*>(y + base + 16 * i), kVectors == 1 ? order : 16);
#pragma GCC unroll 3
    for (int h = 1; h < kVectors; h *= 2)
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i)
        if ((i & h) == 0) {
          const Vector16 a = v[i], b = v[i + h];
          v[i] = a + b;
          v[i + h] = a - b;
        }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) *reinterpret_cast<Vector16*>(y + base + 16 * i) = v[i];
  }
}

inline void butterflies(float* y, std::int64_t width, std::int64_t order) {
  constexpr int kMostVectors = kWide / 2;  // no more than the registers hold
  std::int64_t h = 1;
  if (width % 16 == 0) {
    const std::int64_t vectors = order / 16;
    h = vectors >= kMostVectors ? 16 * kMostVectors : vectors >= 2 ? 32 : 16;
    if (h == 16)
      butterflies_in_registers<1>(y, width, order);
    else if (h == 32)
      butterflies_in_registers<2>(y, width, order);
    else
      butterflies_in_registers<kMostVectors>(y, width, order);
  }
  for (; 2 * h < order; h *= 4)  // two stages at once
    for (std::int64_t base = 0; base < width; base += 4 * h)
      for (std::int64_t j = base; j < base + h; ++j) {
        const float a = y[j] + y[j + h], b = y[j] - y[j + h], c = y[j + 2 * h] + y[j + 3 * h], d = y[j + 2 * h] - y[j + 3 * h];
        y[j] = a + c;
        y[j + h] = b + d;
        y[j + 2 * h] = a - c;
        y[j + 3 * h] = b - d;
      }
  for (; h < order; h *= 2)
    for (std::int64_t base = 0; base < width; base += 2 * h)
      for (std::int64_t j = 0; j < h; ++j) {
        const float a = y[base + j], b = y[base + h + j];
        y[base + j] = a + b;
        y[base + h + j] = a - b;
      }
}

void rotate(float* y, float* scratch, std::int64_t width, const RotationFactor* factors, int num_factors) {
  float* from = y;
  float* to = scratch;
  std::int64_t run = width;
  for (int f = 0; f < num_factors; ++f) {
    run /= factors[f].order;
    if (factors[f].matrix == nullptr) {
      butterflies(from, width, factors[f].order);  // always the last factor: run is 1
#ifdef __AVX512F__
    } else if (factors[f].order == 12 && run == 4 && width % (4 * 48) == 0) {
      dense_12_and_4(from, width);
      break;  // a run of four has nothing but the order 4 left
#endif
    } else if (run < 16 && width > run * factors[f].order) {  // short runs: bring the blocks side by side, and back
      const std::int64_t order = factors[f].order, outer = width / (run * order);
      swap_axes(from, to, outer, order, run);
      dense_factor(to, from, width, outer * run, factors[f].order, factors[f].matrix);
      swap_axes(from, to, order, outer, run);
      float* swap = from;
      from = to;
      to = swap;
    } else {
      dense_factor(from, to, width, run, factors[f].order, factors[f].matrix);
      float* swap = from;
      from = to;
      to = swap;
    }
  }
  if (from != y) __builtin_memcpy(y, from, static_cast<std::size_t>(width) * sizeof(float));
}

std::uint32_t max_magnitude(const float* y, std::int64_t n) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint32_t magnitude;
    __builtin_memcpy(&magnitude, y + i, sizeof magnitude);
    magnitude &= 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

#ifdef __AVX512VNNI__
// 64 columns at a time: conversion rounds to nearest even by itself, and bytes are narrowed and summed four vectors at once.
inline std::int64_t quantize_a8_vectors(const float* y, std::int64_t n, float inverse_scale, int offset, std::uint8_t* a,
                                        std::int32_t* sum) {
  const __m512 inverse = _mm512_set1_ps(inverse_scale);
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // packing goes by quarters
  const __m512i offsets = _mm512_set1_epi8(static_cast<char>(offset)), ones = _mm512_set1_epi8(1);
  __m512i sums = _mm512_setzero_si512();
  std::int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const auto value = [&](int k) { return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(y + i + 16 * k), inverse)); };
    const __m512i words01 = _mm512_packs_epi32(value(0), value(1)), words23 = _mm512_packs_epi32(value(2), value(3));
    const __m512i bytes = _mm512_permutexvar_epi32(in_order, _mm512_packs_epi16(words01, words23));
    sums = _mm512_dpbusd_epi32(sums, ones, bytes);
    _mm512_storeu_si512(a + i, _mm512_add_epi8(bytes, offsets));
  }
  typedef std::int32_t Lanes __attribute__((vector_size(64)));
  *sum = 0;
  for (int lane = 0; lane < 16; ++lane) *sum += ((Lanes)sums)[lane];
  return i;
}
#endif

std::int32_t quantize_a8(const float* y, std::int64_t n, float inverse_scale, int offset, std::uint8_t* a) {
  std::int32_t sum = 0;
  std::int64_t i = 0;
#ifdef __AVX512VNNI__
  i = quantize_a8_vectors(y, n, inverse_scale, offset, a, &sum);
#endif
  for (; i < n; ++i) {
    const std::int32_t value = round_to_integer(y[i] * inverse_scale);
    sum += value;
    a[i] = static_cast<std::uint8_t>(value + offset);
  }
  return sum;
}

void quantize_a16(const float* y, std::int64_t n, float inverse_scale, int offset, std::uint8_t* hi, std::uint8_t* lo,
                  std::int32_t* sum_hi, std::int32_t* sum_lo) {
  std::int32_t sums[2] = {0, 0};
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t value = round_to_integer(y[i] * inverse_scale);
    const std::int32_t high = (value + 128) >> 8;
    const std::int32_t low = value - 256 * high;
    sums[0] += high;
    sums[1] += low;
    hi[i] = static_cast<std::uint8_t>(high + offset);
    lo[i] = static_cast<std::uint8_t>(low + offset);
  }
  *sum_hi = sums[0];
  *sum_lo = sums[1];
}

void load(const void* x, DType dtype, const float* signs, std::int64_t n, float* __restrict y) {
  if (signs == nullptr) return widen_to_float(x, dtype, n, y);
  widen(x, dtype, n, y, [signs](float value, std::int64_t i) { return value * signs[i]; });
}

#include "project_loops.h"
