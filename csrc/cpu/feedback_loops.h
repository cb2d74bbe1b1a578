// SPDX-License-Identifier: Apache-2.0
// Error feedback and coordinate descent on sixteen rows side by side, with the search of ../metric_search.h. Included after
// encode_loops.h, for the same instruction sets; nothing crosses lanes here either.

struct VectorLanes {
  using Float = Floats;
  using Int = Ints;
  using Mask = Ints;
  static Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }
  static Ints to_int(Floats v) { return __builtin_convertvector(v, Ints); }
  static bool any(Ints mask) { return pvq::cpu::any(mask); }
};

struct Found {             // codewords of kEncodeLanes groups
  Floats cost;             // (target - x) M (target - x)^T
  Floats x[kGroupSize];    // q + h/2
  Ints cells[kGroupSize];  // m of the shape
  Ints choice;             // pyramid * kMaxGains + gain
};

typedef float Matrix[kGroupSize][kGroupSize];

inline void multiply(const Matrix& a, const Matrix& b, Matrix& product) {
  for (int i = 0; i < kGroupSize; ++i)
    for (int k = 0; k < kGroupSize; ++k) {
      product[i][k] = 0.0f;
      for (int r = 0; r < kGroupSize; ++r) product[i][k] += a[i][r] * b[r][k];
    }
}

// What an error e costs at least: e M e^T >= by_sum |e|_1^2 and e M e^T >= by_square |e|_2^2.
struct Bounds {
  float by_sum, by_square;
};

// With A = M^-1 = u^T u, |e|_1^2 is at most e M e^T times the sum of all |A_ij|, and |e|_2^2 at most e M e^T times A's largest
// eigenvalue, of which the fourth power is at most the largest row of |A^4|. Costs are computed in float, which loses a little of
// |e|_2^2 |M|: of a badly conditioned M the bounds are worth less, and nothing in the end.
inline Bounds bounds_of(const metric::Metric& metric) {
  constexpr float kRounded = 0.98f, kLost = 1e-6f;
  Matrix a, square, fourth;
  float trace = 0.0f, all = 0.0f, largest = 0.0f, norm = 0.0f;
  for (int i = 0; i < kGroupSize; ++i)
    for (int k = 0; k < kGroupSize; ++k) {
      a[i][k] = 0.0f;
      for (int r = 0; r < kGroupSize; ++r) a[i][k] += metric.u[r][i] * metric.u[r][k];  // zero below the diagonal
    }
  for (int i = 0; i < kGroupSize; ++i) trace += a[i][i];
  for (int i = 0; i < kGroupSize; ++i)
    for (int k = 0; k < kGroupSize; ++k) {
      a[i][k] /= trace;  // so that the fourth power neither overflows nor vanishes
      all += std::abs(a[i][k]);
    }
  multiply(a, a, square);
  multiply(square, square, fourth);
  for (int i = 0; i < kGroupSize; ++i) {
    float row = 0.0f, row_of_metric = 0.0f;
    for (int k = 0; k < kGroupSize; ++k) {
      row += std::abs(fourth[i][k]);
      row_of_metric += std::abs(metric.m[i][k]);
    }
    largest = row > largest ? row : largest;
    norm = row_of_metric > norm ? row_of_metric : norm;
  }
  const float eigenvalue = std::sqrt(std::sqrt(largest)) * trace;
  const float sure = kRounded - kLost * norm * eigenvalue, rounded = sure > 0.0f ? sure : 0.0f;
  return {rounded / (all * trace), rounded / eigenvalue};
}

constexpr float kTried = std::numeric_limits<float>::infinity();  // no codeword is left where this is what it costs at least

