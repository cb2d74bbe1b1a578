// SPDX-License-Identifier: Apache-2.0
// The search of encode.h on sixteen rows side by side, in vector types; no operation crosses lanes. Each encode_*.cpp includes
// this file inside an anonymous namespace and compiles it for its own instruction set; contraction is off, so all give the same
// codes.

typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));

struct Codewords {  // of kEncodeLanes groups
  Floats cost;
  Ints choice;  // pyramid * kMaxGains + gain
  Ints j[kGroupSize];
};

inline Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

inline bool any(Ints mask) {
  std::int32_t bits = 0;
  for (int lane = 0; lane < kEncodeLanes; ++lane) bits |= mask[lane];
  return bits != 0;
}

inline Floats square_sum(const Floats* e) {
  return ((e[0] * e[0] + e[1] * e[1]) + (e[2] * e[2] + e[3] * e[3])) +
         ((e[4] * e[4] + e[5] * e[5]) + (e[6] * e[6] + e[7] * e[7]));
}

// Moves pulses, one a round in every lane that still misses some, until the cells add up to the pyramid. A move goes to the
// nearest magnitude of the next cell, d steps away: the lowest of the cell going up, the highest going down.
inline void move_pulses(const Search& s, const Ladder& ladder, Ints missing, Ints* j, Floats* e, Ints* possible) {
  constexpr float kForbidden = 1e30f;
  const int r = s.refinement_bits, low_bits = (1 << r) - 1;
  const Ints up = missing > 0;
  Ints left = up ? missing : -missing;
  for (Ints active = left > 0; any(active); active = left > 0) {
    Floats least = Floats{} + kForbidden;
    Ints move = Ints{} - 1;
    for (int i = 0; i < kGroupSize; ++i) {
      const Ints in_cell = j[i] & low_bits;
      const Ints d = up ? (1 << r) - in_cell : -1 - in_cell;
      const Ints next = j[i] + d;
      const Floats length = to_float(d) * ladder.step;
      const Floats change = length * (length - 2.0f * e[i]);  // (e - length)^2 - e^2
      const Ints better = (change < least) & (next >= 0) & (next <= ladder.last);
      least = better ? change : least;
      move = better ? Ints{} + i : move;
    }
    *possible &= ~(active & (move < 0));
    for (int i = 0; i < kGroupSize; ++i) {
      const Ints in_cell = j[i] & low_bits;
      const Ints d = (move == i) & active ? (up ? (1 << r) - in_cell : -1 - in_cell) : Ints{};
      j[i] += d;
      e[i] -= to_float(d) * ladder.step;
    }
    left = active & (move >= 0) ? left - 1 : Ints{};
  }
}

// Nearest codewords to the magnitudes a[i] (int8 units, not negative), lane by lane.
inline void nearest(const Search& s, const Floats* a, Codewords* best) {
  best->cost = Floats{} + std::numeric_limits<float>::infinity();
  best->choice = Ints{};
  for (int i = 0; i < kGroupSize; ++i) best->j[i] = Ints{};
  const Floats sum = ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
  for (int set = 0; set < s.num_sets; ++set)
    for (int gain = 0; gain < s.num_gains; ++gain) {
      const Ladder& ladder = s.ladders[set][gain];
      const float inverse_step = 1.0f / ladder.step;
      Ints free[kGroupSize], total{};
      Floats free_error[kGroupSize];
      for (int i = 0; i < kGroupSize; ++i) {
        Floats position = (a[i] - ladder.base) * inverse_step + 0.5f;
        position = position > 0.0f ? position : Floats{};
        position = position < 1000.0f ? position : Floats{} + 1000.0f;
        Ints j = __builtin_convertvector(position, Ints);
        j = j < ladder.last ? j : Ints{} + ladder.last;
        free[i] = j;
        free_error[i] = a[i] - (ladder.base + to_float(j) * ladder.step);
        total += j >> s.refinement_bits;
      }
      const Ints promising = square_sum(free_error) < best->cost;  // no pyramid is nearer than the free choice
      if (!any(promising)) continue;
      for (int p = s.first[set]; p < s.end[set]; ++p) {
        // All magnitudes together are between low and high, so the errors add up to at least `gap` and their squares to gap^2/8.
        const float low = 8.0f * ladder.base + static_cast<float>(s.pyramids[p] << s.refinement_bits) * ladder.step;
        const float high = low + static_cast<float>(8 * ((1 << s.refinement_bits) - 1)) * ladder.step;
        const Floats gap = sum > high ? sum - high : (sum < low ? low - sum : Floats{});
        Ints possible = promising & (gap * gap * 0.124f < best->cost);
        if (!any(possible)) continue;
        Ints j[kGroupSize];
        Floats e[kGroupSize];
        for (int i = 0; i < kGroupSize; ++i) {
          j[i] = free[i];
          e[i] = free_error[i];
        }
        const Ints missing = possible ? s.pyramids[p] - total : Ints{};
        move_pulses(s, ladder, missing, j, e, &possible);
        const Floats cost = square_sum(e);
        const Ints better = possible & (cost < best->cost);
        best->cost = better ? cost : best->cost;
        best->choice = better ? Ints{} + (p * kMaxGains + gain) : best->choice;
        for (int i = 0; i < kGroupSize; ++i) best->j[i] = better ? j[i] : best->j[i];
      }
    }
}

