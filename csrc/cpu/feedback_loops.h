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

// Over all gains and pyramids. Ties: lowest gain, first pyramid.
template <int kRefinement>
void search_codebook(const Search& s, const metric::Metric& metric, const Floats* target, Found* best) {
  best->cost = Floats{} + std::numeric_limits<float>::infinity();
  best->choice = Ints{};
  for (int i = 0; i < kGroupSize; ++i) {  // in lanes without a finite cost: a codeword all the same
    best->cells[i] = Ints{} + (i == kGroupSize - 1 ? s.pyramids[0] : 0);
    best->x[i] = to_float(best->cells[i] << kRefinement) * s.ladders[0][0].step + s.ladders[0][0].base;
  }
  for (int set = 0; set < s.num_sets; ++set)
    for (int gain = 0; gain < s.num_gains; ++gain) {
      const Ladder& ladder = s.ladders[set][gain];
      const metric::Rungs rungs{ladder.base, ladder.step, 1.0f / ladder.step, ladder.last};
      metric::Point<VectorLanes> free;
      metric::nearest_plane<VectorLanes, kRefinement>(metric, rungs, target, free);
      for (int p = s.first[set]; p < s.end[set]; ++p) {
        metric::Point<VectorLanes> point = free;
        const Ints possible = metric::to_pyramid<VectorLanes, kRefinement>(metric, rungs, s.pyramids[p], point);
        metric::improve<VectorLanes, kRefinement>(metric, rungs, possible, point);
        const Ints better = possible & (point.cost < best->cost);
        best->cost = better ? point.cost : best->cost;
        best->choice = better ? Ints{} + (p * kMaxGains + gain) : best->choice;
        for (int i = 0; i < kGroupSize; ++i) {
          best->x[i] = better ? point.x[i] : best->x[i];
          best->cells[i] = better ? point.cells[i] : best->cells[i];
        }
      }
    }
}

inline void search_group(const Search& s, const metric::Metric& metric, const Floats* target, Found* best) {
  if (s.book == nullptr) return metric::nearest_plane_int8<VectorLanes>(metric, target, best->x, best->cost);
  return s.refinement_bits == 1 ? search_codebook<1>(s, metric, target, best) : search_codebook<0>(s, metric, target, best);
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
      search_group(s, metric, target, &best);
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
      Found best;
      search_group(s, metric, target, &best);
      Floats old_cost{};
      for (int i = 0; i < kGroupSize; ++i) {
        Floats sum = (target[0] - old[0]) * metric.m[0][i];
        for (int k = 1; k < kGroupSize; ++k) sum += (target[k] - old[k]) * metric.m[k][i];
        old_cost += sum * (target[i] - old[i]);
      }
      const Ints better = best.cost < old_cost * metric::kWorthAChange;
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
