// SPDX-License-Identifier: Apache-2.0
// The canonical codebook: points near a target in the metric M = U^-1 U^-T of their group, U upper, and not in direction only.
//
// For an amplitude `step` of a pulse, the columns are rounded one after the other, each answering the errors of those before it
// (Babai's nearest plane). Magnitudes of the pulses then do not add up to K: the pulses that cost least are added or taken away
// until they do, and single pulses move from one coordinate to another while that helps. Then the amplitude is chosen again.
//
// All arithmetic is float64, sums in order, ties to the lowest coordinate.
#include <algorithm>
#include <cmath>
#include <vector>

#include "canonical.h"
#include "vector_clones.h"

namespace pvq {
namespace {

// Amplitudes that the pulses are chosen for, as codes apart from that of the best pulses so far; each but the first may find
// better ones.
constexpr int kOffsets[] = {0, 0, -1, 1};
constexpr int kMoves = 32;        // at most, of a pulse from one coordinate to another
constexpr double kLimit = 127.5;  // what is less rounds to 127 or less

struct Group {
  const GroupMetric& metric;
  int d, num_pulses;
  std::vector<double> target, p, slope, work;

  struct Move {
    int place = -1;
    double change = 0, gain = -HUGE_VAL;  // gain: of the cost, by step
  };

  Group(const GroupMetric& metric, int d, int num_pulses)
      : metric(metric), d(d), num_pulses(num_pulses), target(d), p(d), slope(d), work(d) {}

  // to = from * matrix, [d] and [d, d].
  void times(const std::vector<double>& from, const double* matrix, std::vector<double>& to) const {
    std::fill(to.begin(), to.end(), 0.0);
    for (int i = 0; i < d; ++i) add(from[i], matrix + i * d, to, 0);
  }
  void add(double factor, const double* row, std::vector<double>& to, int first) const {
    double* out = to.data();
    for (int j = first; j < d; ++j) out[j] += factor * row[j];
  }

  double norm() const {
    double sum = 0;
    for (double v : p) sum += v * v;
    return std::sqrt(sum);
  }
  double surplus() const {
    double sum = 0;
    for (double v : p) sum += std::fabs(v);
    return sum - num_pulses;
  }

  // |(target - q scale) U^-1|^2
  double cost(const std::int8_t* q, double scale) {
    for (int i = 0; i < d; ++i) work[i] = target[i] - q[i] * scale;
    times(work, metric.inverse, slope);
    double sum = 0;
    for (double v : slope) sum += v * v;
    return sum;
  }

  void round_in_turn(double step) {
    work = target;
    for (int i = 0; i < d; ++i) {
      p[i] = std::nearbyint(work[i] / step);
      add(-(work[i] - p[i] * step) / metric.factor[i * d + i], metric.factor + i * d, work, i + 1);
    }
    if (std::fabs(surplus()) <= num_pulses / 2.0) return;
    // The step is far from what the target wants: by its direction, then.
    double sum = 0;
    for (double v : target) sum += std::fabs(v);
    for (int i = 0; i < d; ++i) p[i] = sum > 0 ? std::trunc(target[i] / sum * num_pulses) : 0;
  }

  // slope = (target - p step) M, by -2 step that of the cost.
  void measure_slope(double step) {
    for (int i = 0; i < d; ++i) work[i] = target[i] - p[i] * step;
    times(work, metric.metric, slope);
  }

  // The pulse more (outwards) or less that costs least.
  Move best(double step, bool outwards) const {
    Move best;
    for (int i = 0; i < d; ++i) {
      if (!outwards && p[i] == 0) continue;
      const double sign = p[i] > 0 || (p[i] == 0 && slope[i] >= 0) ? 1.0 : -1.0, change = outwards ? sign : -sign;
      const double gain = 2 * slope[i] * change - step * metric.metric[i * d + i];
      if (gain > best.gain) best = {i, change, gain};
    }
    return best;
  }
  void make(const Move& move, double step) {
    p[move.place] += move.change;
    add(-step * move.change, metric.metric + move.place * d, slope, 0);
  }

  void choose_pulses(double step) {
    round_in_turn(step);
    measure_slope(step);
    for (double left = surplus(); left != 0; left += left < 0 ? 1 : -1) make(best(step, left < 0), step);
    for (int i = 0; i < kMoves; ++i) {
      const Move inwards = best(step, false);
      make(inwards, step);
      const Move outwards = best(step, true);
      make(outwards, step);
      if (inwards.gain + outwards.gain > 0) continue;
      p[outwards.place] -= outwards.change;
      p[inwards.place] -= inwards.change;
      return;
    }
  }
};

}  // namespace

PVQ_VECTOR_CLONES
void refine_pulses(const float* target, std::int64_t count, int group_size, int num_pulses, const GroupMetric& metric,
                   const float* levels, int num_levels, const float* scale, std::int16_t* pulses, std::uint16_t* codes,
                   std::int8_t* q) {
  Group g(metric, group_size, num_pulses);
  std::vector<std::int8_t> q_now(group_size);
  for (std::int64_t row = 0; row < count; ++row, target += group_size, pulses += group_size, q += group_size) {
    g.target.assign(target, target + group_size);
    g.p.assign(pulses, pulses + group_size);
    double best_cost = g.cost(q, scale[row]), norm_of_best = g.norm();
    if (!std::isfinite(best_cost)) continue;  // nothing can be compared
    for (int offset : kOffsets) {
      const int tried = codes[row] + offset;
      if (tried < 0 || tried >= num_levels) continue;
      const double step = levels[tried] / norm_of_best * scale[row];
      if (!(step > 0) || !std::isfinite(step)) continue;
      g.choose_pulses(step);
      g.times(g.p, metric.metric, g.slope);
      double along = 0, power = 0, largest = 0;
      for (int i = 0; i < group_size; ++i) {
        along += g.slope[i] * g.target[i];
        power += g.slope[i] * g.p[i];
        largest = std::max(largest, std::fabs(g.p[i]));
      }
      const double norm = g.norm(), wanted = along / power * norm / scale[row];
      int code = 0;
      while (code + 1 < num_levels && wanted > 0.5 * (double{levels[code]} + double{levels[code + 1]})) ++code;
      while (code > 0 && largest * levels[code] >= kLimit * norm) --code;
      if (largest * levels[code] >= kLimit * norm) continue;
      for (int i = 0; i < group_size; ++i) q_now[i] = static_cast<std::int8_t>(std::nearbyint(g.p[i] * (levels[code] / norm)));
      const double cost = g.cost(q_now.data(), scale[row]);
      if (!(cost < best_cost)) continue;
      best_cost = cost;
      norm_of_best = norm;
      codes[row] = static_cast<std::uint16_t>(code);
      std::copy(q_now.begin(), q_now.end(), q);
      for (int i = 0; i < group_size; ++i) pulses[i] = static_cast<std::int16_t>(g.p[i]);
    }
  }
}

}  // namespace pvq
