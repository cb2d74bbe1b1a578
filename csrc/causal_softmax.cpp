// SPDX-License-Identifier: Apache-2.0
#include "causal_softmax.h"

#include <cstring>
#include <limits>

#include "cpu/parallel.h"
#include "vector_clones.h"

namespace pvq {
namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef std::int32_t Ints __attribute__((vector_size(64), aligned(4)));
typedef std::uint32_t Words __attribute__((vector_size(64), aligned(4)));
typedef std::uint16_t Halves __attribute__((vector_size(32), aligned(2)));

inline Floats greater(Floats a, Floats b) { return a > b ? a : b; }

// e^x for x <= 0, to two units in the last place; 0 where that is below the normal numbers. 2^n by the exponent's bits, the rest,
// of |f| <= log(2) / 2, by its Taylor series.
inline Floats exponential(Floats x) {
  constexpr float kLog2e = 1.44269504f, kHigh = 0.693359375f, kLow = -2.12194440e-4f;  // log(2) = kHigh + kLow
  constexpr float kMagic = 12582912.0f;                                                // rounds to an integer, ties to even
  constexpr float kLowest = -87.0f;
  const Floats inside = greater(x, Floats{} + kLowest);
  const Floats n = (inside * kLog2e + kMagic) - kMagic;
  const Floats f = (inside - n * kHigh) - n * kLow;
  Floats sum = f * (1.0f / 720.0f) + 1.0f / 120.0f;
  sum = sum * f + 1.0f / 24.0f;
  sum = sum * f + 1.0f / 6.0f;
  sum = sum * f + 0.5f;
  sum = sum * f + 1.0f;
  sum = sum * f + 1.0f;
  const Floats power = (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
  return x < kLowest ? Floats{} : sum * power;
}

inline Halves to_bfloat16(Floats x) {  // of what is finite, to the nearest, ties to even
  const Words bits = (Words)x;
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
}

// Rows begin to end. What a row does not see is made -infinity up to the end of a vector, and its probabilities 0.
PVQ_VECTOR_CLONES
void softmax_rows(float* scores, std::int64_t queries, std::int64_t keys, std::uint16_t* probabilities, std::int64_t begin,
                  std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    float* s = scores + row * keys;
    std::uint16_t* p = probabilities + row * keys;
    const std::int64_t seen = keys - queries + row % queries + 1, whole = seen / kLanes * kLanes;
    Floats tail = Floats{} - std::numeric_limits<float>::infinity();
    for (std::int64_t i = whole; i < seen; ++i) tail[i - whole] = s[i];
    Floats largest = tail;
    for (std::int64_t i = 0; i < whole; i += kLanes) largest = greater(*reinterpret_cast<const Floats*>(s + i), largest);
    float most = largest[0];
    for (int lane = 1; lane < kLanes; ++lane) most = largest[lane] > most ? largest[lane] : most;

    tail = exponential(tail - most);
    Floats sums = tail;
    for (std::int64_t i = 0; i < whole; i += kLanes) {
      Floats& v = *reinterpret_cast<Floats*>(s + i);
      v = exponential(v - most);
      sums += v;
    }
    float sum = sums[0];
    for (int lane = 1; lane < kLanes; ++lane) sum += sums[lane];

    const float inverse = 1.0f / sum;
    for (std::int64_t i = 0; i < whole; i += kLanes)
      *reinterpret_cast<Halves*>(p + i) = to_bfloat16(*reinterpret_cast<const Floats*>(s + i) * inverse);
    const Halves last = to_bfloat16(tail * inverse);
    for (std::int64_t i = whole; i < seen; ++i) p[i] = last[i - whole];
    std::memset(p + seen, 0, static_cast<std::size_t>(keys - seen) * sizeof *p);
  }
}

}  // namespace

void causal_softmax(float* scores, std::int64_t rows, std::int64_t queries, std::int64_t keys, std::uint16_t* probabilities) {
  parallel_for(rows, queries, [&](std::int64_t begin, std::int64_t end, int) {
    softmax_rows(scores, queries, keys, probabilities, begin, end);
  });
}

}  // namespace pvq
