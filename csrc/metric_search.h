// SPDX-License-Identifier: Apache-2.0
// The codeword of a group of eight weights that is nearest in a metric: minimise e M e^T, e = target - codeword, over shapes,
// signs and refinements, one gain of one set of pyramids at a time.
//
// In error feedback M = U_QQ^-1 U_QQ^-T, with U the upper Cholesky factor of the inverse Hessian; in coordinate descent M = H_QQ.
// The problem is a closest-point search in a lattice cut by sum m_i = K. It is started by rounding one coordinate after the
// other, each to what is best when those after it are free (Babai's nearest plane), brought to each pyramid by the pulses that
// cost least, and then improved by single and double moves until none helps. tests/test_csrc/test_metric_search.py says how often
// that is the optimum.
//
// The same text serves a vector of groups (one a lane) on the CPU and a single group a thread on a GPU: `Lanes` names the types.
// Every float operation is written out in its order and nothing is contracted, so that all give the same codes.
#pragma once

#include "codebook.h"

#ifdef __CUDACC__
#define PVQ_SEARCH_FUNCTION __host__ __device__ __forceinline__
#define PVQ_SEARCH_UNROLL _Pragma("unroll")
#else
#define PVQ_SEARCH_FUNCTION static inline  // each instruction set has its own copy, which the linker must not mix up
#ifdef __AVX512F__
#define PVQ_SEARCH_UNROLL _Pragma("GCC unroll 8")
#else  // too few registers for it to gain anything, and it would take minutes to compile
#define PVQ_SEARCH_UNROLL _Pragma("GCC unroll 1")
#endif
#endif