inline void write_bytes(const Search& s, int pyramid, int gain, const int* m, int signs, int refinement, std::uint8_t* code) {
  const int index = shape_index(*s.book, pyramid, m) | gain << s.book->shape_bits;
  *code++ = static_cast<std::uint8_t>(index);
  if (s.book->shape_bits > 8) *code++ = static_cast<std::uint8_t>(index >> 8);
  *code++ = static_cast<std::uint8_t>(signs);
  if (s.refinement_bits == 1) *code = static_cast<std::uint8_t>(refinement);
}

inline void write_code(const Search& s, const Codewords& words, int lane, int signs, std::uint8_t* code, std::int8_t* q) {
  int m[kGroupSize], refinement = 0;
  const int pyramid = words.choice[lane] / kMaxGains, gain_index = words.choice[lane] % kMaxGains;
  const Rung gain = s.book->gains[pyramid][gain_index];
  for (int i = 0; i < kGroupSize; ++i) {
    const int j = words.j[i][lane];
    m[i] = j >> s.refinement_bits;
    refinement |= (j & ((1 << s.refinement_bits) - 1)) << i;
    const int b = gain.base + gain.step * j;
    q[i] = static_cast<std::int8_t>((signs >> i & 1) != 0 ? ~b : b);
  }
  write_bytes(s, pyramid, gain_index, m, signs, refinement, code);
}

// Codes group g of `rows` rows whose weights are w[i], lane by lane; `inverse` is 1 / row_scale, or 0.
inline void encode_group(const Search& s, const EncodeArgs& p, const Floats* w, Floats inverse, std::int64_t first_row, int rows,
                         std::int64_t g) {
  const std::int64_t groups = p.columns / kGroupSize;
  if (s.book == nullptr) {  // int8
    for (int lane = 0; lane < rows; ++lane)
      for (int i = 0; i < kGroupSize; ++i) {
        float value = w[i][lane] * inverse[lane];
        value = value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value;
        value = (value + 12582912.0f) - 12582912.0f;  // to the nearest integer, ties to even
        const std::int64_t at = (first_row + lane) * p.columns + g * kGroupSize + i;
        p.q[at] = static_cast<std::int8_t>(value);
        p.codes[at] = static_cast<std::uint8_t>(p.q[at]);
      }
    return;
  }
  Floats a[kGroupSize];
  Ints signs{};
  for (int i = 0; i < kGroupSize; ++i) {
    const Floats target = w[i] * inverse;
    const Ints negative = target < 0.0f;
    signs |= negative & (1 << i);
    a[i] = negative ? -target : target;
  }
  Codewords best;
  nearest(s, a, &best);
  for (int lane = 0; lane < rows; ++lane) {
    const std::int64_t row = first_row + lane;
    write_code(s, best, lane, signs[lane], p.codes + (row * groups + g) * s.book->bytes_per_group,
               p.q + row * p.columns + g * kGroupSize);
  }
}

// Weights of kEncodeLanes rows, one column a vector; rows past the last one are 0.
inline void gather_columns(const float* weight, std::int64_t columns, std::int64_t first_row, int rows, std::int64_t first_column,
                           std::int64_t count, Floats* out) {
  for (std::int64_t c = 0; c < count; ++c) out[c] = Floats{};
  for (int lane = 0; lane < rows; ++lane)
    for (std::int64_t c = 0; c < count; ++c) out[c][lane] = weight[(first_row + lane) * columns + first_column + c];
}

inline Floats gather_scales(const float* row_scale, std::int64_t first_row, int rows) {
  Floats scale{};
  for (int lane = 0; lane < rows; ++lane) scale[lane] = row_scale[first_row + lane];
  return scale;
}

inline int lanes_from(std::int64_t row, std::int64_t end) {
  return static_cast<int>(end - row < kEncodeLanes ? end - row : kEncodeLanes);
}

void encode_range(const Search& s, const EncodeArgs& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; row += kEncodeLanes) {
    const int rows = lanes_from(row, end);
    const Floats scale = gather_scales(p.row_scale, row, rows);
    const Floats inverse = scale > 0.0f ? 1.0f / scale : Floats{};
    for (std::int64_t g = 0; g < p.columns / kGroupSize; ++g) {
      Floats w[kGroupSize];
      gather_columns(p.weight, p.columns, row, rows, g * kGroupSize, kGroupSize, w);
      encode_group(s, p, w, inverse, row, rows, g);
    }
  }
}

void error_range(const Search& s, const float* weight, const float* row_scale, std::int64_t columns, std::int64_t stride,
                 std::int64_t begin, std::int64_t end, float* error) {
  for (std::int64_t row = begin; row < end; row += kEncodeLanes) {
    const int rows = lanes_from(row, end);
    const Floats scale = gather_scales(row_scale, row, rows);
    const Floats inverse = scale > 0.0f ? 1.0f / scale : Floats{};
    Floats sum{};
    for (std::int64_t g = 0; g < columns / kGroupSize; g += stride) {
      Floats a[kGroupSize];
      gather_columns(weight, columns, row, rows, g * kGroupSize, kGroupSize, a);
      for (int i = 0; i < kGroupSize; ++i) {
        a[i] *= inverse;
        a[i] = a[i] < 0.0f ? -a[i] : a[i];
      }
      Codewords best;
      nearest(s, a, &best);
      sum += best.cost;
    }
    sum *= scale * scale;
    for (int lane = 0; lane < rows; ++lane) error[row + lane] = sum[lane];
  }
}