// For every gain and pyramid, in their order, what a codeword of theirs costs at least.
template <int kRefinement>
inline void bound_candidates(const Search& s, Bounds bounds, const Floats* target, Floats* least) {
  Floats size[kGroupSize], sum{};
  for (int i = 0; i < kGroupSize; ++i) {
    size[i] = target[i] < 0.0f ? -target[i] : target[i];
    sum += size[i];
  }
  for (int set = 0; set < s.num_sets; ++set)
    for (int gain = 0; gain < s.num_gains; ++gain) {
      const Ladder& ladder = s.ladders[set][gain];
      const float inverse_step = 1.0f / ladder.step;
      // Squared distance from the nearest magnitudes, their cells, and what the next pulse more or less adds at least. Costs are
      // convex in the cells, so no later one adds less.
      Floats free{}, more = Floats{} + kTried, less = more;
      Ints cells{};
      for (int i = 0; i < kGroupSize; ++i) {
        Floats position = (size[i] - ladder.base) * inverse_step + 0.5f;
        position = position > 0.0f ? position : Floats{};
        const Floats last = Floats{} + static_cast<float>(ladder.last);
        position = position < last ? position : last;
        const Ints j = __builtin_convertvector(position, Ints), in_cell = j & ((1 << kRefinement) - 1);
        const Floats e = size[i] - (to_float(j) * ladder.step + ladder.base);
        free += e * e;
        cells += j >> kRefinement;
        const Floats up = to_float((1 << kRefinement) - in_cell) * ladder.step, down = to_float(-1 - in_cell) * ladder.step;
        const Floats up_cost = up * (up - 2.0f * e), down_cost = down * (down - 2.0f * e);
        more = up_cost < more ? up_cost : more;
        less = down_cost < less ? down_cost : less;
      }
      for (int p = s.first[set]; p < s.end[set]; ++p) {
        // All magnitudes together are between low and high, so the errors add up to at least `gap`.
        const float low = 8.0f * ladder.base + static_cast<float>(s.pyramids[p] << kRefinement) * ladder.step;
        const float high = low + static_cast<float>(8 * ((1 << kRefinement) - 1)) * ladder.step;
        const Floats gap = sum > high ? sum - high : (sum < low ? low - sum : Floats{});
        const Floats by_sum = gap * gap * bounds.by_sum;
        const Floats missing = to_float(s.pyramids[p] - cells);
        const Floats by_square = (free + (missing > 0.0f ? missing * more : -missing * less)) * bounds.by_square;
        const Floats bound = by_sum > by_square ? by_sum : by_square;
        *least++ = bound < kTried ? bound : Floats{};  // it may overflow where the cost itself does not
      }
    }
}

// The best codeword of those that cost less than `limit`, over all gains and pyramids. Ties: lowest gain, first pyramid. Each
// lane tries its own candidates, those that may cost least first, until no other can be as good as what it has.
template <int kRefinement>
void search_codebook(const Search& s, const metric::Metric& metric, const Floats* target, Floats limit, Found* best) {
  best->cost = Floats{} + kTried;
  for (int i = 0; i < kGroupSize; ++i) {  // in lanes without a finite cost: a codeword all the same
    best->cells[i] = Ints{} + (i == kGroupSize - 1 ? s.pyramids[0] : 0);
    best->x[i] = to_float(best->cells[i] << kRefinement) * s.ladders[0][0].step + s.ladders[0][0].base;
  }
  Floats least[kMaxPyramids * kMaxGains];
  bound_candidates<kRefinement>(s, bounds_of(metric), target, least);
  Ints number{};  // of the best candidate
  for (;;) {
    Floats lowest = Floats{} + kTried;
    Ints candidate{};
    for (int c = 0; c < s.num_candidates; ++c) {
      const Ints lower = least[c] < lowest;
      lowest = lower ? least[c] : lowest;
      candidate = lower ? Ints{} + c : candidate;
    }
    const Ints open = (lowest <= best->cost) & (lowest < limit);  // equal: both may cost nothing, and the first one is taken
    if (!any(open)) break;
    for (int c = 0; c < s.num_candidates; ++c) least[c] = candidate == c ? Floats{} + kTried : least[c];

    metric::Rungs<VectorLanes> rungs;
    Ints pulses;
    for (int lane = 0; lane < kEncodeLanes; ++lane) {
      const Candidate& chosen = s.candidates[candidate[lane]];
      const Ladder& ladder = s.ladders[chosen.set][chosen.gain];
      rungs.base[lane] = ladder.base;
      rungs.step[lane] = ladder.step;
      rungs.last[lane] = ladder.last;
      pulses[lane] = s.pyramids[chosen.pyramid];
    }
    rungs.inverse_step = 1.0f / rungs.step;
    metric::Point<VectorLanes> point;
    metric::nearest_plane<VectorLanes, kRefinement>(metric, rungs, target, point);
    Ints total = point.cells[0];
    for (int i = 1; i < kGroupSize; ++i) total += point.cells[i];
    pulses = open ? pulses : total;  // nothing to do in the other lanes
    const Ints possible = open & metric::to_pyramid<VectorLanes, kRefinement>(metric, rungs, pulses, point);
    metric::improve<VectorLanes, kRefinement>(metric, rungs, possible, point);
    const Ints better = possible & ((point.cost < best->cost) | ((point.cost == best->cost) & (candidate < number)));
    best->cost = better ? point.cost : best->cost;
    number = better ? candidate : number;
    for (int i = 0; i < kGroupSize; ++i) {
      best->x[i] = better ? point.x[i] : best->x[i];
      best->cells[i] = better ? point.cells[i] : best->cells[i];
    }
  }
  for (int lane = 0; lane < kEncodeLanes; ++lane) {
    const Candidate& chosen = s.candidates[number[lane]];
    best->choice[lane] = chosen.pyramid * kMaxGains + chosen.gain;
  }
}