namespace pvq::metric {

constexpr int kMaxRounds = 24;             // of moves; most groups need two to four
constexpr float kWorthAChange = 0.99999f;  // of the old cost: so that rounding alone changes no code

constexpr int kMetricFloats = 2 * kGroupSize * kGroupSize;  // of a metric in memory: u, then M, both row by row

struct Metric {                        // of a group's eight columns
  float u[kGroupSize][kGroupSize];     // upper triangle: M = u^-1 u^-T
  float m[kGroupSize][kGroupSize];     // M
  float inverse_diagonal[kGroupSize];  // 1 / u_ii
  float inverse_m[kGroupSize];         // 1 / M_ii
};

PVQ_SEARCH_FUNCTION Metric read_metric(const float* values) {
  Metric metric;
  for (int i = 0; i < kGroupSize; ++i) {
    for (int k = 0; k < kGroupSize; ++k) {
      metric.u[i][k] = values[i * kGroupSize + k];
      metric.m[i][k] = values[(kGroupSize + i) * kGroupSize + k];
    }
    metric.inverse_diagonal[i] = 1.0f / metric.u[i][i];
    metric.inverse_m[i] = 1.0f / metric.m[i][i];
  }
  return metric;
}

template <class Lanes>
struct Rungs {  // magnitudes of one gain in the middle of their cells: base + step j, j = 2^r m + f in [0, last]
  typename Lanes::Float base, step, inverse_step;
  typename Lanes::Int last;
};

template <class Lanes>
struct Point {
  typename Lanes::Float x[kGroupSize];    // the codeword, signed
  typename Lanes::Float g[kGroupSize];    // (target - x) M
  typename Lanes::Int cells[kGroupSize];  // m of the shape, the sum of which is K
  typename Lanes::Float cost;
};

// The value of cell m nearest to `wanted`, where a coordinate would best lie while the others stay.
template <class Lanes, int kRefinement>
PVQ_SEARCH_FUNCTION typename Lanes::Float nearest_in_cell(const Rungs<Lanes>& rungs, typename Lanes::Int m,
                                                          typename Lanes::Float wanted) {
  using Float = typename Lanes::Float;
  Float magnitude = Lanes::to_float(m) * (rungs.step * static_cast<float>(1 << kRefinement)) + rungs.base;
  const Float size = wanted < 0.0f ? -wanted : wanted;
  if constexpr (kRefinement == 1) {
    // the last cell may have only its lower half
    const auto upper = (size > magnitude + 0.5f * rungs.step) & (m * 2 < rungs.last);
    magnitude = upper ? magnitude + rungs.step : magnitude;
  }
  return wanted < 0.0f ? -magnitude : magnitude;
}

// Moves coordinate i by `delta`.
template <class Lanes>
PVQ_SEARCH_FUNCTION void shift(const Metric& metric, int i, typename Lanes::Float delta, Point<Lanes>& p) {
  p.x[i] += delta;
  PVQ_SEARCH_UNROLL
  for (int k = 0; k < kGroupSize; ++k) p.g[k] -= delta * metric.m[i][k];
}

// Rounds one coordinate after the other, whatever their sum.
template <class Lanes, int kRefinement>
PVQ_SEARCH_FUNCTION void nearest_plane(const Metric& metric, const Rungs<Lanes>& rungs, const typename Lanes::Float* target,
                                       Point<Lanes>& p) {
  using Float = typename Lanes::Float;
  using Int = typename Lanes::Int;
  Float scaled[kGroupSize], error[kGroupSize];
  p.cost = Float{};
  PVQ_SEARCH_UNROLL
  for (int i = 0; i < kGroupSize; ++i) {
    Float wanted = target[i];
    PVQ_SEARCH_UNROLL
    for (int k = 0; k < i; ++k) wanted -= scaled[k] * metric.u[k][i];
    const Float size = wanted < 0.0f ? -wanted : wanted;
    Float position = (size - rungs.base) * rungs.inverse_step + 0.5f;
    position = position > 0.0f ? position : Float{};
    position = position < 1000.0f ? position : Float{} + 1000.0f;
    Int j = Lanes::to_int(position);
    j = j < rungs.last ? j : rungs.last;
    const Float magnitude = Lanes::to_float(j) * rungs.step + rungs.base;
    p.x[i] = wanted < 0.0f ? -magnitude : magnitude;
    p.cells[i] = j >> kRefinement;
    scaled[i] = (wanted - p.x[i]) * metric.inverse_diagonal[i];
    p.cost += scaled[i] * scaled[i];
    error[i] = target[i] - p.x[i];
  }
  PVQ_SEARCH_UNROLL
  for (int i = 0; i < kGroupSize; ++i) {
    Float sum = error[0] * metric.m[0][i];
    PVQ_SEARCH_UNROLL
    for (int k = 1; k < kGroupSize; ++k) sum += error[k] * metric.m[k][i];
    p.g[i] = sum;
  }
}

// int8: rounds one weight after the other to the nearest integer in [-127, 127]; there is no pyramid to meet.
template <class Lanes>
PVQ_SEARCH_FUNCTION void nearest_plane_int8(const Metric& metric, const typename Lanes::Float* target, typename Lanes::Float* x,
                                            typename Lanes::Float& cost) {
  using Float = typename Lanes::Float;
  Float scaled[kGroupSize];
  cost = Float{};
  PVQ_SEARCH_UNROLL
  for (int i = 0; i < kGroupSize; ++i) {
    Float wanted = target[i];
    PVQ_SEARCH_UNROLL
    for (int k = 0; k < i; ++k) wanted -= scaled[k] * metric.u[k][i];
    Float value = wanted > 127.0f ? Float{} + 127.0f : wanted;
    value = value < -127.0f ? Float{} - 127.0f : value;
    x[i] = (value + 12582912.0f) - 12582912.0f;  // to the nearest integer, ties to even
    scaled[i] = (wanted - x[i]) * metric.inverse_diagonal[i];
    cost += scaled[i] * scaled[i];
  }
}

// Moves pulses one at a time, each where it costs least, until there are `pulses`. False in lanes that cannot get there.
template <class Lanes, int kRefinement>
PVQ_SEARCH_FUNCTION typename Lanes::Mask to_pyramid(const Metric& metric, const Rungs<Lanes>& rungs, typename Lanes::Int pulses,
                                                    Point<Lanes>& p) {
  using Float = typename Lanes::Float;
  using Int = typename Lanes::Int;
  using Mask = typename Lanes::Mask;
  const Int last_cell = rungs.last >> kRefinement;
  Int total = p.cells[0];
  PVQ_SEARCH_UNROLL
  for (int i = 1; i < kGroupSize; ++i) total += p.cells[i];
  Int missing = pulses - total;
  const Mask up = missing > 0;
  const Int way = up ? Int{} + 1 : Int{} - 1;
  Int left = up ? missing : -missing;
  Mask possible = left >= 0;  // all lanes
  while (Lanes::any(left > 0)) {
    const Mask active = left > 0;
    Float least = Float{} + 1e30f, step = Float{};
    Int move = Int{} - 1;
    PVQ_SEARCH_UNROLL
    for (int i = 0; i < kGroupSize; ++i) {
      const Int cell = p.cells[i] + way;
      const Float wanted = p.x[i] + p.g[i] * metric.inverse_m[i];
      const Float delta = nearest_in_cell<Lanes, kRefinement>(rungs, cell, wanted) - p.x[i];
      const Float change = delta * (delta * metric.m[i][i] - 2.0f * p.g[i]);
      const Mask better = (change < least) & (cell >= 0) & (cell <= last_cell);
      least = better ? change : least;
      step = better ? delta : step;
      move = better ? Int{} + i : move;
    }
    const Mask moved = active & (move >= 0);
    possible = possible & ((left <= 0) | (move >= 0));
    p.cost += moved ? least : Float{};
    PVQ_SEARCH_UNROLL
    for (int i = 0; i < kGroupSize; ++i) {
      const Mask here = moved & (move == i);
      p.cells[i] += here ? way : Int{};
      shift(metric, i, here ? step : Float{}, p);
    }
    left = moved ? left - 1 : Int{};
  }
  return possible;
}

// Single and double moves inside the pyramid, the best one a round, until none helps. Single: another sign or refinement. Double:
// a pulse from one coordinate to another, or two coordinates to the second best value of their cells.
template <class Lanes, int kRefinement>
PVQ_SEARCH_FUNCTION void improve(const Metric& metric, const Rungs<Lanes>& rungs, typename Lanes::Mask active, Point<Lanes>& p) {
  using Float = typename Lanes::Float;
  using Int = typename Lanes::Int;
  using Mask = typename Lanes::Mask;
  constexpr float kForbidden = 1e30f;
  const Int last_cell = rungs.last >> kRefinement;
  for (int round = 0; round < kMaxRounds && Lanes::any(active); ++round) {
    // by coordinate: value change and cost of the best value of the cell below, of the cell above, and of the same cell's
    // second (or, when that is better than the present one, its best)
    Float down[kGroupSize], down_cost[kGroupSize], up[kGroupSize], up_cost[kGroupSize], same[kGroupSize], same_cost[kGroupSize];
    PVQ_SEARCH_UNROLL
    for (int i = 0; i < kGroupSize; ++i) {
      const Float wanted = p.x[i] + p.g[i] * metric.inverse_m[i];
      down[i] = nearest_in_cell<Lanes, kRefinement>(rungs, p.cells[i] - 1, wanted) - p.x[i];
      up[i] = nearest_in_cell<Lanes, kRefinement>(rungs, p.cells[i] + 1, wanted) - p.x[i];
      const Float best = nearest_in_cell<Lanes, kRefinement>(rungs, p.cells[i], wanted);
      Float other = -best;
      if constexpr (kRefinement == 1) {  // the other half of the cell, or the other sign where that is nearer
        const Float low = Lanes::to_float(p.cells[i]) * (2.0f * rungs.step) + rungs.base;
        const Float size = best < 0.0f ? -best : best;
        Float half = size == low ? low + rungs.step : low;
        half = best < 0.0f ? -half : half;
        const Float a = half - wanted, b = -(best < 0.0f ? -low : low) - wanted;
        const Mask flip = (b * b < a * a) | (p.cells[i] * 2 >= rungs.last);
        other = flip ? -(best < 0.0f ? -low : low) : half;
      }
      same[i] = (p.x[i] == best ? other : best) - p.x[i];
      down_cost[i] = down[i] * (down[i] * metric.m[i][i] - 2.0f * p.g[i]);
      up_cost[i] = up[i] * (up[i] * metric.m[i][i] - 2.0f * p.g[i]);
      same_cost[i] = same[i] * (same[i] * metric.m[i][i] - 2.0f * p.g[i]);
      down_cost[i] = p.cells[i] > 0 ? down_cost[i] : Float{} + kForbidden;
      up_cost[i] = p.cells[i] < last_cell ? up_cost[i] : Float{} + kForbidden;
    }
    Float least = p.cost * -1e-6f;  // so that rounding cannot go round in circles
    Int move = Int{} - 1;           // 64 kind + 8 from + to
    PVQ_SEARCH_UNROLL
    for (int i = 0; i < kGroupSize; ++i) {
      const Mask better = same_cost[i] < least;
      least = better ? same_cost[i] : least;
      move = better ? Int{} + (9 * i) : move;
    }
    PVQ_SEARCH_UNROLL
    for (int i = 0; i < kGroupSize; ++i) {
      PVQ_SEARCH_UNROLL
      for (int k = 0; k < kGroupSize; ++k) {
        if (i == k) continue;
        const float cross = 2.0f * metric.m[i][k];
        const Float change = (down_cost[i] + up_cost[k]) + cross * (down[i] * up[k]);
        const Mask better = change < least;
        least = better ? change : least;
        move = better ? Int{} + (64 + 8 * i + k) : move;
        if (i < k) {
          const Float pair = (same_cost[i] + same_cost[k]) + cross * (same[i] * same[k]);
          const Mask better_pair = pair < least;
          least = better_pair ? pair : least;
          move = better_pair ? Int{} + (8 * i + k) : move;
        }
      }
    }
    active = active & (move >= 0);
    p.cost += active ? least : Float{};
    const Mask pulse = move >= 64;
    const Int from = (move >> 3) & 7, to = move & 7;
    PVQ_SEARCH_UNROLL
    for (int i = 0; i < kGroupSize; ++i) {
      const Mask is_from = active & (from == i), is_to = active & (to == i);
      Float delta = is_from ? (pulse ? down[i] : same[i]) : Float{};
      delta = is_to ? (pulse ? up[i] : same[i]) : delta;
      p.cells[i] += is_from & pulse ? Int{} - 1 : Int{};
      p.cells[i] += is_to & pulse ? Int{} + 1 : Int{};
      shift(metric, i, delta, p);
    }
  }
}

}  // namespace pvq::metric
