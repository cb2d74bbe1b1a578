// SPDX-License-Identifier: Apache-2.0
// The search of cpu/encode_loops.h, cut into pieces for eight threads a group: each tries one ladder of magnitudes (a gain of the
// pyramids that share it), then all fold the eight results in the CPU's order. Every float operation is the CPU's, in its order.
//
// The CPU skips a gain or a pyramid whose lower bound is no better than the best so far. A bound and a cost are rounded
// differently, so near a tie skipping can change the choice: the bounds take part in the fold.
#pragma once

#include <cstdint>

#include "layout.h"

namespace pvq::cuda::encoding {

constexpr int kLadders = 8;  // threads of a group

struct Ladder {  // magnitudes base + j step, j = 2^r m + f in [0, last]; base is in the middle of its cell of one unit
  float base, step, inverse_step;
  int last;
  int pyramid, gain;         // number of the first pyramid, and of the gain
  int pulses[kMaxPyramids];  // of the pyramids, falling
};

struct Search {  // a codebook prepared
  int num_ladders, shape_bits;
  Ladder ladders[kLadders];
  int first_shape[kMaxPyramids];
  std::uint16_t compositions[kGroupSize + 1][kMaxDigit + 1];  // num_compositions(parts, total)
};

// Without the intrinsics nvcc would contract a product and a sum into one operation.
PVQ_HOST_DEVICE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

PVQ_HOST_DEVICE float subtract(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

PVQ_HOST_DEVICE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PVQ_HOST_DEVICE float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

PVQ_HOST_DEVICE float infinity() {
#ifdef __CUDA_ARCH__
  return __int_as_float(0x7f800000);
#else
  return __builtin_inff();
#endif
}

PVQ_HOST_DEVICE float inverse_scale(float scale) { return scale > 0.0f ? divide(1.0f, scale) : 0.0f; }

PVQ_HOST_DEVICE float sum_of(const float (&v)[kGroupSize]) {
  return add(add(add(v[0], v[1]), add(v[2], v[3])), add(add(v[4], v[5]), add(v[6], v[7])));
}

PVQ_HOST_DEVICE float square_sum(const float (&e)[kGroupSize]) {
  float squares[kGroupSize];
#pragma unroll
  for (int i = 0; i < kGroupSize; ++i) squares[i] = multiply(e[i], e[i]);
  return sum_of(squares);
}

PVQ_HOST_DEVICE int round_to_int8(float value) {
  value = value > 127.0f ? 127.0f : (value < -127.0f ? -127.0f : value);
  return static_cast<int>(subtract(add(value, 12582912.0f), 12582912.0f));  // to the nearest integer, ties to even
}

// Moves the pulse that costs least to the nearest magnitude of the next cell; of equals the lowest coordinate. False if none can.
template <int kRefinement>
PVQ_HOST_DEVICE bool move_pulse(const Ladder& ladder, bool up, int (&j)[kGroupSize], float (&e)[kGroupSize]) {
  constexpr int kCell = 1 << kRefinement;
  float least = 1e30f;
  int move = -1;
#pragma unroll
  for (int i = 0; i < kGroupSize; ++i) {
    const int in_cell = j[i] & (kCell - 1), d = up ? kCell - in_cell : -1 - in_cell, next = j[i] + d;
    const float length = multiply(static_cast<float>(d), ladder.step);
    const float change = multiply(length, subtract(length, multiply(2.0f, e[i])));  // (e - length)^2 - e^2
    const bool better = (change < least) & (next >= 0) & (next <= ladder.last);
    least = better ? change : least;
    move = better ? i : move;
  }
#pragma unroll
  for (int i = 0; i < kGroupSize; ++i) {
    const int in_cell = j[i] & (kCell - 1), d = i == move ? (up ? kCell - in_cell : -1 - in_cell) : 0;
    j[i] += d;
    e[i] = subtract(e[i], multiply(static_cast<float>(d), ladder.step));
  }
  return move >= 0;
}

template <int kPyramids>
struct LadderResult {
  float free_cost;                                // of the nearest magnitudes, whatever their sum
  float cost[kPyramids];                          // infinite where there is no codeword
  float threshold[kPyramids];                     // a best cost above it admits the pyramid: the larger of cost and bound
  std::uint32_t low[kPyramids], high[kPyramids];  // j of coordinates 0-3 and 4-7, a byte each
};

// The nearest point of each pyramid to the magnitudes a (int8 units, not negative). A point of fewer pulses is on the way to one
// of still fewer, and going up alike: all pyramids below the free choice are passed falling, then, from the free choice again,
// the others rising.
template <int kRefinement, int kPyramids>
PVQ_HOST_DEVICE LadderResult<kPyramids> search_ladder(const Ladder& ladder, const float (&a)[kGroupSize]) {
  LadderResult<kPyramids> result{};
  int free[kGroupSize], free_pulses = 0;
  float free_error[kGroupSize];
#pragma unroll
  for (int i = 0; i < kGroupSize; ++i) {
    float position = add(multiply(subtract(a[i], ladder.base), ladder.inverse_step), 0.5f);
    position = position > 0.0f ? position : 0.0f;
    position = position < 1000.0f ? position : 1000.0f;
    const int j = static_cast<int>(position);
    free[i] = j < ladder.last ? j : ladder.last;
    free_error[i] = subtract(a[i], add(ladder.base, multiply(static_cast<float>(free[i]), ladder.step)));
    free_pulses += free[i] >> kRefinement;
  }
  result.free_cost = square_sum(free_error);
  const float sum = sum_of(a);
  int num_below = 0;
#pragma unroll
  for (int k = 0; k < kPyramids; ++k) num_below += ladder.pulses[k] <= free_pulses ? 1 : 0;

  int j[kGroupSize], pulses = 0;
  float e[kGroupSize], limit = infinity();
  bool possible = true;
#pragma unroll 1
  for (int step = 0; step < kPyramids; ++step) {
    if (step == 0 || step == num_below) {
#pragma unroll
      for (int i = 0; i < kGroupSize; ++i) {
        j[i] = free[i];
        e[i] = free_error[i];
      }
      pulses = free_pulses;
      possible = true;
      limit = infinity();
    }
    const int current = step < num_below ? kPyramids - num_below + step : kPyramids - 1 - step;
    int wanted = ladder.pulses[0];
#pragma unroll
    for (int k = 1; k < kPyramids; ++k) wanted = k == current ? ladder.pulses[k] : wanted;

    // All magnitudes together are between low and high, so the errors add up to at least `gap` and their squares to gap^2/8.
    const float low = add(multiply(8.0f, ladder.base), multiply(static_cast<float>(wanted << kRefinement), ladder.step));
    const float high = add(low, multiply(static_cast<float>(8 * ((1 << kRefinement) - 1)), ladder.step));
    const float gap = sum > high ? subtract(sum, high) : (sum < low ? subtract(low, sum) : 0.0f);
    const float bound = multiply(multiply(gap, gap), 0.124f);
    float cost = infinity();
    // Falling is the order of the fold: after a pyramid the best cost is at most its threshold. Rising goes against it.
    if (bound < limit) {
      const bool up = wanted > pulses;
      while (possible && pulses != wanted) {
        possible = move_pulse<kRefinement>(ladder, up, j, e);
        pulses += up ? 1 : -1;
      }
      cost = square_sum(e);
      if (!possible || !(cost < infinity())) cost = infinity();
    }
    const float threshold = bound > cost ? bound : cost;
    if (step < num_below && threshold < limit) limit = threshold;
    const std::uint32_t low_j = static_cast<std::uint32_t>(j[0] | j[1] << 8 | j[2] << 16 | j[3] << 24);
    const std::uint32_t high_j = static_cast<std::uint32_t>(j[4] | j[5] << 8 | j[6] << 16 | j[7] << 24);
#pragma unroll
    for (int k = 0; k < kPyramids; ++k) {  // selects: an index that varies would put the result into memory
      result.cost[k] = k == current ? cost : result.cost[k];
      result.threshold[k] = k == current ? threshold : result.threshold[k];
      result.low[k] = k == current ? low_j : result.low[k];
      result.high[k] = k == current ? high_j : result.high[k];
    }
  }
  return result;
}

struct Choice {  // without a codeword of finite cost: j = 0 in the first pyramid and gain
  float cost;
  int ladder, k;
  bool found;
};

// One step of the fold over ladders 0, 1, ...
template <int kPyramids>
PVQ_HOST_DEVICE void fold_ladder(Choice& best, int ladder, float free_cost, const float (&cost)[kPyramids],
                                 const float (&threshold)[kPyramids]) {
  const bool promising = free_cost < best.cost;
#pragma unroll
  for (int k = 0; k < kPyramids; ++k) {
    const bool better = promising & (threshold[k] < best.cost);
    best.cost = better ? cost[k] : best.cost;
    best.ladder = better ? ladder : best.ladder;
    best.k = better ? k : best.k;
    best.found = best.found | better;
  }
}

// The bytes of a group's code, lowest first. low, high: j as in LadderResult.
template <int kRefinement>
PVQ_HOST_DEVICE std::uint32_t code_word(const Search& search, const Choice& choice, std::uint32_t low, std::uint32_t high,
                                        std::uint32_t signs) {
  const Ladder& ladder = search.ladders[choice.ladder];
  int left = ladder.pulses[choice.k], index = search.first_shape[ladder.pyramid + choice.k];
  std::uint32_t refinement = 0;
#pragma unroll
  for (int i = 0; i < kGroupSize; ++i) {
    const int j = static_cast<int>((i < 4 ? low : high) >> (8 * (i & 3))) & 255, m = j >> kRefinement;
    refinement |= static_cast<std::uint32_t>(j & ((1 << kRefinement) - 1)) << i;
    if (i < kGroupSize - 1) {  // as shape_index
      index += search.compositions[kGroupSize - i][left] - search.compositions[kGroupSize - i][left - m];
      left -= m;
    }
  }
  const std::uint32_t shape_and_gain = static_cast<std::uint32_t>(index | ladder.gain << search.shape_bits);
  return search.shape_bits > 8 ? shape_and_gain | signs << 16 | refinement << 24 : shape_and_gain | signs << 8;
}

PVQ_HOST_DEVICE int signed_level(const Ladder& ladder, int j, bool negative) {
  const int magnitude = static_cast<int>(ladder.base) + static_cast<int>(ladder.step) * j;
  return negative ? ~magnitude : magnitude;
}

}  // namespace pvq::cuda::encoding
