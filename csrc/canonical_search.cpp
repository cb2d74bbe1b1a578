// SPDX-License-Identifier: Apache-2.0
// The canonical codebook: nearest point of S(D, K) by direction, max <x, p> / ||p||.
//
// All sums of float64 run over the coordinates in order and ties go to the lowest coordinate, so that
// codec.pyramid.search_pulses finds the same point. The search is on magnitudes; the signs are put back at the end.
//
//   SNR in dB, Gaussian, D/K      8/6    16/12   16/27   128/84   128/187   128/386
//   Fischer's rounding           10.28   10.56   17.19     9.83     16.19     22.29
//   greedy on the cosine         10.57   10.84   17.20    10.14     16.28     22.31
//   the better one               10.57   10.84   17.24    10.14     16.28     22.31
//   the better one, refined      10.59   10.86   17.28    10.15     16.29     22.32
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "canonical.h"
#include "vector_clones.h"

namespace pvq {
namespace {

// x + kRound - kRound is rint(x) for |x| < 2^51, to even, without a call.
constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52

// Index of the largest of score[0 .. d), the lowest one of equals. The lanes let the compiler use vectors.
int argmax(const double* score, int d) {
  constexpr int kLanes = 8;
  double best = score[0];
  int i = 0;
  if (d >= kLanes) {
    double lane[kLanes];
    std::copy_n(score, kLanes, lane);
    for (i = kLanes; i + kLanes <= d; i += kLanes)
      for (int v = 0; v < kLanes; ++v) lane[v] = score[i + v] > lane[v] ? score[i + v] : lane[v];
    best = *std::max_element(lane, lane + kLanes);
  }
  for (; i < d; ++i) best = std::max(best, score[i]);
  for (i = 0; score[i] != best; ++i) {
  }
  return i;
}

// One group: magnitudes x, the candidate p, and its <x, p> and <p, p>.
struct Candidate {
  std::vector<double> p;
  double xy = 0, yy = 0;

  void measure(const double* x) {
    xy = yy = 0;
    for (size_t i = 0; i < p.size(); ++i) {
      xy += x[i] * p[i];
      yy += p[i] * p[i];
    }
  }
  bool better_than(const Candidate& other) const { return xy * xy * other.yy > other.xy * other.xy * yy; }
};

// argmin ||p - s x||^2 over p >= 0, sum p = K: round, then move one pulse at a time where it costs least. The problem is
// separable and convex, so this is exact (Fischer 1986, section IV, with s = K / ||x||_1).
void project(const double* x, double s, int d, int k, double* score, Candidate* candidate) {
  double* p = candidate->p.data();
  int total = 0;
  for (int i = 0; i < d; ++i) {
    p[i] = (x[i] * s + kRound) - kRound;
    total += static_cast<int>(p[i]);
  }
  for (; total < k; ++total) {
    for (int i = 0; i < d; ++i) score[i] = x[i] * s - p[i];
    p[argmax(score, d)] += 1;
  }
  for (; total > k; --total) {
    for (int i = 0; i < d; ++i) score[i] = p[i] > 0 ? p[i] - x[i] * s : -HUGE_VAL;
    p[argmax(score, d)] -= 1;
  }
  candidate->measure(x);
}

// Round K x / ||x||_1 down, then give each missing pulse to the coordinate where the cosine gains most (Opus, celt/vq.c).
void greedy(const double* x, double s, int d, int k, double* score, Candidate* candidate) {
  double* p = candidate->p.data();
  int total = 0;
  for (int i = 0; i < d; ++i) {
    p[i] = static_cast<int>(x[i] * s);
    total += static_cast<int>(p[i]);
  }
  while (total > k) {  // x s may have been rounded up to an integer
    for (int i = 0; i < d; ++i) score[i] = p[i] > 0 ? p[i] - x[i] * s : -HUGE_VAL;
    p[argmax(score, d)] -= 1;
    --total;
  }
  candidate->measure(x);
  double xy = candidate->xy, yy = candidate->yy;
  for (; total < k; ++total) {
    for (int i = 0; i < d; ++i) score[i] = (xy + x[i]) * (xy + x[i]) / (yy + (2 * p[i] + 1));
    const int i = argmax(score, d);
    xy += x[i];
    yy += 2 * p[i] + 1;
    p[i] += 1;
  }
  candidate->measure(x);
}

}  // namespace

PVQ_VECTOR_CLONES
void search_pulses(const float* x, int64_t count, int group_size, int num_pulses, int16_t* pulses) {
  constexpr int kRefinements = 16;  // three or four change anything on Gaussian groups
  const int d = group_size, k = num_pulses;
  std::vector<double> magnitude(d), score(d);
  Candidate best, other;
  best.p.resize(d);
  other.p.resize(d);
  for (int64_t g = 0; g < count; ++g, x += d, pulses += d) {
    double l1 = 0;
    for (int i = 0; i < d; ++i) l1 += magnitude[i] = std::fabs(static_cast<double>(x[i]));
    if (l1 == 0) {  // no direction: the flattest point, whose largest coordinate is the smallest
      for (int i = 0; i < d; ++i) pulses[i] = static_cast<int16_t>(k / d + (i < k % d));
      continue;
    }
    project(magnitude.data(), k / l1, d, k, score.data(), &best);
    greedy(magnitude.data(), k / l1, d, k, score.data(), &other);
    if (other.better_than(best)) std::swap(best, other);
    // With nu = ||p|| and theta = <x, p> / nu, a p' that is nearest to (<p, p> / <x, p>) x has
    // <x, p'> - theta ||p'|| >= <x, p'> - theta (||p'||^2 / nu + nu) / 2 >= 0: its cosine is not lower.
    for (int step = 0; step < kRefinements && best.xy > 0; ++step) {
      project(magnitude.data(), best.yy / best.xy, d, k, score.data(), &other);
      if (!other.better_than(best)) break;
      std::swap(best, other);
    }
    for (int i = 0; i < d; ++i) {
      const auto p = static_cast<int16_t>(best.p[i]);
      pulses[i] = x[i] < 0 ? static_cast<int16_t>(-p) : p;
    }
  }
}

}  // namespace pvq