// Codewords that cost less than `limit`; where there is none, cost is not below it and the rest undefined.
inline void search_group(const Search& s, const metric::Metric& metric, const Floats* target, Floats limit, Found* best) {
  if (s.book == nullptr) return metric::nearest_plane_int8<VectorLanes>(metric, target, best->x, best->cost);
  return s.refinement_bits == 1 ? search_codebook<1>(s, metric, target, limit, best)
                                : search_codebook<0>(s, metric, target, limit, best);
}

inline int code_bytes(const Search& s) { return s.book == nullptr ? kGroupSize : s.book->bytes_per_group; }

inline void write_found(const Search& s, const Found& found, int lane, std::uint8_t* code, std::int8_t* q) {
  if (s.book == nullptr) {
    for (int i = 0; i < kGroupSize; ++i) code[i] = static_cast<std::uint8_t>(q[i] = static_cast<std::int8_t>(found.x[i][lane]));
    return;
  }
  int cells[kGroupSize], refinement = 0, signs = 0;
  const int pyramid = found.choice[lane] / kMaxGains, gain_index = found.choice[lane] % kMaxGains;
  const Rung gain = s.book->gains[pyramid][gain_index];
  for (int i = 0; i < kGroupSize; ++i) {
    q[i] = static_cast<std::int8_t>(found.x[i][lane] - 0.5f);
    const int b = q[i] < 0 ? ~q[i] : q[i];
    cells[i] = found.cells[i][lane];
    signs |= (q[i] < 0 ? 1 : 0) << i;
    refinement |= ((b - gain.base) / gain.step - (cells[i] << s.refinement_bits)) << i;
  }
  write_bytes(s, pyramid, gain_index, cells, signs, refinement, code);
}

void feedback_range(const Search& s, const EncodeArgs& p, const float* factor, const float* metrics, float* error,
                    std::int64_t begin, std::int64_t end, void* columns) {
  Floats* w = static_cast<Floats*>(columns);
  const std::int64_t n = p.columns, groups = n / kGroupSize, bytes = code_bytes(s);
  for (std::int64_t row = begin; row < end; row += kEncodeLanes) {
    const int rows = lanes_from(row, end);
    const Floats scale = gather_scales(p.row_scale, row, rows);
    const Floats inverse = scale > 0.0f ? 1.0f / scale : Floats{};
    gather_columns(p.weight, n, row, rows, 0, n, w);
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t first = g * kGroupSize;
      const metric::Metric metric = metric::read_metric(metrics + g * metric::kMetricFloats);
      Floats target[kGroupSize];
      for (int i = 0; i < kGroupSize; ++i) target[i] = w[first + i] * inverse;
      Found best;
      search_group(s, metric, target, Floats{} + std::numeric_limits<float>::infinity(), &best);
      for (int lane = 0; lane < rows; ++lane)
        write_found(s, best, lane, p.codes + ((row + lane) * groups + g) * bytes, p.q + (row + lane) * n + first);
      Floats e[kGroupSize];
      for (int j = 0; j < kGroupSize; ++j) {  // E U_QQ = w - what, U_QQ upper: forward substitution
        Floats value = w[first + j] - best.x[j] * scale;
        for (int i = 0; i < j; ++i) value -= e[i] * factor[(first + i) * n + first + j];
        e[j] = value / factor[(first + j) * n + first + j];
        for (int lane = 0; lane < rows; ++lane) error[(row + lane) * n + first + j] = e[j][lane];
      }
      for (std::int64_t c = first + kGroupSize; c < n; ++c) {
        Floats sum = w[c];
        for (int i = 0; i < kGroupSize; ++i) sum -= e[i] * factor[(first + i) * n + c];
        w[c] = sum;
      }
    }
  }
}

