// SPDX-License-Identifier: Apache-2.0
// Projection of a token's groups onto a pyramid: as many groups at a time as a register has lanes, a lane each, so that nothing
// is added across lanes. The end of vector_loops.h, which see.

typedef float Lanes __attribute__((vector_size(kWide * sizeof(float))));
typedef std::int32_t IntLanes __attribute__((vector_size(kWide * sizeof(std::int32_t))));

inline __attribute__((always_inline)) IntLanes to_integer(Lanes x) { return __builtin_convertvector(x, IntLanes); }

#define PVQ_STEP inline __attribute__((always_inline))
#include "../project_steps.h"
#undef PVQ_STEP

inline bool any(IntLanes mask) {
  std::int32_t either = 0;
  for (int lane = 0; lane < kWide; ++lane) either |= mask[lane];
  return either != 0;
}

// v_i + v_(i+h) for h = d/2, d/4, ..., 1; v(i) is asked for once for each i.
template <typename Value>
inline Lanes tree_sum(int d, Lanes* scratch, Value v) {
  for (int i = 0; i < d / 2; ++i) scratch[i] = v(i) + v(i + d / 2);
  for (int h = d / 4; h > 0; h /= 2)
    for (int i = 0; i < h; ++i) scratch[i] += scratch[i + h];
  return scratch[0];
}

struct ProjectionScratch {  // [coordinate][lane]
  Lanes target[kMaxProjectedGroup], pulses[kMaxProjectedGroup], sums[kMaxProjectedGroup / 2];
  IntLanes order[kMaxProjectedGroup];
};

// Moves single pulses until every lane has as many as it should.
inline void fix_totals(int d, IntLanes excess, ProjectionScratch& s) {
  for (int i = 0; i < d; ++i) s.order[i] = move_order(s.target[i], s.pulses[i], excess, i);
  const Lanes step = excess > 0 ? Lanes{} - 1.0f : Lanes{} + 1.0f;
  for (IntLanes left = excess > 0 ? excess : -excess; any(left > 0); left += left > 0) {
    IntLanes first = s.order[0];
    for (int i = 1; i < d; ++i) first = s.order[i] > first ? s.order[i] : first;
    for (int i = 0; i < d; ++i) {
      const IntLanes moves = (s.order[i] == first) & (left > 0);
      s.pulses[i] += moves ? step : Lanes{};
      s.order[i] = moves ? IntLanes{} + kNeverMoves : s.order[i];
    }
  }
}

// Swaps row and column of every kTile x kTile block: element `lane` of v[r] with element r of v[lane], within each kTile lanes.
template <int kTile>
inline __attribute__((always_inline)) void transpose(Lanes (&v)[kTile]) {
  IntLanes lane;
  for (int l = 0; l < kWide; ++l) lane[l] = l;
#pragma GCC unroll 4
  for (int h = 1; h < kTile; h *= 2) {
    const IntLanes upper = (lane & h) != 0;
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r)
      if ((r & h) == 0) {
        const Lanes low = v[r], high = v[r + h];
        v[r] = __builtin_shuffle(low, high, upper ? lane + (kWide - h) : lane);
        v[r + h] = __builtin_shuffle(low, high, upper ? lane + kWide : lane + h);
      }
  }
}

// Coordinates [first, first + kTile) of `count` groups, a vector for each kTile lanes of groups r, r + kTile, ...
template <int kTile, typename Float, typename Access>
inline void for_rows(Float* y, int count, int d, int first, Access access) {
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r)
#pragma GCC unroll 2
    for (int part = 0; part < kWide / kTile; ++part)
      if (r + part * kTile < count) access(r, part * kTile, y + (r + part * kTile) * d + first);
}

// Groups [0, count) of y, count <= kWide; their pulses replace them. kTile: the smaller one of d and kWide.
template <int kTile>
void project_groups(float* y, int count, int d, float num_pulses, ProjectionScratch& s, Lanes* scale, Lanes* peak) {
  for (int first = 0; first < d; first += kTile) {
    Lanes v[kTile] = {};
    for_rows<kTile>(y, count, d, first, [&](int r, int lane, const float* from) {
      __builtin_memcpy(reinterpret_cast<float*>(v + r) + lane, from, kTile * sizeof(float));
    });
    transpose<kTile>(v);
    for (int i = 0; i < kTile; ++i) s.target[first + i] = (Lanes)((IntLanes)v[i] & 0x7fffffff);
  }
  const Lanes sum = tree_sum(d, s.sums, [&](int i) { return s.target[i]; });
  const Lanes factor = target_factor(sum, num_pulses);
  Lanes total{};
  for (int i = 0; i < d; ++i) {
    s.target[i] *= factor;
    s.pulses[i] = nearest_integer(s.target[i]);
    total += s.pulses[i];
  }
  IntLanes excess = to_integer(total - num_pulses);
  excess = (sum >= kLeastGroupSum) & (sum < kMostGroupSum) ? excess : IntLanes{};
  if (any(excess)) fix_totals(d, excess, s);
  const Lanes dot = tree_sum(d, s.sums, [&](int i) { return s.pulses[i] * s.target[i]; });
  Lanes norm{}, largest{};
  for (int i = 0; i < d; ++i) {
    norm += s.pulses[i] * s.pulses[i];
    largest = s.pulses[i] > largest ? s.pulses[i] : largest;
  }
  *scale = amplitude(dot, norm, factor);
  *peak = sum < kMostGroupSum ? *scale * largest : Lanes{} + __builtin_inff();
  for (int first = 0; first < d; first += kTile) {
    Lanes v[kTile];
    for (int i = 0; i < kTile; ++i) v[i] = s.pulses[first + i];
    transpose<kTile>(v);
    for_rows<kTile>(y, count, d, first, [&](int r, int lane, float* to) {
      const float* from = reinterpret_cast<const float*>(v + r) + lane;
      for (int i = 0; i < kTile; ++i) to[i] = __builtin_copysignf(from[i], to[i]);
    });
  }
}

float project(float* y, std::int64_t n, int group_size, int num_pulses, float* scale) {
  ProjectionScratch scratch;
  const std::int64_t num_groups = n / group_size;
  float largest = 0;
  for (std::int64_t g = 0; g < num_groups; g += kWide) {
    const int count = static_cast<int>(num_groups - g < kWide ? num_groups - g : kWide);
    Lanes scales, peaks;
    float* groups = y + g * group_size;
    if (group_size < kWide)
      project_groups<kMinProjectedGroup>(groups, count, group_size, static_cast<float>(num_pulses), scratch, &scales, &peaks);
    else
      project_groups<kWide>(groups, count, group_size, static_cast<float>(num_pulses), scratch, &scales, &peaks);
    for (int lane = 0; lane < count; ++lane) {
      scale[g + lane] = scales[lane];
      largest = peaks[lane] > largest ? peaks[lane] : largest;
    }
  }
  return largest;
}

std::int32_t quantize_pulses(const float* pulses, std::int64_t n, int group_size, const float* scale, float inverse_scale,
                             int offset, std::uint8_t* a) {
  typedef float Eight __attribute__((vector_size(32), aligned(4)));
  typedef std::int32_t EightIntegers __attribute__((vector_size(32)));
  typedef std::uint8_t EightBytes __attribute__((vector_size(8)));
  EightIntegers sums{};
  for (std::int64_t i = 0; i < n; scale++)
    for (const std::int64_t end = i + group_size; i < end; i += 8) {
      const Eight value = nearest_integer(*reinterpret_cast<const Eight*>(pulses + i) * (*scale * inverse_scale));
      const EightIntegers integers = __builtin_convertvector(value, EightIntegers);
      sums += integers;
      const EightBytes bytes = __builtin_convertvector(integers + offset, EightBytes);
      __builtin_memcpy(a + i, &bytes, sizeof bytes);
    }
  std::int32_t sum = 0;
  for (int lane = 0; lane < 8; ++lane) sum += sums[lane];
  return sum;
}