// gradient: (W - What) H of the block's columns; hessian: H_BB.
void descent_range(const Search& s, const EncodeArgs& p, const float* gradient, const float* hessian, const float* metrics,
                   std::int64_t begin, std::int64_t end, void* columns) {
  const float half = s.book == nullptr ? 0.0f : 0.5f;
  Floats* grad = static_cast<Floats*>(columns);
  const std::int64_t n = p.columns, groups = n / kGroupSize, bytes = code_bytes(s);
  for (std::int64_t row = begin; row < end; row += kEncodeLanes) {
    const int rows = lanes_from(row, end);
    const Floats scale = gather_scales(p.row_scale, row, rows);
    const Floats inverse = scale > 0.0f ? 1.0f / scale : Floats{};
    gather_columns(gradient, n, row, rows, 0, n, grad);
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t first = g * kGroupSize;
      const metric::Metric metric = metric::read_metric(metrics + g * metric::kMetricFloats);
      Floats w[kGroupSize], old[kGroupSize], e[kGroupSize], others[kGroupSize], middle[kGroupSize], target[kGroupSize];
      gather_columns(p.weight, n, row, rows, first, kGroupSize, w);
      for (int i = 0; i < kGroupSize; ++i) {
        old[i] = Floats{};
        for (int lane = 0; lane < rows; ++lane) old[i][lane] = static_cast<float>(p.q[(row + lane) * n + first + i]) + half;
        e[i] = w[i] - old[i] * scale;
      }
      for (int i = 0; i < kGroupSize; ++i) {  // what the other groups' errors ask of this one
        Floats own = e[0] * metric.m[0][i];
        for (int k = 1; k < kGroupSize; ++k) own += e[k] * metric.m[k][i];
        others[i] = grad[first + i] - own;
      }
      for (int i = 0; i < kGroupSize; ++i) {  // M^-1 = u^T u
        middle[i] = others[i] * metric.u[i][i];
        for (int k = i + 1; k < kGroupSize; ++k) middle[i] += others[k] * metric.u[i][k];
      }
      for (int i = 0; i < kGroupSize; ++i) {
        Floats sum = middle[0] * metric.u[0][i];
        for (int k = 1; k <= i; ++k) sum += middle[k] * metric.u[k][i];
        target[i] = (w[i] + sum) * inverse;
      }
      Floats old_cost{};
      for (int i = 0; i < kGroupSize; ++i) {
        Floats sum = (target[0] - old[0]) * metric.m[0][i];
        for (int k = 1; k < kGroupSize; ++k) sum += (target[k] - old[k]) * metric.m[k][i];
        old_cost += sum * (target[i] - old[i]);
      }
      const Floats limit = old_cost * metric::kWorthAChange;
      Found best;
      search_group(s, metric, target, limit, &best);
      const Ints better = best.cost < limit;
      if (!any(better)) continue;
      for (int lane = 0; lane < rows; ++lane)
        if (better[lane] != 0)
          write_found(s, best, lane, p.codes + ((row + lane) * groups + g) * bytes, p.q + (row + lane) * n + first);
      Floats step[kGroupSize];
      for (int i = 0; i < kGroupSize; ++i) step[i] = better ? (best.x[i] - old[i]) * scale : Floats{};
      for (std::int64_t c = 0; c < n; ++c) {
        Floats sum = grad[c];
        for (int i = 0; i < kGroupSize; ++i) sum -= step[i] * hessian[(first + i) * n + c];
        grad[c] = sum;
      }
    }
  }
}
